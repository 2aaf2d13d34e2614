"""Capabilities of the shared Triton kernels, for the descriptions of backends that use them. It imports no Triton."""

from __future__ import annotations

import torch

from diffmax.plugin import Kernel

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
EVERY_FLOAT = (*FLOATS, torch.float64)
MOST_ENTRIES = 256  # largest head dimension of queries, keys and values

ALPHA = frozenset({"tensor_alpha", "deterministic"})
SCORES = frozenset({"causal", "window", "gqa", "value_dim", "alibi", "softcap", "sink"})
BOTH_WAYS = SCORES | {"mask", "bias", "varlen", "dropout"}
POWER = frozenset({"gqa", "value_dim", "gates", "state", "high_degree", "deterministic"})
THRESHOLD = frozenset(
    {"gqa", "value_dim", "mask", "window", "varlen", "deterministic", "distance_bias", "threshold_softmax", "real_power"}
)


def shared_kernels(package: str) -> dict[str, Kernel]:
    """From operator to kernel, for a vendor's package, whose modules are named like the operators."""
    modules = ("rows", "attention", "decoding", "power", "threshold")
    rows, attention, decoding, power, threshold = (f"{package}.{module}" for module in modules)
    kept = ALPHA | BOTH_WAYS
    return {
        "bisect": Kernel(f"{rows}:bisect", EVERY_FLOAT, ALPHA, warmup=f"{rows}:warmup"),
        "bisect_backward": Kernel(f"{rows}:bisect_backward", EVERY_FLOAT, ALPHA | {"alpha_gradient"}),
        "attention": Kernel(
            f"{attention}:attention", FLOATS, kept | {"attention_stats"}, MOST_ENTRIES, warmup=f"{attention}:warmup"
        ),
        "attention_backward": Kernel(f"{attention}:attention_backward", FLOATS, kept | {"alpha_gradient"}, MOST_ENTRIES),
        "attention_kvcache": Kernel(
            f"{decoding}:attention_kvcache",
            FLOATS,
            ALPHA | SCORES | {"kv_cache", "paged", "leftpad", "attention_stats"},
            MOST_ENTRIES,
            warmup=f"{decoding}:warmup",
        ),
        "power_attention": Kernel(f"{power}:power_attention", FLOATS, POWER, MOST_ENTRIES, warmup=f"{power}:warmup"),
        "power_attention_backward": Kernel(f"{power}:power_attention_backward", FLOATS, POWER, MOST_ENTRIES),
        "threshold_attention": Kernel(
            f"{threshold}:threshold_attention", FLOATS, THRESHOLD, MOST_ENTRIES, warmup=f"{threshold}:warmup"
        ),
        "threshold_attention_backward": Kernel(f"{threshold}:threshold_attention_backward", FLOATS, THRESHOLD, MOST_ENTRIES),
    }
