"""Decoding over a cache of which every rank has some tokens: candidates are exchanged, not scores. docs/distributed.md.

The root of some of a row's scores lies below the root of all of them. So the largest of the ranks' own thresholds is a lower
bound of tau, and only scores above it can have a weight: they are gathered, or summed where they are many. Plain PyTorch on any
device, as `diffmax.reference`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from diffmax import reference
from diffmax.operators.attention import scores as rules
from diffmax.operators.common import messages
from diffmax.operators.common.numerics import accumulation_dtype, clamp_e, newton_steps
from diffmax.operators.rows import sharded as sharded_rows
from diffmax.plugin import KVCacheCall
from diffmax.reference.decoding import append, lengths

NAME = "diffmax.distributed.attention_with_kvcache_sharded"

# Candidates of a row that are gathered from all ranks together; of more, sums are exchanged.
GATHERED = 4096
# Pages of the first round, which bounds the threshold.
FIRST_PAGES = 4


def attend(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, owner: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """out (B, L, H, D_v) in query's dtype and tau (B, H, L), the same on every rank. The ranks have agreed on the call."""
    acc = accumulation_dtype(query.dtype)
    batch, length, heads, _ = query.shape
    own = lengths(k_cache, call).long()
    of_ranks = messages.all_gather(own, group).view(group.size(), batch)
    if call.left >= 0 or call.alibi is not None or (call.right >= 0 and length > 1):
        _check_order(of_ranks, owner)
    append(k_cache, v_cache, call)
    first = of_ranks[group.rank() :].sum(0) - length  # of each sequence's queries, counted from this rank's first token
    e: float | Tensor = call.e.view(-1, 1, 1) if isinstance(call.e, Tensor) else call.e
    parts = [_Part(query[b].to(acc), k_cache, call, b, int(own[b]), int(first[b]), e) for b in range(batch)]
    floor = torch.stack([part.floor() for part in parts]) if parts else query.new_empty(0, heads, length, 1, dtype=acc)
    floor = messages.all_reduce(floor, "max", group)
    found = [part.candidates(below) for part, below in zip(parts, floor, strict=True)]
    width = max((scores.shape[2] for scores, _ in found), default=0)
    scores = floor.new_full((batch, heads, length, width), -torch.inf)
    for row, (some, _) in zip(scores, found, strict=True):
        row[..., : some.shape[2]] = some
    p, m, delta = _weights(scores, e, call, group)
    out = scores.new_zeros(batch, heads, length, v_cache.shape[3])
    for b, (_, tokens) in enumerate(found):
        live = (p[b, ..., : len(tokens)] != 0).flatten(0, 1).any(0).nonzero().squeeze(1)
        values = _at(v_cache, call, b, tokens[live]).to(acc).transpose(0, 1)
        kv_heads = values.shape[0]
        grouped = p[b].index_select(2, live).reshape(kv_heads, heads // max(kv_heads, 1) * length, len(live))
        out[b] = (grouped @ values).view(heads, length, values.shape[2])
    out = messages.all_reduce(out, "sum", group)
    wrong = sharded_rows.invalid(m, e) | m.isnan()
    out = out.masked_fill(wrong, torch.nan).transpose(1, 2).to(query.dtype).contiguous()
    tau = (m - (1 - delta) / clamp_e(e)).masked_fill(wrong, torch.nan).squeeze(3)
    return out, tau


def _check_order(of_ranks: Tensor, owner: int) -> None:
    """Where positions count, new tokens are the last ones."""
    later = [rank for rank in range(owner + 1, len(of_ranks)) if bool(of_ranks[rank].any())]
    if owner >= 0 and later:
        raise ValueError(
            f"{NAME}: with a window, ALiBi, or causality within new tokens, positions follow the ranks, and the owner of new "
            f"tokens must be the last rank that holds any, got owner={owner} and tokens on rank {later[-1]}\n"
            f"pass owner={later[-1]}"
        )


def _weights(scores: Tensor, e: float | Tensor, call: KVCacheCall, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of this rank's candidates, and m and delta of the whole rows (B, H, L, 1); the sink has no column."""
    batch, heads, length, width = scores.shape
    sink = None if call.sink is None else call.sink.view(-1, 1, 1)
    # candidates of a row stand among those of other rows of its sequence: counted, and sorted to the front
    count = (scores != -torch.inf).sum(3).amax() if scores.numel() else torch.zeros((), dtype=torch.long, device=scores.device)
    most = int(messages.all_reduce(count.view(1), "max", group))
    size, rank = group.size(), group.rank()
    if most * size > GATHERED:
        steps = newton_steps(200, most * size, e if not isinstance(e, Tensor) else 1.0, scores.dtype)
        own = scores
        if sink is not None:
            own = rules.with_sink(scores, sink if rank == 0 else torch.full_like(sink, -torch.inf))
        p, m, delta, total = sharded_rows.solve(own, e, 3, steps, str(group.group_name))
        return p[..., :width] / torch.where(total > 0, total, 1.0), m, delta
    front = scores.new_full((batch, heads, length, most), -torch.inf)
    kept = min(most, width)
    # NaN counts as the largest
    front[..., :kept], columns = scores.topk(kept, 3)
    if most == 0 and sink is None:
        nothing = scores.new_full((batch, heads, length, 1), -torch.inf)
        return front, nothing, torch.zeros_like(nothing)
    gathered = messages.all_gather(front.flatten(), group).view(size, batch, heads, length, most)
    row = gathered.movedim(0, 3).flatten(3)
    p, m, delta = reference.bisect(row if sink is None else rules.with_sink(row, sink), e, 3, 200, True)
    own = p[..., rank * most : rank * most + kept]
    return torch.zeros_like(scores).scatter_(3, columns, own), m, delta


class _Part:
    """The queries of one sequence (L, H, D), and this rank's `end` tokens of it; query i stands at the token `first` + i."""

    def __init__(
        self, query: Tensor, k_cache: Tensor, call: KVCacheCall, b: int, end: int, first: int, e: float | Tensor
    ) -> None:
        self.k_cache, self.call, self.b, self.end, self.e = k_cache, call, b, end, e
        self.length, self.heads, size = query.shape
        self.kv_heads = k_cache.shape[2]
        sharing = self.heads // max(self.kv_heads, 1) * self.length
        self.query = query.transpose(0, 1).reshape(self.kv_heads, sharing, size) * call.scale
        self.region = _PartRegion(b, end, first, self.length, query.device)
        self.pages = -(-end // max(call.page_size, 1))
        self.tokens = torch.arange(0, device=query.device)
        self.scores = query.new_empty(self.heads, self.length, 0)
        self.bound = self._bounds() if call.low is not None and end else None

    def floor(self) -> Tensor:
        """(H, L, 1): the root of some of this rank's scores, which lies below tau, with room for rounding."""
        if self.bound is None:
            self._read(torch.arange(self.pages, device=self.query.device))
        else:
            best = self.bound.nan_to_num(nan=torch.inf).flatten(0, 1).amax(0)
            self._read(best.topk(min(FIRST_PAGES, self.pages)).indices.sort().values)
        scores = self.scores if self.call.sink is None else rules.with_sink(self.scores, self.call.sink.view(-1, 1, 1))
        if not scores.shape[2]:
            return scores.new_full((self.heads, self.length, 1), -torch.inf)
        _, m, delta = reference.bisect(scores, self.e, 2, 200, True)
        e = clamp_e(self.e)
        tau = m - (1 - delta) / e - 8 * torch.finfo(m.dtype).eps * (m.abs() + 1 / e)
        return tau.nan_to_num(
            nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf
        )  # such rows are looked at whole, and become NaN

    def candidates(self, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (H, L, n), -inf where they are not above `floor`, and the tokens (n,) of the columns."""
        if self.bound is not None:
            live = (~(self.bound <= floor)).flatten(0, 1).any(0)
            live[self.tokens // self.call.page_size] = False
            self._read(live.nonzero().squeeze(1))
        above = ~(self.scores <= floor)
        some = above.flatten(0, 1).any(0).nonzero().squeeze(1)
        scores = self.scores.masked_fill(~above, -torch.inf).index_select(2, some)
        return scores, self.tokens[some]

    def _read(self, pages: Tensor) -> None:
        """Add the scores of the tokens of some pages."""
        size = self.call.page_size
        tokens = (pages.unsqueeze(1) * size + torch.arange(size, device=pages.device)).flatten()
        tokens = tokens[tokens < self.end]
        keys = _at(self.k_cache, self.call, self.b, tokens).to(self.query.dtype)
        scores = (self.query @ keys.permute(1, 2, 0)).view(self.heads, self.length, len(tokens))
        self.region.tokens = tokens
        scores = rules.apply(scores, self.call, self.region, rules.acting(self.call, sink=False))
        self.tokens, self.scores = torch.cat([self.tokens, tokens]), torch.cat([self.scores, scores], 2)

    def _bounds(self) -> Tensor:
        """(H, L, pages): no score of a page is larger, as it is computed."""
        call, q = self.call, self.query
        if call.low is None or call.high is None:
            raise ValueError(f"{NAME}: low and high are given together or not at all, got one of them")
        low, high = (_page_rows(t, call, self.b, self.pages).to(q.dtype).transpose(0, 1) for t in (call.low, call.high))
        bound = q.clamp_min(0) @ high.mT + q.clamp_max(0) @ low.mT
        eps = torch.finfo(q.dtype).eps
        bound += (2 * q.shape[2] + 16) * eps * (q.abs() @ torch.maximum(low.abs(), high.abs()).mT)
        begin = torch.arange(self.pages, device=q.device) * call.page_size
        slopes = None if call.alibi is None else self.region.of_heads(call.alibi).to(q.dtype)
        pages = rules.Pages(begin, begin + call.page_size - 1, self.region.queries(), slopes, eps)
        return rules.bounds(bound.view(self.heads, self.length, self.pages), call, pages)


class _PartRegion(rules.Region):
    """Scores (H, L, n) of one sequence with some tokens of one rank, whose positions count from its first."""

    def __init__(self, b: int, end: int, first: int, length: int, device: torch.device) -> None:
        self.b, self.end = b, end
        self.places = (first + torch.arange(length, device=device)).unsqueeze(1)
        self.tokens = torch.arange(0, device=device)

    def queries(self) -> Tensor:
        """(L, 1)."""
        return self.places

    def keys(self) -> Tensor:
        """(n,)."""
        return self.tokens

    def of_heads(self, t: Tensor) -> Tensor:
        """(H, 1, 1)."""
        return (t if t.ndim == 1 else t[self.b if t.shape[0] > 1 else 0]).view(-1, 1, 1)


def _page_rows(bounds: Tensor, call: KVCacheCall, b: int, pages: int) -> Tensor:
    """Bounds of a sequence's pages, (pages, H_kv, D)."""
    if call.block_table is not None:
        return bounds[call.block_table[b, :pages].long()]
    return bounds[b if call.cache_batch_idx is None else int(call.cache_batch_idx[b]), :pages]


def _at(cache: Tensor, call: KVCacheCall, b: int, tokens: Tensor) -> Tensor:
    """Keys or values of some tokens of a sequence, (n, H_kv, D)."""
    if call.block_table is not None:
        return cache[call.block_table[b].long()[tokens // call.page_size], tokens % call.page_size]
    return cache[b if call.cache_batch_idx is None else int(call.cache_batch_idx[b]), tokens]
