"""Context parallel attention without the blocks of keys that certainly have no weight: Eq. 46 to 49, docs/distributed.md.

Every rank gets the mean and the radius of every block. From them it bounds the threshold of each of its queries from below, and
the scores of each block from above. What it cannot exclude it asks for; that is sent once. The fused attention does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.common import messages
from diffmax.operators.common.numerics import MIN_E, accumulation_dtype

BLOCK = 32  # keys of a block
_ROWS = 256  # queries that are bounded at a time
_STEPS = 8  # of Newton's method: every iterate is a lower bound


class Blocks(NamedTuple):
    """Runs of at most BLOCK consecutive keys, of all ranks: where each is, and what is known of it on every rank.

    Attributes:
        rank, row, size, start: (N,): whose it is, its first token there, how many it has, and the position of the first.
        mean, radius: (B, H_kv, N, D), and (B, H_kv, N): no key of the block is farther from the mean.
    """

    rank: Tensor
    row: Tensor
    size: Tensor
    start: Tensor
    mean: Tensor
    radius: Tensor


class Run(NamedTuple):
    """Consecutive tokens of a rank: the first, the one after the last, and the position of the first."""

    first: int
    last: int
    start: int


class _Pick(torch.autograd.Function):
    """Some rows of a matrix, which may come more than once. Its transpose is `_Lay`."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, rows: Tensor) -> Tensor:
        """Select."""
        ctx.rows, ctx.height = rows, t.shape[0]
        return t[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return _Lay.apply(grad, ctx.rows, ctx.height), None


class _Lay(torch.autograd.Function):
    """Rows, added where they belong, in the accumulation dtype. Its transpose is `_Pick`."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, rows: Tensor, height: int) -> Tensor:
        """Add."""
        ctx.rows = rows
        acc = accumulation_dtype(t.dtype)
        return t.new_zeros(height, t.shape[1], dtype=acc).index_add(0, rows, t.to(acc)).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The transpose."""
        return _Pick.apply(grad, ctx.rows), None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, options: Any, ranks: Any, runs: list[list[Run]], run: Callable[..., Tensor]
) -> Tensor:
    """The rows of this rank's queries.

    Args:
        query, key, value: This rank's.
        options, ranks: As of `context_parallel.attend`.
        runs: Every rank's.
        run: Calls attention with some heads of the options' alpha and sink.
    """
    with torch.no_grad():
        blocks = _summaries(key, ranks, runs)
        own = runs[ranks.rank]
        wanted = [wanted_by(query, blocks, part, options, ranks.rank) for part in own]  # (B, H_kv, N) each
        union = torch.stack(wanted).any(0)
        asked = _requests(union, blocks, ranks)
    pairs = torch.cat([key, value], 3).flatten(0, 2)
    length, (batch, kv_heads) = key.shape[2], key.shape[:2]
    width = pairs.shape[1]
    mine = blocks.rank == ranks.rank
    own_rows, own_sizes = blocks.row[mine], blocks.size[mine]
    rows = [_rows(mask, own_rows, own_sizes, length)[0] for mask in asked]
    found = [_rows(union[:, :, blocks.rank == rank], *_of(blocks, rank), 0) for rank in range(ranks.size)]
    sends, receives = [len(r) * width for r in rows], [len(r[1]) * width for r in found]
    packed = _Pick.apply(pairs, torch.cat(rows)).flatten()
    received = messages.Exchange.apply(packed, ranks.group, sends, receives).view(-1, width)
    head = torch.cat([r[1] for r in found])  # of each received row: its key head of its batch entry, and its block
    block = torch.cat([(blocks.rank == rank).nonzero().flatten()[r[2]] for rank, r in enumerate(found)])

    group = query.shape[1] // kv_heads
    parts = []
    for part, mask in zip(own, wanted, strict=True):
        takes = mask.flatten(0, 1)[head, block]
        seen = key.shape[2] if not options.is_causal else part.last
        of_heads = []
        for b in range(batch):
            for h in range(kv_heads):
                k, v = received[takes & (head == b * kv_heads + h)].split([key.shape[3], value.shape[3]], 1)
                of_heads.append(
                    run(
                        query[b : b + 1, h * group : (h + 1) * group, part.first : part.last],
                        torch.cat([k, key[b, h, :seen]])[None, None],
                        torch.cat([v, value[b, h, :seen]])[None, None],
                        slice(h * group, (h + 1) * group),
                    )
                )
        queries = query[:, :, part.first : part.last]
        if batch:
            parts.append(torch.cat(of_heads, 1).view(*queries.shape[:3], value.shape[3]))
        else:  # empty, and a function of the query
            parts.append(queries @ query.new_zeros(query.shape[3], value.shape[3]))
    return torch.cat(parts, 2)


def _summaries(key: Tensor, ranks: Any, runs: list[list[Run]]) -> Blocks:
    """Of all blocks, in one all-gather; a rank with fewer blocks pads."""
    known = summary(key, runs[ranks.rank])
    most = max(sum(1 for _ in _cut(of_rank)) for of_rank in runs)
    known = torch.nn.functional.pad(known, (0, 0, 0, most - known.shape[2])).contiguous()
    return blocks_of(messages.all_gather(known.flatten(), ranks.group).view(ranks.size, *known.shape), runs)


def summary(key: Tensor, runs: list[Run]) -> Tensor:
    """The mean and the radius of every block of a rank's keys, (B, H_kv, blocks, D + 1)."""
    acc = accumulation_dtype(key.dtype)
    known = [key.new_zeros(*key.shape[:2], 0, key.shape[3] + 1, dtype=acc)]
    for row, size, _ in _cut(runs):
        keys = key[:, :, row : row + size].to(acc)
        mean = keys.mean(2, keepdim=True)
        radius = (keys - mean).norm(dim=3, keepdim=True).amax(2, keepdim=True)
        known.append(torch.cat([mean, radius], 3))
    return torch.cat(known, 2)


