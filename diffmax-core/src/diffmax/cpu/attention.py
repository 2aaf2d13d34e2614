"""Attention for CPUs: blocks of queries against the keys that they can see, without the score matrix.

Forward, per block: one product with every key that is seen. Then the candidates are found, the scores above the row's
largest less 1/e (theory, section 5), and the columns that hold one are laid side by side in a narrower matrix. The row
operator's kernel solves its rows, and its weights meet the values of those columns alone. Backward computes the scores of
live tiles alone.

`diffmax.cpu.numba_attention` is the same with the compiled row operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffmax._numerics import accumulation_dtype, alpha_weight, clamp_e, integer_exponent
from diffmax.cpu import rows
from diffmax.cpu.attention_blocks import SPARSE_SHARE, Block, parts
from diffmax.plugin import AttentionCall
from diffmax.reference_attention import Backward, Forward, live_shape

Solve = Callable[[Tensor, "float | Tensor", int, int, bool], tuple[Tensor, Tensor, Tensor]]


def attention(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool, solve: Solve = rows.bisect
) -> Forward:
    """Forward kernel; arguments and results as `diffmax.reference_attention.attention`. `solve` is a row operator's kernel."""
    acc = accumulation_dtype(query.dtype)
    shape = query.shape[:3]
    out = torch.zeros(*shape, value.shape[3], dtype=value.dtype)
    m, delta = torch.full(shape, -torch.inf, dtype=acc), torch.zeros(shape, dtype=acc)
    u = torch.zeros_like(out) if keep else out.new_empty(0)
    live = torch.zeros(live_shape(query, key, call) if keep or stats else (0,), dtype=torch.int32)
    support = torch.zeros(shape if stats else (0,), dtype=torch.int32)
    scratch, work = _Scratch(acc), _Scratch(acc)
    for part in parts(query, key, call):
        keys, values = part.keys_of(key), part.keys_of(value)
        for block in part.blocks(call):
            v = values[:, block.first : block.last]
            q, k = block.rows_of(query).mul_(call.scale), keys[:, block.first : block.last]
            scores = torch.matmul(q, k.mT, out=scratch.of(q.shape[0], q.shape[1], k.shape[1]))
            block.hide(scores, call)
            e = block.e_of(call.e)
            columns = _candidate_columns(scores[0], e, work) if part.heads == 1 else None
            if columns is not None:
                scores, v = scores[:, :, columns], v[:, columns]
            p, row_m, row_delta = _weights(scores, e, solve)
            block.write(out, p @ v)
            block.write(m, row_m)
            block.write(delta, row_delta)
            if keep:
                s = rows._slopes(p.view(row_m.shape[0], -1), e)
                total = s.sum(1, keepdim=True).view(*p.shape[:2], 1)
                block.write(u, (s.view(p.shape) @ v).div_(total.masked_fill_(total == 0, 1.0)))
            if keep or stats:
                block.write_live(live, p, columns)
            if stats:
                block.write(support, _support(scores, row_m, row_delta, e))
    return out, m, delta, u, live, support


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
) -> Backward:
    """Backward kernel; arguments and results as `diffmax.reference_attention.attention_backward`."""
    grad_query, grad_key, grad_value = (torch.zeros(t.shape, dtype=t.dtype) for t in (query, key, value))
    grad_e = torch.zeros(m.shape if needs_e else (0,), dtype=m.dtype)
    scratch = [_Scratch(m.dtype) for _ in range(4)]
    for part in parts(query, key, call):
        keys, values = part.keys_of(key), part.keys_of(value)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block in part.blocks(call):
            columns = block.live_columns(live)
            span = slice(block.first, block.last)
            k, v = (t[:, span] if columns is None else t[:, span][:, columns] for t in (keys, values))
            q, g = block.rows_of(query).mul_(call.scale), block.rows_of(grad)
            scores, d_p, p, s = (memory.of(q.shape[0], q.shape[1], k.shape[1]) for memory in scratch)
            block.hide(torch.matmul(q, k.mT, out=scores), call, columns)
            mean = (g * block.rows_of(u)).sum(2).view(-1, 1)
            centred = torch.matmul(g, v.mT, out=d_p).view(mean.shape[0], -1).sub_(mean)
            p, s = p.view(centred.shape), s.view(centred.shape)
            of_alpha = _weights_again(scores, p, s, block, m, delta, call, needs_e)
            if of_alpha is not None:
                block.write(grad_e, (of_alpha * centred).sum(1, keepdim=True).neg_())
            d_s = s.mul_(centred).view(scores.shape)
            block.write(grad_query, (d_s @ k).mul_(call.scale))
            for total, share in ((grad_keys, d_s.mT @ q), (grad_values, p.view(scores.shape).mT @ g)):
                if columns is None:
                    total[:, span].add_(share)
                else:
                    total[0, span].index_add_(0, columns, share[0])
        part.write_keys(grad_key, grad_keys)
        part.write_keys(grad_value, grad_values)
    return grad_query, grad_key, grad_value, grad_e


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


def _candidate_columns(scores: Tensor, e: float | Tensor, work: _Scratch) -> Tensor | None:
    """The columns with a score above its row's candidates' bound; None where too many are."""
    top = scores.amax(1, keepdim=True)
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


def _weights(scores: Tensor, e: float | Tensor, solve: Solve) -> tuple[Tensor, Tensor, Tensor]:
    """p like the scores, and for every row m and delta, which is NaN where p is."""
    p, m, delta = solve(scores.view(-1, scores.shape[2]), e, 1, 200, True)
    return p.view(scores.shape), m, delta.masked_fill(p[:, :1].isnan(), torch.nan)


def _support(scores: Tensor, m: Tensor, delta: Tensor, e: float | Tensor) -> Tensor:
    z = (scores.view(m.shape[0], -1) - m.masked_fill(m == -torch.inf, 0.0)) * clamp_e(e)
    return (z > delta - 1).sum(1, dtype=torch.int32)


def _weights_again(
    scores: Tensor, p: Tensor, s: Tensor, block: Block, m: Tensor, delta: Tensor, call: AttentionCall, needs_e: bool
) -> Tensor | None:
    """From scores, which are given up, write p and s = p^alpha; return the w of Eq. 6 where it is wanted. All are rows."""
    e, row_m, row_delta = clamp_e(block.e_of(call.e)), block.row_values_of(m), block.row_values_of(delta)
    z = scores.view(row_m.shape[0], -1).sub_(row_m.masked_fill(row_m == -torch.inf, 0.0)).mul_(e)
    k = 0 if isinstance(e, Tensor) else integer_exponent(e)
    if k:
        rows._integer_powers(z, row_delta, k, p, s)
    else:
        rows._powers(z, row_delta, e, p, s)
    bad = row_delta.isnan()
    if bad.any():
        p.masked_fill_(bad, torch.nan)
        s.masked_fill_(bad, torch.nan)
    if not needs_e:
        return None
    live = z > row_delta - 1
    log_p = torch.log1p(torch.where(live, z - row_delta, 0.0)) / e
    return alpha_weight(p.masked_fill(~live, 0.0), log_p, e)
