"""The backends of diffmax-core itself, described and registered like any other."""

from diffmax.kernels.claims import cpu_kernels, reference_kernels
from diffmax.plugin import Backend, hookimpl


class CorePlugin:
    """The plugin of diffmax-core: CPU backends compiled by Numba and in plain PyTorch, and the reference for any device."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """The backends `numba`, `cpu` and `reference`."""
        return (
            Backend(
                name="numba",
                device_types=("cpu",),
                kernels=cpu_kernels("diffmax.kernels.numba", compiled=True),
                priority=60,
                probe="diffmax.kernels.numba.probe:numba_missing",
                unsupported="diffmax.kernels.numba.probe:numba_cannot",
                install_hint='run: pip install "diffmax-core[numba]"',
            ),
            Backend(name="cpu", device_types=("cpu",), kernels=cpu_kernels("diffmax.kernels.cpu")),
            Backend(name="reference", device_types=("*",), kernels=reference_kernels(), priority=0),
        )

    @hookimpl
    def diffmax_env_report(self) -> dict[str, str]:
        """Where Numba keeps what it compiles."""
        try:
            from diffmax.kernels.numba.cache import kept_in

            return {"compiled kernels": kept_in()}
        except ImportError:  # Numba is missing, or broken, which its backend's status tells
            return {}


plugin = CorePlugin()
