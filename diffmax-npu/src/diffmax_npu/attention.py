"""Attention from operators that torch_npu runs on the device: blocks of queries, and no tensor of the score matrix's size.

The scores of a block are one product with all keys that it sees; the row operator's solver normalizes its rows. Backward
recomputes the scores. Packed sequences are padded to the longest, because reading their lengths would synchronize.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from diffmax.kernels.tools import (
    Packing,
    alpha_weight,
    clamp_e,
    integer_exponent,
    live_shape,
    packed_bits,
    packings,
    padded_call,
    padded_saved,
    tiles_with,
    times,
    unpadded,
)
from diffmax.plugin import AttentionCall, AttentionGradients, AttentionResults, Saved, Wanted
from diffmax_npu.blocks import Block, blocks, by_groups
from diffmax_npu.scores import Scores
from diffmax_npu.solver import logarithms, powers, solve

Lengths: TypeAlias = "tuple[Tensor, Tensor] | None"


def attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool) -> AttentionResults:
    """Forward kernel; arguments and results as `diffmax.reference.attention.attention`, but for float64."""
    if call.cu_seqlens_q is None:
        return _forward(query, key, value, call, keep, stats, None)
    queries, keys = packings(call)
    padded = (queries.pad(query), keys.pad(key), keys.pad(value))
    out, m, delta, u, live, support = _forward(*padded, padded_call(call), keep, stats, _lengths(queries, keys))
    total = query.shape[2]
    return AttentionResults(
        queries.unpad(out, total),
        queries.unpad(m, total).masked_fill(~queries.inside(total), -torch.inf),
        queries.unpad(delta, total),
        queries.unpad(u, total) if keep else u,
        queries.unpad_tiles(live, total) if keep or stats else live,
        queries.unpad(support, total) if stats else support,
    )


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, call: AttentionCall, wanted: Wanted
) -> AttentionGradients:
    """Backward kernel; arguments and results as `diffmax.reference.attention.attention_backward`."""
    if call.cu_seqlens_q is None:
        return _backward(grad, query, key, value, saved, call, wanted, None)
    queries, keys = packings(call)
    padded = (queries.pad(grad), queries.pad(query), keys.pad(key), keys.pad(value))
    found = _backward(*padded, padded_saved(saved, queries), padded_call(call), wanted, _lengths(queries, keys))
    return unpadded(found, queries, keys, query.shape[2], key.shape[2], wanted)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool, lengths: Lengths
) -> AttentionResults:
    # the results of fully masked queries are written first
    out = value.new_zeros((*query.shape[:3], value.shape[3]))
    m = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
    if call.sink is not None:
        m.copy_(call.sink.view(-1, 1))
    delta = torch.zeros_like(m)
    u = torch.zeros_like(out) if keep else out.new_empty(0)
    support = torch.zeros(m.shape if stats else (0,), dtype=torch.int32, device=m.device)
    words = live_shape(query, key, call)
    touched = torch.zeros((*words[:3], words[3] * 32) if keep or stats else (0, 0), dtype=torch.bool, device=m.device)

    kv_heads = max(key.shape[1], 1)
    results = [by_groups(t, kv_heads) if t.ndim > 1 else t for t in (out, m, delta, u, touched, support)]
    scores = Scores(by_groups(query, kv_heads), key, call, lengths)
    for block in blocks(query, key, call, lengths is not None):
        _forward_block(block, scores, value, results, keep, stats)
    live = packed_bits(touched) if keep or stats else support.new_empty(0)
    return AttentionResults(out, m, delta, u, live, support)


def _forward_block(block: Block, scores: Scores, value: Tensor, results: list[Tensor], keep: bool, stats: bool) -> None:
    out, m, delta, u, touched, support = results
    e, keys = scores.e_of(block), block.keys.stop - block.keys.start
    solved = solve(scores.of(block), e, 200, True, True)
    p, passed, v = solved.p[..., :keys], scores.passed(block), block.of_keys(value).to(torch.float32)
    block.of_queries(out).copy_(_weighted(times(p, passed), v))
    block.of_queries(m).copy_(solved.m.squeeze(4))
    block.of_queries(delta).copy_(solved.delta.squeeze(4))
    if keep:
        total = solved.slopes.sum(4, keepdim=True)
        total = total.masked_fill_(total == 0, 1.0).masked_fill_(solved.delta.isnan(), torch.nan)
        block.of_queries(u).copy_(_weighted(times(solved.slopes[..., :keys], passed), v).div_(total))
    if keep or stats:
        block.of_tiles(touched).copy_(tiles_with(p != 0))
    if stats:
        block.of_queries(support).copy_((solved.z[..., :keys] > solved.delta - 1).sum(4, dtype=torch.int32))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    call: AttentionCall,
    wanted: Wanted,
    lengths: Lengths,
) -> AttentionGradients:
    m, device = saved.m, query.device
    grad_query = torch.zeros(query.shape, dtype=query.dtype, device=device)
    grad_key, grad_value = (torch.zeros(t.shape, dtype=torch.float32, device=device) for t in (key, value))
    grad_e, grad_sink = (torch.zeros(m.shape if needed else (0,), device=device) for needed in (wanted.e, wanted.sink))
    grad_bias = torch.zeros(call.bias.shape if wanted.bias and call.bias is not None else (0,), device=device)

    kv_heads = max(key.shape[1], 1)
    given = [by_groups(t, kv_heads) for t in (grad, m, saved.delta, saved.u)]
    results = [by_groups(t, kv_heads) if t.ndim > 1 else t for t in (grad_query, grad_e, grad_bias, grad_sink)]
    scores = Scores(by_groups(query, kv_heads), key, call, lengths)
    for block in blocks(query, key, call, lengths is not None):
        _backward_block(block, scores, value, given, [*results, grad_key, grad_value], wanted)
    return AttentionGradients(grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_e, grad_bias, grad_sink)


def _backward_block(
    block: Block, scores: Scores, value: Tensor, given: list[Tensor], results: list[Tensor], wanted: Wanted
) -> None:
    """Eq. 5 for one block: write the gradients for its queries, accumulate those for its keys and the bias."""
    grad, m, delta, u = (block.of_queries(t).to(torch.float32) for t in given)
    grad_query, grad_e, grad_bias, grad_sink, grad_key, grad_value = results
    call, e, keys = scores.call, scores.e_of(block), block.keys.stop - block.keys.start
    m, delta = m.unsqueeze(4), delta.unsqueeze(4)
    complete, slope = scores.with_slope(block)
    row_e, k = clamp_e(e), 0 if isinstance(e, Tensor) else integer_exponent(e, torch.float32)
    z = complete.sub_(m.masked_fill(m == -torch.inf, 0.0)).mul_(row_e)
    p, s = powers(z, delta, row_e, k, torch.empty_like(z), torch.empty_like(z))

    # A query whose result is NaN has a NaN gradient, whatever the hardware's maximum does with NaN; a query whose weights are
    # all 0 propagates no gradient, even if it holds NaN.
    bad = delta.isnan()
    silent = (s[..., :keys].amax(4, keepdim=True) == 0) & ~bad
    grad = grad.masked_fill(bad, torch.nan).masked_fill(silent, 0.0)
    mean = (grad * u).sum(4, keepdim=True)
    v, passed = block.of_keys(value).to(torch.float32), scores.passed(block)
    centred = times(_weighted(grad, v.mT), passed) - mean
    if wanted.e:
        logs = logarithms(z, delta, row_e)
        of_e = (alpha_weight(p[..., :keys], logs[..., :keys], row_e) * centred).sum(4)
        if call.sink is not None:  # the sink has no value: its dP is 0
            of_e = of_e - (alpha_weight(p[..., keys:], logs[..., keys:], row_e) * mean).sum(4)
        block.of_queries(grad_e).copy_(of_e.neg_())
    if wanted.sink:
        block.of_queries(grad_sink).copy_((s[..., keys:] * mean).neg_().squeeze(4))
    d_s = s[..., :keys] * centred
    if wanted.bias:
        part = block.of_scores(grad_bias)
        part.add_(d_s.sum_to_size(part.shape))
    if slope is not None:
        d_s = d_s.mul_(slope).masked_fill_(silent, 0.0)

    d_s, weights = d_s.flatten(2, 3), times(p[..., :keys], passed).flatten(2, 3)
    query = block.of_queries(scores.query).to(torch.float32).masked_fill(silent, 0.0).flatten(2, 3).mul_(call.scale)
    products = torch.matmul(d_s, block.of_keys(scores.key).to(torch.float32)).mul_(call.scale)
    block.of_queries(grad_query).copy_(products.view(*grad.shape[:4], products.shape[3]))
    block.of_keys(grad_key).add_(torch.matmul(d_s.mT, query))
    block.of_keys(grad_value).add_(torch.matmul(weights.mT, grad.flatten(2, 3)))


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """(batch, key heads, query heads, queries, keys) times (batch, key heads, keys, n)."""
    return torch.matmul(weights.flatten(2, 3), value).view(*weights.shape[:4], value.shape[-1])


def _lengths(queries: Packing, keys: Packing) -> tuple[Tensor, Tensor]:
    return queries.lengths.view(-1, 1, 1, 1, 1), keys.lengths.view(-1, 1, 1, 1, 1)
