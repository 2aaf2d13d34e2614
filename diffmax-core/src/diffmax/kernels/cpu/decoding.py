"""Decoding for CPUs: one sequence and one key head at a time, with the pages that can matter.

With bounds: an upper bound of every page's scores, the keys of the best pages, the threshold of those alone, which is a lower
bound of tau (docs/decoding.md); then the pages whose bound lies above it, the best first, until none is left. With keys in 4
bits: their scores, the keys that would have a weight by them, and the threshold of those; then every key whose score can lie
above it. Values are read where a weight differs from 0. What the kernels of `diffmax.kernels.numba.decoding` do not take goes
this way with the compiled row operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NoReturn

import torch
from torch import Tensor

from diffmax.kernels.cpu import rows
from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention import scores as rules
from diffmax.operators.common.numerics import accumulation_dtype, clamp_e
from diffmax.plugin import KVCacheCall, KVCacheResults
from diffmax.reference.decoding import LEVELS, capacity
from diffmax.reference.decoding import append as reference_append

Solve = Callable[[Tensor, "float | Tensor", int, int, bool], tuple[Tensor, Tensor, Tensor]]

# Where more than this share of the pages, or of the tokens' values, has to be read, all are, without gathering them.
GATHERED_SHARE = 0.5
# Pages of the first round; every further round may read as many as were read before it.
FIRST_PAGES = 4
# Tokens whose keys or values are converted to the accumulation dtype, or gathered, at once: they stay in a cache.
CHUNK = 2048
# New tokens are copied one slice after the other if these are as many or fewer.
MOST_SLICES = 32


@alone_in_child
def attention_kvcache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool, solve: Solve = rows.bisect
) -> KVCacheResults:
    """Kernel; arguments and results as `diffmax.reference.decoding.attention_kvcache`. `solve` is a row operator's kernel."""
    check_bounds(k_cache, call)
    append(k_cache, v_cache, call)
    acc = accumulation_dtype(query.dtype)
    batch, length, heads, size = query.shape
    kv_heads, value_size = k_cache.shape[2], v_cache.shape[3]
    if 0 in (batch, length, heads, value_size):
        return _nothing(query, kv_heads, value_size, stats)
    group, acting = heads // kv_heads, rules.acting(call, sink=False)
    queries = (query.transpose(1, 2).to(acc) * call.scale).reshape(batch * kv_heads, group * length, size)
    places = product(enumerate(ends(k_cache, call)), range(kv_heads))
    of_heads = [
        _Head(call, k_cache, v_cache, b, g, end, q, length, slice(g * group, (g + 1) * group), solve, acting)
        for ((b, end), g), q in zip(places, queries.unbind(), strict=True)
    ]
    outs, ms, deltas, supports = zip(*[head.attend(stats) for head in of_heads], strict=True)
    out = _joined(outs).view(batch, heads, length, value_size).transpose(1, 2).to(query.dtype).contiguous()
    m, delta = _joined(ms).view(batch, heads, length), _joined(deltas).view(batch, heads, length)
    if not stats:
        return KVCacheResults(out, m, delta, *(torch.empty(0, dtype=torch.int32) for _ in range(2)))
    pages = torch.tensor([head.pages_read for head in of_heads], dtype=torch.int32).view(batch, kv_heads)
    return KVCacheResults(out, m, delta, _joined(supports).view(m.shape), pages)


