"""`diffmax.cpu.kvcache` with the compiled row operator."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax._example_calls import decoding_example
from diffmax.cpu import kvcache
from diffmax.cpu.numba_rows import bisect
from diffmax.plugin import KVCacheCall
from diffmax.reference_kvcache import Results


def attention_kvcache(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool) -> Results:
    """Kernel; arguments and results as `diffmax.reference_kvcache.attention_kvcache`."""
    return kvcache.attention_kvcache(query, k_cache, v_cache, call, stats, bisect)


def warmup(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    e: float | None,
    backward: bool,
    features: frozenset[str],
) -> None:
    """Have the kernels of a dtype compiled, or read from the cache. There is no backward."""
    attention_kvcache(*decoding_example(device, dtype, head_dim, value_dim, e, features), False)
