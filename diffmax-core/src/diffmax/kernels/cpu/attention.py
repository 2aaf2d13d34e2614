"""Attention for CPUs: blocks of queries against the keys that they can see, without the score matrix.

Forward, per block: one product with every key that is seen. Then the candidates are found, the scores above the row's
largest less 1/e (theory, section 5), and the columns that hold one are laid side by side in a narrower matrix. The row
operator's kernel solves its rows, and its weights meet the values of those columns alone. Backward computes the scores of
live tiles alone.

`diffmax.kernels.numba.attention` is another way, compiled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffmax.kernels.cpu import rows
from diffmax.kernels.cpu.blocks import SPARSE_SHARE, Block, parts
from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.tiles import live_shape
from diffmax.operators.common.numerics import accumulation_dtype, alpha_weight, clamp_e, integer_exponent
from diffmax.plugin import AttentionCall, AttentionGradients, AttentionResults, Saved, Wanted


def weights_again(
    scores: Tensor, p: Tensor, s: Tensor, m: Tensor, delta: Tensor, e: float | Tensor, needs_e: bool
) -> Tensor | None:
    """`_weights_again` of a matrix: m, delta and a tensor e are columns."""
    z = scores.sub_(m.masked_fill(m == -torch.inf, 0.0)).mul_(e)
    k = 0 if isinstance(e, Tensor) else integer_exponent(e, z.dtype)
    if k:
        rows._integer_powers(z, delta, k, p, s)
    else:
        rows._powers(z, delta, e, p, s)
    bad = delta.isnan()
    if bad.any():
        p.masked_fill_(bad, torch.nan)
        s.masked_fill_(bad, torch.nan)
    if not needs_e:
        return None
    live = z > delta - 1
    log_p = torch.log1p(torch.where(live, z - delta, 0.0)) / e
    return alpha_weight(p.masked_fill(~live, 0.0), log_p, e)


@alone_in_child
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    keep: bool,
    stats: bool,
) -> AttentionResults:
    """Forward kernel; arguments and results as `diffmax.reference.attention.attention`."""
    acc = accumulation_dtype(query.dtype)
    shape = query.shape[:3]
    out = torch.zeros(*shape, value.shape[3], dtype=value.dtype)
    m, delta = torch.full(shape, -torch.inf, dtype=acc), torch.zeros(shape, dtype=acc)
    if call.sink is not None:  # all that a query sees for which there is no block
        m.copy_(call.sink.view(-1, 1).expand(shape))
        spoilt = m.isnan() | (m == torch.inf)
        delta.masked_fill_(spoilt, torch.nan)
        out.masked_fill_(spoilt.unsqueeze(3), torch.nan)
    u = torch.zeros_like(out) if keep else out.new_empty(0)
    live = torch.zeros(live_shape(query, key, call) if keep or stats else (0,), dtype=torch.int32)
    support = torch.zeros(shape if stats else (0,), dtype=torch.int32)
    scratch, work, acting = _Scratch(acc), _Scratch(acc), rules.acting(call, sink=False)
    for part in parts(query, key, call):
        keys, values = part.keys_of(key), part.keys_of(value)
        for block in part.blocks(call):
            v = values[:, block.first : block.last]
            q, k = block.rows_of(query).mul_(call.scale), keys[:, block.first : block.last]
            scores = torch.matmul(q, k.mT, out=scratch.of(q.shape[0], q.shape[1], k.shape[1]))
            block.completed(scores, call, acting)
            e, sink = block.e_of(call.e), None if call.sink is None else block.of_heads(call.sink)
            columns = _candidate_columns(scores[0], e, sink, work) if part.heads == 1 else None
            if columns is not None:
                scores, v = scores[:, :, columns], v[:, columns]
            p, row_m, row_delta = _weights(scores, e, sink)
            of_keys = p[..., : scores.shape[2]]
            block.write(m, row_m)
            block.write(delta, row_delta)
            if keep or stats:
                block.write_live(live, of_keys, columns)
            if stats:
                block.write(support, _support(scores, row_m, row_delta, e))
            passed = block.dropped_by(p, call, columns) if call.dropout_p > 0 else None
            if keep:
                s = rows._slopes(p.view(row_m.shape[0], -1), e)
                total = s.sum(1, keepdim=True).view(*p.shape[:2], 1)
                s = (s.view(p.shape) if passed is None else s.view(p.shape).mul_(passed))[..., : scores.shape[2]]
                block.write(u, (s @ v).div_(total.masked_fill_(total == 0, 1.0)))
            if passed is not None:
                p.mul_(passed)
            block.write(out, of_keys @ v)
    return AttentionResults(out, m, delta, u, live, support)


@alone_in_child
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    call: AttentionCall,
    wanted: Wanted,
) -> AttentionGradients:
    """Backward kernel; arguments and results as `diffmax.reference.attention.attention_backward`."""
    m = saved.m
    grad_query, grad_key, grad_value = (torch.zeros(t.shape, dtype=t.dtype) for t in (query, key, value))
    grad_e, grad_sink = (torch.zeros(m.shape if needed else (0,), dtype=m.dtype) for needed in (wanted.e, wanted.sink))
    grad_bias = torch.zeros(call.bias.shape if wanted.bias and call.bias is not None else (0,), dtype=m.dtype)
    scratch = [_Scratch(m.dtype) for _ in range(5)]
    acting, has_slope = rules.acting(call, sink=False), rules.has_slope(call)
    for part in parts(query, key, call):
        keys, values = part.keys_of(key), part.keys_of(value)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block in part.blocks(call):
            columns = block.live_columns(saved.live)
            if columns is not None and len(columns) == 0:
                continue
            span = slice(block.first, block.last)
            k, v = (t[:, span] if columns is None else t[:, span][:, columns] for t in (keys, values))
            q, g = block.rows_of(query).mul_(call.scale), block.rows_of(grad)
            scores, d_p, p, s = (memory.of(q.shape[0], q.shape[1], k.shape[1]) for memory in scratch[:4])
            torch.matmul(q, k.mT, out=scores)
            memory = scratch[4].of(*scores.shape) if has_slope else None
            _, slope = block.completed(scores, call, acting, columns, memory)
            of_alpha = _weights_again(scores, p, s, block, saved, call, wanted.e)
            torch.matmul(g, v.mT, out=d_p)
            if call.dropout_p > 0:
                passed = block.dropped_by(s, call, columns)
                p.mul_(passed)
                d_p.mul_(passed)
            mean = (g * block.rows_of(saved.u)).sum(2, keepdim=True)
            _silence(q, g, s, d_p, mean, slope)
            centred = d_p.sub_(mean)
            of_sink, sinks_share = _sink_again(block, saved, call, mean, wanted.e)
            if of_alpha is not None:
                block.write(grad_e, (of_alpha * centred.view(of_alpha.shape)).sum(1, keepdim=True).neg_().add_(sinks_share))
            if wanted.sink:
                block.write(grad_sink, of_sink)
            d_s = s.mul_(centred)
            if wanted.bias:
                block.add_to_bias(grad_bias, d_s, columns)
            if slope is not None:
                d_s.mul_(slope)
            block.write(grad_query, (d_s @ k).mul_(call.scale))
            for total, share in ((grad_keys, d_s.mT @ q), (grad_values, p.mT @ g)):
                if columns is None:
                    total[:, span].add_(share)
                else:
                    total[0, span].index_add_(0, columns, share[0])
        part.write_keys(grad_key, grad_keys)
        part.write_keys(grad_value, grad_values)
    return AttentionGradients(grad_query, grad_key, grad_value, grad_e, grad_bias, grad_sink)


class _Scratch:
    """Memory that every block uses again: fresh pages cost more than what is computed in them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.memory = torch.empty(0, dtype=dtype)

    def of(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape; the last one is given up."""
        size = math.prod(shape)
        if size > self.memory.numel():
            self.memory = torch.empty(size, dtype=self.memory.dtype)
        return self.memory[:size].view(shape)


def _silence(q: Tensor, g: Tensor, s: Tensor, d_p: Tensor, mean: Tensor, slope: Tensor | None) -> None:
    """Keep what is not finite in a query, or in the gradient for its output, from the keys' gradients if it has no weight."""
    finite = q.isfinite().all(2, keepdim=True) & g.isfinite().all(2, keepdim=True)
    if finite.all():
        return
    silent = ~finite & (s == 0).all(2, keepdim=True)
    for t in (q, g, d_p, mean, *(() if slope is None else (slope,))):
        t.masked_fill_(silent, 0.0)


def _candidate_columns(scores: Tensor, e: float | Tensor, sink: Tensor | None, work: _Scratch) -> Tensor | None:
    """The columns with a score above its row's candidates' bound; None where too many are."""
    top = scores.amax(1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    # a row without a finite largest score has no candidates; but what makes it NaN is NaN here too, and keeps its column
    below = torch.sub(scores, top.masked_fill(~top.isfinite(), torch.inf), out=work.of(*scores.shape))
    reach = -1.0 if isinstance(e, Tensor) else -1 / clamp_e(e)
    if isinstance(e, Tensor):
        below.mul_(clamp_e(e))
    columns = ~(below.amax(0) <= reach)
    count = int(columns.sum())
    if count > SPARSE_SHARE * scores.shape[1]:
        return None
    if count == 0:
        columns[0] = True  # nothing is seen in any row, and the solver says so
    return columns.nonzero().squeeze(1)


def _weights(scores: Tensor, e: float | Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """p in the shape of the scores, followed by the weight of the sink, and per row m and delta, which is NaN where p is."""
    given = scores.view(-1, scores.shape[2])
    p, m, delta = rows.bisect(given if sink is None else rules.with_sink(given, sink), e, 1, 200, True)
    return p.view(*scores.shape[:2], -1), m, delta.masked_fill(p[:, :1].isnan(), torch.nan)


def _sink_again(block: Block, saved: Saved, call: AttentionCall, mean: Tensor, needs_e: bool) -> tuple[Tensor, Tensor]:
    """For every row the sink's gradient, and its share of the gradient for e: it has no value, so its dP is 0."""
    if call.sink is None:
        return mean.new_zeros(()), mean.new_zeros(())
    score = block.of_heads(call.sink).clone()
    p, s = torch.empty_like(score), torch.empty_like(score)
    of_alpha = _weights_again(score, p, s, block, saved, call, needs_e)
    column = mean.view(-1, 1)
    return s.mul_(column).neg_(), s if of_alpha is None else of_alpha * column


def _support(scores: Tensor, m: Tensor, delta: Tensor, e: float | Tensor) -> Tensor:
    z = (scores.view(m.shape[0], -1) - m.masked_fill(m == -torch.inf, 0.0)) * clamp_e(e)
    return (z > delta - 1).sum(1, dtype=torch.int32)


def _weights_again(
    scores: Tensor,
    p: Tensor,
    s: Tensor,
    block: Block,
    saved: Saved,
    call: AttentionCall,
    needs_e: bool,
) -> Tensor | None:
    """From scores, which are given up, write p and s = p^alpha; return the w of Eq. 6 where it is wanted. All are rows."""
    row_m, row_delta = (block.row_values_of(t).contiguous() for t in (saved.m, saved.delta))
    p, s, scores = (t.view(row_m.shape[0], -1) for t in (p, s, scores))
    return weights_again(scores, p, s, row_m, row_delta, clamp_e(block.e_of(call.e)), needs_e)
