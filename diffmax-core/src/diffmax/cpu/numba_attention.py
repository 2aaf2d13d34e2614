"""`diffmax.cpu.attention` with the compiled row operator, weights and dropout."""

from __future__ import annotations

from torch import Tensor

from diffmax._numerics import integer_exponent
from diffmax.cpu import attention as blocked
from diffmax.cpu.compiled import AGAIN_JOB
from diffmax.cpu.numba_dropout import factors
from diffmax.cpu.numba_rows import bisect, run
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
    residuals, needs = (m, delta, u, live), (needs_e, needs_bias, needs_sink)
    return blocked.attention_backward(grad, query, key, value, *residuals, call, *needs, factors=factors, again=weights_again)


def weights_again(
    scores: Tensor, p: Tensor, s: Tensor, m: Tensor, delta: Tensor, e: float | Tensor, needs_e: bool
) -> Tensor | None:
    """Arguments and result as `diffmax.cpu.attention.weights_again`, in one pass over the scores."""
    n_rows, n = scores.shape
    e_rows, e_value = (e.contiguous(), 0.0) if isinstance(e, Tensor) else (None, e)
    integer = 0 if needs_e or e_rows is not None else integer_exponent(e_value, scores.dtype)
    addresses = (*(t.data_ptr() for t in (scores, p, s, m, delta)), 0 if e_rows is None else e_rows.data_ptr())
    run("again", scores.dtype, AGAIN_JOB, n_rows, n, *addresses, 1, n, integer, needs_e, e_value)
    return scores if needs_e else None
