"""The backends that diffmax-core carries itself, described and registered like any other."""

from diffmax._numerics import FLOAT_DTYPES
from diffmax.plugin import FEATURES, Backend, hookimpl


class CorePlugin:
    """For CPUs compiled by Numba and in plain PyTorch, and the reference for any device."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """The backends `numba`, `cpu` and `reference`."""
        return (
            Backend(
                name="numba",
                device_types=("cpu",),
                kernels={
                    "bisect": "diffmax.cpu.numba_rows:bisect",
                    "bisect_backward": "diffmax.cpu.numba_rows:bisect_backward",
                    "attention": "diffmax.cpu.numba_attention:attention",
                    "attention_backward": "diffmax.cpu.numba_attention:attention_backward",
                    "attention_kvcache": "diffmax.cpu.numba_kvcache:attention_kvcache",
                },
                dtypes=FLOAT_DTYPES,
                features=frozenset(FEATURES),
                priority=60,
                probe="diffmax.cpu:numba_missing",
                unsupported="diffmax.cpu:numba_cannot",
                warmup="diffmax.cpu.numba_rows:warmup",
                install_hint='run: pip install "diffmax-core[numba]"',
            ),
            Backend(
                name="cpu",
                device_types=("cpu",),
                kernels={
                    "bisect": "diffmax.cpu.rows:bisect",
                    "bisect_backward": "diffmax.cpu.rows:bisect_backward",
                    "attention": "diffmax.cpu.attention:attention",
                    "attention_backward": "diffmax.cpu.attention:attention_backward",
                    "attention_kvcache": "diffmax.cpu.kvcache:attention_kvcache",
                },
                dtypes=FLOAT_DTYPES,
                features=frozenset(FEATURES),
            ),
            Backend(
                name="reference",
                device_types=("*",),
                kernels={
                    "bisect": "diffmax.reference:bisect",
                    "bisect_backward": "diffmax.reference:bisect_backward",
                    "attention": "diffmax.reference_attention:attention",
                    "attention_backward": "diffmax.reference_attention:attention_backward",
                    "attention_kvcache": "diffmax.reference_kvcache:attention_kvcache",
                },
                dtypes=FLOAT_DTYPES,
                features=frozenset(FEATURES),
                priority=0,
            ),
        )


plugin = CorePlugin()
