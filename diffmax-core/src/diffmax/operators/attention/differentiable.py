"""Attention and its gradients from differentiable operators, with all scores and weights in memory.

For what the fused kernels do not have: second derivatives, forward mode, and transforms of torch.ops.diffmax.attention itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.operators.attention.packing import packings
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import AttentionCall
from diffmax.reference import attention as reference


def forward(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, stats: bool, backend: str) -> reference.Forward:
    """What attention returns, without U. `backend` is the row operator's."""
    return reference.attention(query, key, value, call, False, stats, row_operator(backend))


def row_operator(backend: str) -> reference.Solve:
    """The row operator as the reference calls it, differentiable, by the backend."""

    def solve(scores: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
        e, e_tensor = (0.0, e) if isinstance(e, Tensor) else (e, None)
        solved: tuple[Tensor, Tensor, Tensor] = torch.ops.diffmax.bisect(
            scores, e, e_tensor, dim, n_iter, ensure_sum_one, backend
        )
        return solved

    return solve


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    needs_e: bool,
    needs_bias: bool,
    needs_sink: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """What attention_backward returns. `backend` is the row operator's."""
    if call.cu_seqlens_q is not None:
        return _packed(grad, query, key, value, call, needs_e, needs_sink, backend)
    acc, groups, keys = accumulation_dtype(query.dtype), key.shape[1], key.shape[2]
    e_tensor = reference.per_head(call.e) if isinstance(call.e, Tensor) else None
    e = 0.0 if isinstance(call.e, Tensor) else call.e
    capped = reference.capped_scores(query, key, call)
    scores = reference.with_sink(reference.masked_scores(query, key, call, capped), call)
    p, m, delta = torch.ops.diffmax.bisect(scores, e, e_tensor, 3, 200, True, backend)
    g, passed = reference.grouped(grad.to(acc), groups), reference.dropped(capped, call)
    d_p = reference.times((g @ value.to(acc).mT).view(capped.shape), passed)
    d_p = reference.widened(d_p, scores.shape[3])  # the sink has no value
    d_s, grad_e = torch.ops.diffmax.bisect_backward(d_p, p, m, delta, None, e, e_tensor, 3, needs_e, backend)
    nothing = m.new_empty(0)
    grad_sink = d_s[..., keys] if needs_sink else nothing
    p, d_s = p[..., :keys], d_s[..., :keys]
    grad_bias = d_s.sum_to_size(call.bias.shape) if needs_bias and call.bias is not None else nothing
    if call.softcap > 0:
        d_s = d_s * reference.cap_slope(capped, call)
    d_s = reference.grouped(d_s, groups) * call.scale
    return (
        (d_s @ key.to(acc)).view(query.shape).to(query.dtype),
        (d_s.mT @ reference.grouped(query.to(acc), groups)).to(key.dtype),
        (reference.grouped(reference.times(p, passed), groups).mT @ g).to(value.dtype),
        grad_e.squeeze(3) if needs_e else nothing,
        grad_bias,
        grad_sink,
    )


def _packed(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    needs_e: bool,
    needs_sink: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    queries, keys = packings(call)
    rows = query.new_zeros(query.shape[:3], dtype=accumulation_dtype(query.dtype))
    nothing = rows.new_empty(0)
    if not (query.shape[2] and key.shape[2]):
        return (
            *(torch.zeros_like(t) for t in (query, key, value)),
            rows if needs_e else nothing,
            nothing,
            rows if needs_sink else nothing,
        )
    padded = queries.pad(grad), queries.pad(query), keys.pad(key), keys.pad(value)
    alone = reference.alone(call, queries, keys)
    of_query, of_key, of_value, of_e, _, of_sink = backward(*padded, alone, needs_e, False, needs_sink, backend)
    length, many = query.shape[2], key.shape[2]
    return (
        queries.unpad(of_query, length),
        keys.unpad(of_key, many),
        keys.unpad(of_value, many),
        queries.unpad(of_e, length) if needs_e else nothing,
        nothing,
        queries.unpad(of_sink, length) if needs_sink else nothing,
    )
