"""`diffmax.cpu.attention` with the compiled row operator."""

from __future__ import annotations

from torch import Tensor

from diffmax.cpu import attention as blocked
from diffmax.cpu.attention import attention_backward
from diffmax.cpu.numba_rows import bisect
from diffmax.plugin import AttentionCall
from diffmax.reference_attention import Forward

__all__ = ["attention", "attention_backward"]


def attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool) -> Forward:
    """Forward kernel; arguments and results as `diffmax.reference_attention.attention`."""
    return blocked.attention(query, key, value, call, keep, stats, bisect)
