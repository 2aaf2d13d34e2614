"""Attention and its gradients as compositions of differentiable operators, with all scores and weights in memory.

It serves what fused kernels lack: second derivatives, forward mode, and transforms of torch.ops.diffmax.attention itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.packing import packings
from diffmax.operators.attention.tiles import widened
from diffmax.plugin import AttentionCall, AttentionGradients, AttentionResults, Wanted
from diffmax.reference import attention as reference


def forward(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, stats: bool, backend: str) -> AttentionResults:
    """The results of attention, without U. `backend` is the backend of the row operator."""
    return reference.attention(query, key, value, call, False, stats, row_operator(backend))


def row_operator(backend: str) -> reference.Solve:
    """The differentiable row operator of the backend, with the signature that the reference calls."""

    def solve(scores: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
        e, e_tensor = (0.0, e) if isinstance(e, Tensor) else (e, None)
        solved: tuple[Tensor, Tensor, Tensor] = torch.ops.diffmax.bisect(
            scores, e, e_tensor, dim, n_iter, ensure_sum_one, backend
        )
        return solved

    return solve


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, wanted: Wanted, backend: str
) -> AttentionGradients:
    """The results of attention_backward. `backend` is the backend of the row operator."""
    if call.cu_seqlens_q is None:
        return _backward(grad, query, key, value, call, wanted, backend, reference.Whole.of(query, key, call))
    queries, keys = packings(call)
    length, many = query.shape[2], key.shape[2]
    if not (length and many):
        m = reference.products(query, key, call.scale).new_zeros(query.shape[:3])
        given = (grad, query, key, value, *(t for t in (call.e, call.bias, call.sink) if isinstance(t, Tensor)))
        # depends on all: a rank without tokens takes part in their backward
        zero = sum((t.flatten()[:0].sum() for t in given), m.new_zeros(()))
        found = reference.nothing_learned(query, key, value, m, wanted)
        return AttentionGradients(*(t + zero.to(t.dtype) for t in found))
    padded = (queries.pad(grad), queries.pad(query), keys.pad(key), keys.pad(value))
    region = reference.Whole.of(*padded[1:3], call, (queries.lengths, keys.lengths))
    found = _backward(*padded, reference.padded_call(call), wanted, backend, region)
    return reference.unpadded(found, queries, keys, length, many, wanted)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    wanted: Wanted,
    backend: str,
    region: rules.Region,
) -> AttentionGradients:
    groups, keys = key.shape[1], key.shape[2]
    e_tensor = reference.per_head(call.e) if isinstance(call.e, Tensor) else None
    e = 0.0 if isinstance(call.e, Tensor) else call.e
    scaled = reference.products(query, key, call.scale)
    scores, slope = rules.apply_with_slope(scaled, call, region)
    acc = scores.dtype
    p, m, delta = torch.ops.diffmax.bisect(scores, e, e_tensor, 3, 200, True, backend)
    g, passed = reference.grouped(grad.to(acc), groups), reference.keep_factors(scaled, call)
    d_p = reference.times((g @ value.to(acc).mT).view(scaled.shape), passed)
    d_p = widened(d_p, scores.shape[3])  # the sink has no value vector
    d_s, grad_e = torch.ops.diffmax.bisect_backward(d_p, p, m, delta, None, e, e_tensor, 3, wanted.e, backend)
    nothing = m.new_empty(0)
    grad_sink = d_s[..., keys] if wanted.sink else nothing
    p, d_s = p[..., :keys], d_s[..., :keys]
    grad_bias = d_s.sum_to_size(call.bias.shape) if wanted.bias and call.bias is not None else nothing
    d_s = reference.grouped(d_s if slope is None else d_s * slope, groups) * call.scale
    return AttentionGradients(
        (d_s @ key.to(acc)).view(query.shape).to(query.dtype),
        (d_s.mT @ reference.grouped(query.to(acc), groups)).to(key.dtype),
        (reference.grouped(reference.times(p, passed), groups).mT @ g).to(value.dtype),
        grad_e.squeeze(3) if wanted.e else nothing,
        grad_bias,
        grad_sink,
    )
