"""The backends that diffmax-core carries itself, described and registered like any other."""

from diffmax._numerics import FLOAT_DTYPES
from diffmax.plugin import FEATURES, Backend, hookimpl


class CorePlugin:
    """Plain PyTorch: blocked for CPUs, and the reference for any device."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """The backends `cpu` and `reference`."""
        return (
            Backend(
                name="cpu",
                device_types=("cpu",),
                kernels={"bisect": "diffmax.cpu.rows:bisect", "bisect_backward": "diffmax.cpu.rows:bisect_backward"},
                dtypes=FLOAT_DTYPES,
                features=frozenset(FEATURES),
            ),
            Backend(
                name="reference",
                device_types=("*",),
                kernels={"bisect": "diffmax.reference:bisect", "bisect_backward": "diffmax.reference:bisect_backward"},
                dtypes=FLOAT_DTYPES,
                features=frozenset(FEATURES),
                priority=0,
            ),
        )


plugin = CorePlugin()
