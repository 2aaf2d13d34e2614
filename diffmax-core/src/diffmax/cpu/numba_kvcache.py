"""`diffmax.cpu.kvcache` with the compiled row operator."""

from __future__ import annotations

from torch import Tensor

from diffmax.cpu import kvcache
from diffmax.cpu.numba_rows import bisect
from diffmax.plugin import KVCacheCall
from diffmax.reference_kvcache import Results


def attention_kvcache(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool) -> Results:
    """Kernel; arguments and results as `diffmax.reference_kvcache.attention_kvcache`."""
    return kvcache.attention_kvcache(query, k_cache, v_cache, call, stats, bisect)
