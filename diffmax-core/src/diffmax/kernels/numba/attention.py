"""`diffmax.kernels.cpu.attention` with the compiled row operator, weights and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.kernels.cpu import attention as blocked
from diffmax.kernels.numba.dropout import factors
from diffmax.kernels.numba.jobs import AGAIN_JOB
from diffmax.kernels.numba.rows import bisect, run
from diffmax.operators.common.numerics import integer_exponent
from diffmax.plugin import AttentionCall, AttentionGradients, AttentionResults, Saved, Wanted


def attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool) -> AttentionResults:
    """Forward kernel; arguments and results as `diffmax.reference.attention.attention`."""
    return blocked.attention(query, key, value, call, keep, stats, bisect, factors)


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, call: AttentionCall, wanted: Wanted
) -> AttentionGradients:
    """Backward kernel; arguments and results as `diffmax.reference.attention.attention_backward`."""
    return blocked.attention_backward(grad, query, key, value, saved, call, wanted, factors, weights_again)


def weights_again(
    scores: Tensor, p: Tensor, s: Tensor, m: Tensor, delta: Tensor, e: float | Tensor, needs_e: bool
) -> Tensor | None:
    """Arguments and result as `diffmax.kernels.cpu.attention.weights_again`, in one pass over the scores."""
    n_rows, n = scores.shape
    e_rows, e_value = (e.contiguous(), 0.0) if isinstance(e, Tensor) else (None, e)
    integer = 0 if needs_e or e_rows is not None else integer_exponent(e_value, scores.dtype)
    addresses = (*(t.data_ptr() for t in (scores, p, s, m, delta)), 0 if e_rows is None else e_rows.data_ptr())
    run("again", scores.dtype, AGAIN_JOB, n_rows, n, *addresses, 1, n, integer, needs_e, e_value)
    return scores if needs_e else None


def warmup(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    e: float | None,
    backward: bool,
    features: frozenset[str],
) -> None:
    """Have the kernels of a dtype compiled, or read from the cache: one serves every length, size and feature but dropout."""
    query, value = (torch.zeros(1, 1, 2, size, dtype=dtype) for size in (head_dim, value_dim))
    dropout_p, seed = (0.5, torch.zeros(2, dtype=torch.int64)) if "dropout" in features else (0.0, None)
    call = AttentionCall(scale=1.0, e=0.5 if e is None else e, dropout_p=dropout_p, seed=seed)
    out, *saved, _ = attention(query, query, value, call, backward, False)
    if backward:
        attention_backward(out, query, query, value, Saved(*saved), call, Wanted())