def blocks_of(summaries: Tensor, runs: list[list[Run]]) -> Blocks:
    """All ranks' blocks, from each rank's summary, (ranks, B, H_kv, at least its blocks, D + 1)."""
    places = [list(_cut(of_rank)) for of_rank in runs]
    of_all = torch.cat([of_one[:, :, : len(of_rank)] for of_one, of_rank in zip(summaries, places, strict=True)], 2)
    flat = [(rank, *place) for rank, of_rank in enumerate(places) for place in of_rank]
    rank, row, size, start = torch.tensor(flat, dtype=torch.int64, device=of_all.device).reshape(len(flat), 4).unbind(1)
    return Blocks(rank, row, size, start, of_all[..., :-1], of_all[..., -1])


def _cut(runs: list[Run]) -> Iterator[tuple[int, int, int]]:
    for run in runs:
        for row in range(run.first, run.last, BLOCK):
            yield row, min(BLOCK, run.last - row), run.start + row - run.first


def wanted_by(query: Tensor, blocks: Blocks, part: Run, options: Any, rank: int) -> Tensor:
    """Which blocks of other ranks may have a weight for a query of a run, (B, H_kv, N)."""
    acc = accumulation_dtype(query.dtype)
    batch, kv_heads, count, dim = blocks.mean.shape
    group, scale = query.shape[1] // kv_heads, 1 / math.sqrt(dim) if options.scale is None else options.scale
    alpha = torch.as_tensor(options.alpha, dtype=acc, device=query.device).detach()
    e = (1 - alpha).clamp_min(MIN_E)
    e = e.view(kv_heads, group, 1, 1) if e.numel() == query.shape[1] else e.view(1, 1, 1, 1)
    others = blocks.rank != rank
    if options.is_causal:
        others = others & (blocks.start < part.start)
    wanted = torch.zeros(batch, kv_heads, count, dtype=torch.bool, device=query.device)
    if not bool(others.any()):
        return wanted
    eps, sizes = torch.finfo(acc).eps, blocks.size.to(acc)
    reach = (blocks.mean.norm(dim=3) + blocks.radius)[:, :, None, None]
    for first in range(part.first, part.last, _ROWS):
        q = query[:, :, first : min(first + _ROWS, part.last)].to(acc).unflatten(1, (kv_heads, group)) * scale
        length = q.norm(dim=4, keepdim=True)
        middle = q @ blocks.mean.unsqueeze(2).transpose(3, 4)
        slack = 4 * (dim + 4) * eps * length * reach  # the rounding of a score, here and in a kernel
        spread = length * blocks.radius[:, :, None, None] + slack
        high, low = middle + spread, middle - slack
        if options.softcap:
            # the mean of what is capped is not the cap of the mean: the lowest score of the block instead
            high, low = (options.softcap * torch.tanh(t / options.softcap) for t in (high, middle - spread))
        if options.is_causal:
            position = part.start + torch.arange(first, first + q.shape[3], device=query.device) - part.first
            seen = blocks.start + blocks.size <= position[:, None] + 1
            low = low.masked_fill(~seen, -torch.inf)
        tau = _lower_bound(low, sizes, e)
        wanted |= (~(high <= tau)).flatten(2, 3).any(2)
    return wanted & others


def _lower_bound(low: Tensor, sizes: Tensor, e: Tensor) -> Tensor:
    """A number below the threshold of each row, whose blocks have `sizes` scores with means of at least `low` (Eq. 46)."""
    m = low.amax(-1, keepdim=True)
    z = e * (low - torch.where(m == -torch.inf, 0.0, m))
    delta = torch.zeros_like(m)
    for _ in range(_STEPS):
        u = z - delta
        live = u > -1
        p = torch.where(live, torch.exp(torch.log1p(torch.where(live, u, 0.0)) / e) * sizes, 0.0)
        total, slope = p.sum(-1, keepdim=True), torch.where(live, p / torch.where(live, 1 + u, 1.0), 0.0).sum(-1, keepdim=True)
        # a total below 1 is rounding: the iterates rise
        delta = torch.where(total > 1, delta - total * torch.expm1(-e * total.log()) / slope, delta)
    eps = torch.finfo(low.dtype).eps
    tau = m - (1 - delta) / e
    return tau - 64 * eps * (1 / e + m.abs())  # of no visible block: -inf, or NaN, above which is everything


def _requests(union: Tensor, blocks: Blocks, ranks: Any) -> list[Tensor]:
    """Which of this rank's blocks every rank wants, (B, H_kv, n) each."""
    masks = [union[:, :, blocks.rank == rank] for rank in range(ranks.size)]
    own = masks[ranks.rank]
    packed = torch.cat([mask.flatten() for mask in masks]).to(torch.uint8)
    received = messages.all_to_all(packed, ranks.group, [mask.numel() for mask in masks], [own.numel()] * ranks.size)
    return list(received.view(ranks.size, *own.shape).bool())


def _of(blocks: Blocks, rank: int) -> tuple[Tensor, Tensor]:
    own = blocks.rank == rank
    return blocks.row[own], blocks.size[own]


def _rows(mask: Tensor, starts: Tensor, sizes: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the blocks that a mask (B, H_kv, n) chooses, in (B * H_kv * length); of each its head and its block."""
    head, block = mask.flatten(0, 1).nonzero().unbind(1)
    counts = sizes[block]
    total = int(counts.sum())
    head, block, first = (t.repeat_interleave(counts, output_size=total) for t in (head, block, starts[block]))
    begin = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=total)
    return head * length + first + torch.arange(total, device=mask.device) - begin, head, block
