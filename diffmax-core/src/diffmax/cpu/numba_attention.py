"""`diffmax.cpu.attention` with the compiled row operator and the compiled dropout."""

from __future__ import annotations

from torch import Tensor

from diffmax.cpu import attention as blocked
from diffmax.cpu.numba_dropout import factors
from diffmax.cpu.numba_rows import bisect
from diffmax.plugin import AttentionCall
from diffmax.reference_attention import Backward, Forward


def attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool) -> Forward:
    """Forward kernel; arguments and results as `diffmax.reference_attention.attention`."""
    return blocked.attention(query, key, value, call, keep, stats, bisect, factors)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    m: Tensor,
    delta: Tensor,
    u: Tensor,
    live: Tensor,
    call: AttentionCall,
    needs_e: bool,
    needs_bias: bool = False,
    needs_sink: bool = False,
) -> Backward:
    """Backward kernel; arguments and results as `diffmax.reference_attention.attention_backward`."""
    residuals = (m, delta, u, live)
    return blocked.attention_backward(grad, query, key, value, *residuals, call, needs_e, needs_bias, needs_sink, factors)
