"""The backends that diffmax-core carries itself, described and registered like any other."""

from diffmax.operators.common.numerics import FLOAT_DTYPES
from diffmax.plugin import Backend, Kernel, hookimpl

# What core's kernels have, in plain PyTorch and compiled alike
ALPHA = {"tensor_alpha", "deterministic"}
SCORES = {"causal", "window", "gqa", "value_dim", "alibi", "softcap", "sink"}
FEATURES = {
    "bisect": ALPHA,
    "bisect_backward": ALPHA | {"alpha_gradient"},
    "attention": ALPHA | SCORES | {"mask", "bias", "varlen", "dropout", "attention_stats"},
    "attention_backward": ALPHA | SCORES | {"mask", "bias", "varlen", "dropout", "alpha_gradient"},
    "attention_kvcache": ALPHA | SCORES | {"kv_cache", "paged", "attention_stats"},
}


def _kernels(**modules: str) -> dict[str, Kernel]:
    """Kernels named as their operators; a backward lies beside its forward."""
    found = {}
    for operator, features in FEATURES.items():
        module = modules[operator.removesuffix("_backward")]
        warmup = None if operator.endswith("_backward") or ".numba." not in module else f"{module}:warmup"
        found[operator] = Kernel(f"{module}:{operator}", FLOAT_DTYPES, frozenset(features), warmup=warmup)
    return found


class CorePlugin:
    """For CPUs compiled by Numba and in plain PyTorch, and the reference for any device."""

    @hookimpl
    def diffmax_backends(self) -> tuple[Backend, ...]:
        """The backends `numba`, `cpu` and `reference`."""
        return (
            Backend(
                name="numba",
                device_types=("cpu",),
                kernels=_kernels(
                    bisect="diffmax.kernels.numba.rows",
                    attention="diffmax.kernels.numba.attention",
                    attention_kvcache="diffmax.kernels.numba.decoding",
                ),
                priority=60,
                probe="diffmax.kernels.numba.probe:numba_missing",
                unsupported="diffmax.kernels.numba.probe:numba_cannot",
                install_hint='run: pip install "diffmax-core[numba]"',
            ),
            Backend(
                name="cpu",
                device_types=("cpu",),
                kernels=_kernels(
                    bisect="diffmax.kernels.cpu.rows",
                    attention="diffmax.kernels.cpu.attention",
                    attention_kvcache="diffmax.kernels.cpu.decoding",
                ),
            ),
            Backend(
                name="reference",
                device_types=("*",),
                kernels=_kernels(
                    bisect="diffmax.reference",
                    attention="diffmax.reference.attention",
                    attention_kvcache="diffmax.reference.decoding",
                ),
                priority=0,
            ),
        )


plugin = CorePlugin()
