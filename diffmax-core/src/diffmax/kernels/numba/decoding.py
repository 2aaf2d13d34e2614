"""`diffmax.kernels.cpu.decoding` with the compiled row operator."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.kernels.cpu import decoding
from diffmax.kernels.numba.rows import bisect
from diffmax.plugin import KVCacheCall, KVCacheResults


def attention_kvcache(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool) -> KVCacheResults:
    """Kernel; arguments and results as `diffmax.reference.decoding.attention_kvcache`."""
    return decoding.attention_kvcache(query, k_cache, v_cache, call, stats, bisect)


def warmup(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    e: float | None,
    backward: bool,
    features: frozenset[str],
) -> None:
    """Have the kernels of a dtype compiled, or read from the cache: one serves every call. There is no backward."""
    query, v_cache = (torch.zeros(1, 2, 1, size, dtype=dtype) for size in (head_dim, value_dim))
    lengths = torch.full((1,), 2, dtype=torch.int32)
    attention_kvcache(query, query, v_cache, KVCacheCall(scale=1.0, e=0.5 if e is None else e, cache_seqlens=lengths), False)