def append(k_cache: Tensor, v_cache: Tensor, call: KVCacheCall) -> None:
    """As `diffmax.reference.decoding.append`, which spends more on where a few tokens go than it takes to copy them."""
    if call.k is None or call.v is None:
        return
    new, table, size = call.k.shape[1], call.block_table, call.page_size
    pages = 1 if table is None else new // size + 2
    if call.low is not None or len(call.k) * pages > MOST_SLICES:
        reference_append(k_cache, v_cache, call)
        return
    rows = range(len(call.k)) if call.cache_batch_idx is None else call.cache_batch_idx.tolist()
    for b, (row, start, end) in enumerate(zip(rows, call.cache_seqlens.tolist(), ends(k_cache, call), strict=True)):
        at = start = max(start, 0)
        while at < end:
            first, stop = 0, end
            if table is not None:
                first = at // size * size
                row, stop = int(table[b, at // size]), min(end, first + size)
            for cache, tokens in ((k_cache, call.k), (v_cache, call.v)):
                cache[row, at - first : stop - first] = tokens[b, at - start : stop - start]
            at = stop


def refuse_old_bounds(sequence: int) -> NoReturn:
    """Raise since the bounds are not those of the cache."""
    raise ValueError(
        f"diffmax.attention_with_kvcache: page_bounds must be of the cache as it is, but do not know the last key of sequence "
        f"{sequence}\npass them to every call that appends, or make them again with diffmax.page_bounds"
    )


def check_bounds(k_cache: Tensor, call: KVCacheCall) -> None:
    """Refuse bounds that do not hold the last key of a sequence, as after a call that appended it without them."""
    if call.low is None or call.high is None:
        return
    size, paged, acc = call.page_size, call.block_table is not None, accumulation_dtype(k_cache.dtype)
    held = call.cache_seqlens.long()
    known = (held > (0 if call.leftpad is None else call.leftpad)).nonzero().squeeze(1)
    last = held[known] - 1
    if call.block_table is not None:
        row = call.block_table[known, last // size].long()
    else:
        row = known if call.cache_batch_idx is None else call.cache_batch_idx[known].long()
    keys = k_cache[row, last % size if paged else last].to(acc)
    where = (row,) if paged else (row, last // size)
    low, high = call.low[where].to(acc), call.high[where].to(acc)
    wrong = (keys < low) | (keys > high)
    if call.codes is not None:
        codes = call.codes[(*where, slice(None), slice(None), last % size)]
        steps = (high - low) / LEVELS
        stand_for = low + steps * torch.cat([codes & LEVELS, codes >> 4], 2)[..., : keys.shape[2]]
        about = torch.finfo(acc)
        room = 0.51 * steps + 8 * about.eps * (torch.maximum(low.abs(), high.abs()) + about.tiny)
        wrong |= (keys - stand_for).abs() > room
    if wrong.any():
        refuse_old_bounds(int(known[wrong.any(2).any(1)][0]))


def _joined(of_heads: tuple[Tensor, ...]) -> Tensor:
    """One after the other."""
    return of_heads[0] if len(of_heads) == 1 else torch.cat(of_heads)


def _nothing(query: Tensor, kv_heads: int, value_size: int, stats: bool) -> KVCacheResults:
    """The results where there is no query, or no entry of a value."""
    batch, length, heads, _ = query.shape
    m = torch.full((batch, heads, length), -torch.inf, dtype=accumulation_dtype(query.dtype))
    support, pages = (torch.zeros(shape if stats else (0,), dtype=torch.int32) for shape in (m.shape, (batch, kv_heads)))
    return KVCacheResults(query.new_zeros(batch, length, heads, value_size), m, torch.zeros_like(m), support, pages)


def ends(k_cache: Tensor, call: KVCacheCall) -> list[int]:
    """How many tokens each sequence has, the new ones among them."""
    new, room = 0 if call.k is None else call.k.shape[1], capacity(k_cache, call)
    return [min(max(tokens + new, 0), room) for tokens in call.cache_seqlens.tolist()]


@dataclass
class _Head:
    """The queries (R, D), scaled, that share one key head of one sequence, and what they see of the cache."""

    call: KVCacheCall
    k_cache: Tensor
    v_cache: Tensor
    b: int
    g: int
    end: int
    q: Tensor
    length: int
    heads: slice
    solve: Solve
    acting: tuple[rules.Rule, ...]
    pages_read: int = 0

    def __post_init__(self) -> None:
        call, left = self.call, self.call.left
        # what lies before every query's window, or before the sequence, is as if it were not there
        self.first = max(self.end - self.length - left, 0) if left >= 0 else 0
        if call.leftpad is not None:
            self.first = min(max(self.first, int(call.leftpad[self.b])), self.end)
        self.blocks = None if call.block_table is None else call.block_table[self.b, : -(-self.end // call.page_size)].long()
        self.row = self.b if call.cache_batch_idx is None else int(call.cache_batch_idx[self.b])
        self.e: float | Tensor = self.per_row(call.e) if isinstance(call.e, Tensor) else call.e
        self.slopes = None
        if call.alibi is not None:
            self.slopes = self.per_row(call.alibi[self.b if call.alibi.shape[0] > 1 else 0])
        self.sink = None if call.sink is None else self.per_row(call.sink)

    @cached_property
    def place(self) -> Tensor:
        """(R, 1): row r of the queries is query r % length of head r // length."""
        return torch.arange(self.end - self.length, self.end).repeat(self.q.shape[0] // self.length).unsqueeze(1)

    def per_row(self, per_head: Tensor) -> Tensor:
        """Numbers per head, (H,), as (R, 1)."""
        return per_head[self.heads].repeat_interleave(self.length).unsqueeze(1).to(self.q.dtype)

    def attend(self, stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs (R, D_v), m and delta (R, 1), and support sizes (R,), if asked for."""
        chosen = None
        if self.call.low is not None and self.end > self.first:
            chosen = self._pages_that_matter() if self.call.codes is None else self._keys_that_matter()
        if chosen is None:
            tokens = None
            scores = self._after_rules(self._all_scores(), None)
            self.pages_read = -(-self.end // self.call.page_size) - self.first // self.call.page_size
        else:
            tokens, scores = chosen
        p, m, delta = self._weights(scores)
        live = p.nonzero()[:, 1] if p.shape[0] == 1 else (p != 0).any(0).nonzero().squeeze(1)
        if 0 < len(live) == p.shape[1]:  # where one weight of a row is NaN, so are all
            delta.masked_fill_(p[:, :1].isnan(), torch.nan)
        support = m
        if stats:
            z = clamp_e(self.e) * (scores - m.masked_fill(m == -torch.inf, 0.0))
            support = (z > delta - 1).sum(1, dtype=torch.int32)
        return self._weighted(p, live, tokens), m, delta, support

    def _weights(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of keys, and m and delta, with the sink among the scores."""
        if self.sink is None:
            return self.solve(scores, self.e, 1, 200, True)
        p, m, delta = self.solve(rules.with_sink(scores, self.sink), self.e, 1, 200, True)
        return p[:, :-1], m, delta

    # scores

    def _all_scores(self) -> Tensor:
        """(R, end - first), products alone."""
        if self.blocks is None and self.k_cache.dtype == self.q.dtype:
            return self._products(self.k_cache[self.row, self.first : self.end, self.g])
        scores = self.q.new_empty(self.q.shape[0], self.end - self.first)
        for start in range(self.first, self.end, CHUNK):
            stop = min(start + CHUNK, self.end)
            scores[:, start - self.first : stop - self.first] = self._products(self._span(self.k_cache, start, stop))
        return scores

    def _products(self, keys: Tensor) -> Tensor:
        """(R, n); for one query as a matrix times a vector, which reads the keys several times as fast."""
        return torch.mv(keys, self.q[0]).unsqueeze(0) if self.q.shape[0] == 1 else self.q @ keys.mT

    def _span(self, cache: Tensor, start: int, stop: int) -> Tensor:
        """Keys or values of neighbouring tokens, in the accumulation dtype."""
        if self.blocks is None:
            return cache[self.row, start:stop, self.g].to(self.q.dtype)
        size = self.call.page_size
        first = start // size
        held = cache[self.blocks[first : -(-stop // size)], :, self.g].flatten(0, 1)
        return held[start - first * size : stop - first * size].to(self.q.dtype)

    def _at(self, cache: Tensor, tokens: Tensor) -> Tensor:
        """Keys or values of any tokens, in the accumulation dtype."""
        if self.blocks is None:
            return cache[self.row, :, self.g].index_select(0, tokens).to(self.q.dtype)
        size = self.call.page_size
        return cache[self.blocks[tokens // size], tokens % size, self.g].to(self.q.dtype)

    def _after_rules(self, scores: Tensor, tokens: Tensor | None) -> Tensor:
        """Scaled products with these tokens, or with all, after every rule but the sink's, in place."""
        return rules.apply(scores, self.call, _HeadRegion(self, tokens), self.acting)

    # pages

    def _pages_that_matter(self) -> tuple[Tensor, Tensor] | None:
        """The tokens of a superset of the pages that hold a weight, and their scores (R, n); None if it is most pages."""
        size = self.call.page_size
        bound, first = self._page_bounds()
        count = bound.shape[1]
        most = int(GATHERED_SHARE * count)
        unread = torch.ones(count, dtype=torch.bool)
        unread[bound.nan_to_num(nan=torch.inf).topk(min(FIRST_PAGES, count), 1).indices] = False
        order = (~unread).nonzero().squeeze(1)
        tokens, scores = [], []
        while len(order):
            self.pages_read += len(order)
            if self.pages_read > most:
                return None
            unread[order] = False
            these = ((order + first).unsqueeze(1) * size + torch.arange(size)).view(-1)
            these = these[(these >= self.first) & (these < self.end)]
            products = self._products(self._at(self.k_cache, these))
            tokens.append(these)
            scores.append(self._after_rules(products, these))
            alive = (~(bound <= self._threshold(torch.cat(scores, 1)))).any(0) & unread
            order = alive.nonzero().squeeze(1)
            if len(tokens) > 1 and self.pages_read + len(order) > most:
                return None
            if len(order) > self.pages_read:
                best = bound[:, order].amax(0).nan_to_num(nan=torch.inf)
                order = order[best.topk(self.pages_read).indices]
        # in the order of their places, so that the sums do not depend on the rounds
        places, by_place = torch.cat(tokens).sort()
        return places, torch.cat(scores, 1)[:, by_place]

    def _keys_that_matter(self) -> tuple[Tensor, Tensor]:
        """The tokens of a superset of the keys that have a weight, and their scores (R, n)."""
        rated, error = self._rated()
        known = error < torch.inf
        held = rated > self._threshold(rated.masked_fill(~known, -torch.inf))
        columns = (held & known).any(0).nonzero().squeeze(1)
        scores = self._scores_at(columns)
        # NaN is not below
        needed = (~(rated + error <= self._threshold(scores)) & (rated != -torch.inf)).any(0)
        needed[columns] = False
        more = needed.nonzero().squeeze(1)
        if len(more):
            columns, by_place = torch.cat([columns, more]).sort()
            scores = torch.cat([scores, self._scores_at(more)], 1)[:, by_place]
        tokens = columns + self.first
        self.pages_read = len(torch.unique_consecutive(tokens // self.call.page_size))
        return tokens, scores

    def _scores_at(self, columns: Tensor) -> Tensor:
        """Scores (R, n) of the keys that stand `columns` behind the first."""
        tokens = columns + self.first
        return self._after_rules(self._products(self._at(self.k_cache, tokens)), tokens)

    def _rated(self) -> tuple[Tensor, Tensor]:
        """Scores (R, end - first) of the keys in 4 bits, after the rules, and how far they may lie from those of the keys.

        -inf where a query does not see the key. Where the error is infinite, others mean nothing.
        """
        call, size = self.call, self.call.page_size
        first, last = self.first // size, -(-self.end // size)
        low, high, codes = (self._of_pages(t, first, last) for t in (call.low, call.high, call.codes))
        low, high = low.to(self.q.dtype), high.to(self.q.dtype)
        eps, steps = torch.finfo(self.q.dtype).eps, (high - low) / LEVELS
        reach = self.q.abs() @ torch.maximum(low.abs(), high.abs()).mT
        error = self.q.abs() @ steps.mT / 2 + (6 * self.q.shape[1] + 64) * eps * reach
        if self.slopes is not None:  # the subtraction is rounded too
            error += 4 * eps * self.slopes.abs() * (self.end + self.length)
        rated = (self.q @ low.mT).unsqueeze(2).repeat(1, 1, size)  # as if all codes were 0
        at_once = max(1, CHUNK // size)
        for page in range(0, last - first, at_once):
            some = slice(page, page + at_once)
            halves = torch.cat([codes[some] & LEVELS, codes[some] >> 4], 1)[:, : self.q.shape[1]].to(self.q.dtype)
            rated[:, some] += ((self.q * steps[some].unsqueeze(1)) @ halves).transpose(0, 1)
        error = (
            error.masked_fill_(~(4 * reach < torch.inf), torch.inf)
            .nan_to_num_(nan=torch.inf)
            .unsqueeze(2)
            .expand_as(rated)
            .flatten(1)
        )
        span = slice(self.first - first * size, self.end - first * size)
        # what means nothing must not pass for what is hidden
        rated = rated.flatten(1)[:, span].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return self._after_rules(rated, None), error[:, span]

    def _of_pages(self, t: Tensor | None, first: int, last: int) -> Tensor:
        """What is kept of this head's pages."""
        if t is None:
            raise ValueError("attention_kvcache: low, high and codes need each other, got one of them without the others")
        return t[self.row, first:last, self.g] if self.blocks is None else t[self.blocks[first:last], self.g]

    def _threshold(self, scores: Tensor) -> Tensor:
        """(R, 1): a lower bound of tau, the root of these scores alone, with room for rounding."""
        _, m, delta = self._weights(scores)
        e = clamp_e(self.e)
        tau = m - (1 - delta) / e
        return tau - 8 * torch.finfo(m.dtype).eps * (m.abs() + 1 / e)

    def _page_bounds(self) -> tuple[Tensor, int]:
        """An upper bound (R, pages) of the scores of each page, as they are computed; and the first page's number."""
        call, size = self.call, self.call.page_size
        first, last = self.first // size, -(-self.end // size)
        low, high = (self._of_pages(t, first, last).to(self.q.dtype) for t in (call.low, call.high))
        # the largest of q * low and q * high, summed; and how large the terms can be, for the error of such sums
        bound = self.q.clamp_min(0) @ high.mT + self.q.clamp_max(0) @ low.mT
        reach = self.q.abs() @ torch.maximum(low.abs(), high.abs()).mT
        eps = torch.finfo(self.q.dtype).eps
        bound += (2 * self.q.shape[1] + 16) * eps * reach
        begin = torch.arange(first, last) * size
        pages = rules.Pages(begin, begin + size - 1, self.place, self.slopes, eps)
        return rules.bounds(bound, call, pages), first

    # values

    def _weighted(self, p: Tensor, live: Tensor, tokens: Tensor | None) -> Tensor:
        """p @ values, of the live columns alone, those with a weight, where they are few."""
        if tokens is not None or len(live) <= GATHERED_SHARE * p.shape[1]:
            tokens = (live + self.first if self.first else live) if tokens is None else tokens[live]
            return self._chunks(p.index_select(1, live), lambda start, stop: self._at(self.v_cache, tokens[start:stop]))
        if self.blocks is None and self.v_cache.dtype == p.dtype:
            return p @ self.v_cache[self.row, self.first : self.end, self.g]
        return self._chunks(p, lambda start, stop: self._span(self.v_cache, self.first + start, self.first + stop))

    def _chunks(self, p: Tensor, values: Callable[[int, int], Tensor]) -> Tensor:
        if p.shape[1] <= CHUNK:
            return p @ values(0, p.shape[1])
        out = p.new_zeros(p.shape[0], self.v_cache.shape[3])
        for start in range(0, p.shape[1], CHUNK):
            stop = min(start + CHUNK, p.shape[1])
            out.addmm_(p[:, start:stop], values(start, stop))
        return out


class _HeadRegion(rules.Region):
    """Scores (R, n) of the queries that share a key head, with all keys that they see or with some."""

    in_place = True

    def __init__(self, head: _Head, tokens: Tensor | None) -> None:
        self.head, self.tokens = head, tokens

    def queries(self) -> Tensor:
        """(R, 1)."""
        return self.head.place

    def keys(self) -> Tensor:
        """(n,)."""
        return torch.arange(self.head.first, self.head.end) if self.tokens is None else self.tokens

    def of_heads(self, t: Tensor) -> Tensor:
        """(R, 1)."""
        return self.head.per_row(t if t.ndim == 1 else t[self.head.b if t.shape[0] > 1 else 0])

    def of_sequences(self, t: Tensor) -> Tensor:
        """(1, 1)."""
        return t[self.head.b].view(1, 1)

    def edge(self, call: rules.Call, side: str) -> slice | None:
        """One query stands at the last key: the window hides nothing behind it, and what lies before it is left out."""
        return None if self.head.length == 1 and (side == "right" or self.tokens is None) else rules.ALL
