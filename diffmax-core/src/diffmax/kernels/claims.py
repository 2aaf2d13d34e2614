"""Capabilities of the kernels of core's own backends, for their descriptions. It imports none of them."""

from __future__ import annotations

from diffmax.operators.common.numerics import FLOAT_DTYPES
from diffmax.operators.common.spec import SPECS, spec_of
from diffmax.plugin import Kernel

# Listed one by one, as for every backend, so that a new feature is not claimed automatically.
_ALPHA = {"tensor_alpha", "deterministic"}
_SCORES = {"causal", "window", "gqa", "value_dim", "alibi", "softcap", "sink"}
_POWER = {"gqa", "value_dim", "gates", "state", "high_degree", "deterministic"}
_THRESHOLD = (
    _ALPHA
    | {"gqa", "value_dim", "mask", "window", "varlen"}
    | {
        "distance_bias",
        "threshold_softmax",
        "threshold_diffmax",
        "real_power",
    }
)
_CPU = {
    "bisect": _ALPHA,
    "bisect_backward": _ALPHA | {"alpha_gradient"},
    "attention": _ALPHA | _SCORES | {"mask", "bias", "varlen", "dropout", "attention_stats"},
    "attention_backward": _ALPHA | _SCORES | {"mask", "bias", "varlen", "dropout", "alpha_gradient"},
    "attention_kvcache": _ALPHA | _SCORES | {"kv_cache", "paged", "leftpad", "rounded_keys", "attention_stats"},
    "power_attention": _POWER,
    "power_attention_backward": _POWER,
    "threshold_attention": _THRESHOLD,
    "threshold_attention_backward": _THRESHOLD | {"alpha_gradient"},
}


def cpu_kernels(package: str, *, compiled: bool = False) -> dict[str, Kernel]:
    """The kernels of `diffmax.kernels.cpu` or `.numba`, whose modules have the names of the operator folders."""
    found = {}
    for operator, features in _CPU.items():
        module = f"{package}.{spec_of(operator).name}"
        warmup = f"{module}:warmup" if compiled and not operator.endswith("_backward") else None
        found[operator] = Kernel(f"{module}:{operator}", FLOAT_DTYPES, frozenset(features), warmup=warmup)
    return found


def reference_kernels() -> dict[str, Kernel]:
    """The kernels of `diffmax.reference`, which has every operator and every feature."""
    return {
        name: Kernel(f"diffmax.reference.{spec.name}:{name}", FLOAT_DTYPES, kernel.features)
        for spec in SPECS.values()
        for name, kernel in spec.kernels.items()
    }
