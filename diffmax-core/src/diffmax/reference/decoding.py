"""Decoding over a cache in plain PyTorch: the reference for all other kernels, and the fallback on any device.

It reads the whole cache, even for short sequences, and never waits for a device. See docs/decoding.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax import reference
from diffmax.operators.attention import scores as rules
from diffmax.operators.common.numerics import accumulation_dtype, clamp_e
from diffmax.plugin import KVCacheCall, KVCacheResults
from diffmax.reference.attention import Solve

# The largest code of a key in 4 bits.
LEVELS = 15
# Entries of keys that are rounded at once.
ROUNDED = 1 << 20


def attention_kvcache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool, solve: Solve = reference.bisect
) -> KVCacheResults:
    """Kernel for one call: append, then attend.

    Args:
        query: (B, L, H, D), any strides; L may be 0.
        k_cache, v_cache: (B_cache, S, H_kv, D) and (B_cache, S, H_kv, D_v); with `call.block_table` (num_blocks, page_size,
            H_kv, D) and (num_blocks, page_size, H_kv, D_v). Any strides. Query head h reads key head h // (H / H_kv). Entries
            after the end of a sequence may hold anything, including NaN.
        call: All other arguments.
        stats: Whether to return support sizes and page counts.
        solve: The row operator.
    Returns:
        Contiguous tensors:

        - out (B, L, H, D_v), in query's dtype. Fully masked queries are 0.
        - m, delta (B, H, L), in the accumulation dtype, as in `diffmax.reference.attention.attention`.
        - support, int32 (B, H, L), the number of scores above tau, without the sink; (0,) if not `stats`.
        - pages, int32 (B, H_kv), the number of key pages read; (0,) if not `stats`.
    """
    append(k_cache, v_cache, call)
    keys, values = (pages_of(cache, call) for cache in (k_cache, v_cache))
    acc, tokens = accumulation_dtype(query.dtype), keys.shape[1]
    batch, length, heads, _ = query.shape
    region = CacheRegion(lengths(k_cache, call), length, tokens)
    scores = _grouped(query.to(acc), keys.shape[2]) @ keys.to(acc).permute(0, 2, 3, 1) * call.scale
    scores = rules.apply(scores.reshape(batch, heads, length, tokens), call, region)
    e: float | Tensor = call.e.view(-1, 1, 1) if isinstance(call.e, Tensor) else call.e
    p, m, delta = solve(scores, e, 3, 200, True)
    m, delta = m.squeeze(3), delta.squeeze(3)
    row_e = e.squeeze(2) if isinstance(e, Tensor) else torch.full((), e, dtype=acc, device=m.device)
    delta = delta.masked_fill(m.isnan() | (m == torch.inf) | ~((row_e >= 0) & (row_e <= 1)), torch.nan)
    p = p[..., :tokens]
    seen = (scores[..., :tokens] != -torch.inf).any(1).any(1)  # entries that no query sees may hold anything
    values = torch.where(seen[..., None, None], values, 0).to(acc).transpose(1, 2)
    groups = p.reshape(batch, keys.shape[2], heads // max(keys.shape[2], 1) * length, tokens)
    out = (groups @ values).view(batch, heads, length, values.shape[3]).transpose(1, 2).to(query.dtype).contiguous()
    support, pages = (torch.empty(0, dtype=torch.int32, device=query.device) for _ in range(2))
    if stats:
        shift = torch.where(m == -torch.inf, 0.0, m)
        above = clamp_e(e) * (scores - shift.unsqueeze(3)) > delta.unsqueeze(3) - 1
        support = above[..., :tokens].sum(3, dtype=torch.int32)
        pages = -(-tokens // call.page_size) + torch.zeros_like(m[:, :1, 0], dtype=torch.int32)
        pages = pages.expand(batch, keys.shape[2]).contiguous() if length else m.new_zeros(batch, keys.shape[2]).int()
    return KVCacheResults(out, m.contiguous(), delta.contiguous(), support, pages)


class CacheRegion(rules.Region):
    """All scores of a call, (B, H, L, tokens): the last query of each sequence has the position of its last key."""

    def __init__(self, ends: Tensor, length: int, tokens: int) -> None:
        self.ends, self.length, self.tokens = ends, length, tokens

    def queries(self) -> Tensor:
        """(B, 1, L, 1)."""
        positions = torch.arange(self.length, device=self.ends.device).unsqueeze(1)
        return (self.ends.view(-1, 1, 1) - self.length + positions).unsqueeze(1)

    def keys(self) -> Tensor:
        """(tokens,)."""
        return torch.arange(self.tokens, device=self.ends.device)

    def of_heads(self, t: Tensor) -> Tensor:
        """(1 or B, H, 1, 1)."""
        return (t if t.ndim == 2 else t.unsqueeze(0))[..., None, None]

    def padding(self) -> tuple[Tensor, ...]:
        """The entries after the end of each sequence, which may hold anything."""
        return (self.keys() >= self.ends.view(-1, 1, 1, 1),)


def capacity(k_cache: Tensor, call: KVCacheCall) -> int:
    """The capacity of the cache: the maximum number of tokens per sequence."""
    return k_cache.shape[1] if call.block_table is None else call.block_table.shape[1] * k_cache.shape[1]


def lengths(k_cache: Tensor, call: KVCacheCall) -> Tensor:
    """int32 (B,): the number of tokens of each sequence, including new ones."""
    new = 0 if call.k is None else call.k.shape[1]
    return (call.cache_seqlens + new).clamp(0, capacity(k_cache, call))


def pages_of(cache: Tensor, call: KVCacheCall) -> Tensor:
    """The cache entries of each sequence, gathered: (B, capacity, H_kv, n)."""
    if call.block_table is not None:
        blocks = call.block_table.long().clamp(0, max(cache.shape[0] - 1, 0))
        return cache[blocks].flatten(1, 2)
    batch = call.cache_seqlens.shape[0]
    return cache[:batch] if call.cache_batch_idx is None else cache[call.cache_batch_idx.long()]


def append(k_cache: Tensor, v_cache: Tensor, call: KVCacheCall) -> None:
    """Write the new tokens into the caches, and update the page bounds."""
    if call.k is None or call.v is None or not (call.k.shape[1] and call.k.shape[0]):
        return
    start, room = call.cache_seqlens.long().clamp_min(0), capacity(k_cache, call)
    last = (start + call.k.shape[1]).clamp_max(room) - 1  # the last token that fits
    if room == 0:
        return
    token = torch.arange(call.k.shape[1], device=start.device)
    place = torch.minimum(start.unsqueeze(1) + token, last.clamp_min(0).unsqueeze(1))
    source = (place - start.unsqueeze(1)).clamp_min(0)  # tokens that do not fit repeat the last one that does
    fits = (last >= start).view(-1, 1, 1, 1)
    row = _row_of(call, place)
    inside = place % call.page_size if call.block_table is not None else place
    for cache, new in ((k_cache, call.k), (v_cache, call.v)):
        chosen = new.gather(1, source[..., None, None].expand(-1, -1, *new.shape[2:]))
        cache[row, inside] = torch.where(fits, chosen, cache[row, inside])
    if call.low is not None and call.high is not None:
        _widen_bounds(call.k, call, call.low, call.high, start, last)
        if call.codes is not None:
            _round_again(k_cache, call, call.low, call.high, call.codes, start, last)


def _row_of(call: KVCacheCall, place: Tensor) -> Tensor:
    """The row or page of the cache that holds the tokens at positions `place` (B, n)."""
    if call.block_table is not None:
        return call.block_table.long().gather(1, place // call.page_size).clamp_min(0)
    batch = torch.arange(place.shape[0], device=place.device) if call.cache_batch_idx is None else call.cache_batch_idx.long()
    return batch.unsqueeze(1).expand_as(place)


def _widen_bounds(k: Tensor, call: KVCacheCall, low: Tensor, high: Tensor, start: Tensor, last: Tensor) -> None:
    for begin in _pages_of_new(k.shape[1], call, start, last):
        token = begin.unsqueeze(1) + torch.arange(call.page_size, device=k.device) - start.unsqueeze(1)
        inside = (token >= 0) & (token <= (last - start).unsqueeze(1))
        new = k.gather(1, token.clamp(0, k.shape[1] - 1)[..., None, None].expand(-1, -1, *k.shape[2:]))
        touched = inside.any(1)
        where = _page_at(call, begin, start, last)
        for bound, outside, reduce, join in (
            (low, torch.inf, torch.amin, torch.minimum),
            (high, -torch.inf, torch.amax, torch.maximum),
        ):
            of_new = reduce(torch.where(inside[..., None, None], new, outside), 1)
            old = bound[where]
            fresh = (begin >= start).view(-1, 1, 1)
            bound[where] = torch.where(touched.view(-1, 1, 1), torch.where(fresh, of_new, join(old, of_new)), old)


def _round_again(
    k_cache: Tensor, call: KVCacheCall, low: Tensor, high: Tensor, codes: Tensor, start: Tensor, last: Tensor
) -> None:
    """Round the keys of the pages that new tokens were written to: their bounds may have moved."""
    new = 0 if call.k is None else call.k.shape[1]
    for begin in _pages_of_new(new, call, start, last):
        place = begin.unsqueeze(1) + torch.arange(call.page_size, device=start.device)
        inside = place <= last.unsqueeze(1)
        place = torch.minimum(place, last.clamp_min(0).unsqueeze(1))
        row = _row_of(call, place)
        at = place % call.page_size if call.block_table is not None else place
        where = _page_at(call, begin, start, last)
        keys = torch.where(inside[..., None, None], k_cache[row, at], low[where].unsqueeze(1))
        touched = (begin <= last) & (last >= start)
        found = rounded(keys, low[where], high[where])
        codes[where] = torch.where(touched.view(-1, 1, 1, 1), found, codes[where])


def _pages_of_new(new: int, call: KVCacheCall, start: Tensor, last: Tensor) -> list[Tensor]:
    """The first positions (B,) of the pages that `new` tokens may lie in, one page of each sequence after the other."""
    first = torch.minimum(start, last.clamp_min(0)) // call.page_size
    return [(first + step) * call.page_size for step in range((new + call.page_size - 2) // call.page_size + 1)]


def _page_at(call: KVCacheCall, begin: Tensor, start: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    """Where what is kept of each page lies, by its first position (B,); of a page without new tokens, that of the first."""
    first = torch.minimum(start, last.clamp_min(0)) // call.page_size * call.page_size
    place = torch.where((begin <= last) & (last >= start), begin, first).unsqueeze(1)
    row = _row_of(call, place)[:, 0]
    return (row,) if call.block_table is not None else (row, place[:, 0] // call.page_size)


def rounded(keys: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Keys in 4 bits: the nearest of 16 values from their page's smallest entry to its largest, in each dimension.

    Args:
        keys: (..., n, H_kv, D), a page each.
        low, high: (..., H_kv, D), the page's bounds.
    Returns:
        uint8 (..., H_kv, ceil(D / 2), n): code c stands for low + c (high - low) / 15. Dimension d < ceil(D / 2) has the lower
        half of byte d, the others follow in the upper halves. What is not finite, or lies between bounds that are not, has any
        code.
    """
    acc = accumulation_dtype(keys.dtype)
    low, high = low.to(acc).unsqueeze(-3), high.to(acc).unsqueeze(-3)
    steps = (high - low) / LEVELS
    codes = ((keys.to(acc) - low) / steps).nan_to_num(0.0, 0.0, 0.0).round_().clamp_(0, LEVELS).to(torch.uint8)
    half = -(-keys.shape[-1] // 2)
    codes = torch.nn.functional.pad(codes, (0, 2 * half - keys.shape[-1]))
    return (codes[..., :half] | codes[..., half:] << 4).movedim(-3, -1).contiguous()


def codes_of(k_cache: Tensor, call: KVCacheCall, low: Tensor, high: Tensor) -> Tensor:
    """The keys of all pages in 4 bits, between the bounds that `bounds_of` gives; those after the end have any code."""
    size = call.page_size
    if call.block_table is None:
        k_cache = torch.nn.functional.pad(k_cache, (0, 0, 0, 0, 0, low.shape[1] * size - k_cache.shape[1]))
    codes = low.new_empty(*low.shape[:-1], -(-low.shape[-1] // 2), size, dtype=torch.uint8)
    if not codes.numel():
        return codes
    pages = k_cache.reshape(-1, size, *k_cache.shape[2:])
    of_pages, low, high = (t.flatten(0, -n) for t, n in ((codes, 4), (low, 3), (high, 3)))
    at_once = max(1, ROUNDED // pages[0].numel())
    for first in range(0, len(pages), at_once):
        some = slice(first, first + at_once)
        of_pages[some] = rounded(pages[some], low[some], high[some])
    return codes


def bounds_of(k_cache: Tensor, call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """Elementwise smallest and largest key of each page that holds a token; 0 for the others."""
    size = call.page_size
    if call.block_table is None:
        rows, tokens, *rest = k_cache.shape
        count = -(-tokens // size)
        keys = torch.nn.functional.pad(k_cache, (0, 0, 0, 0, 0, count * size - tokens)).reshape(rows * count, size, *rest)
        filled = (call.cache_seqlens.view(-1, 1) - torch.arange(count, device=keys.device) * size).flatten()
    else:
        keys, pages = k_cache, torch.arange(call.block_table.shape[1], device=k_cache.device)
        filled = (call.cache_seqlens.view(-1, 1) - pages * size).flatten()
        # unused table entries count for an extra page, which is dropped; for a shared page the largest count is used
        blocks = torch.where(filled > 0, call.block_table.flatten().long(), len(keys))
        filled = filled.new_zeros(len(keys) + 1).scatter_reduce(0, blocks, filled, "amax")[:-1]
    inside = (torch.arange(size, device=keys.device) < filled.unsqueeze(1))[..., None, None]
    low, high = (
        torch.where(inside[:, 0], reduce(torch.where(inside, keys, outside), 1), 0).contiguous()
        for reduce, outside in ((torch.amin, torch.inf), (torch.amax, -torch.inf))
    )
    return (low, high) if call.block_table is not None else (low.view(rows, count, *rest), high.view(rows, count, *rest))


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """(B, L, H, D) as (B, H_kv, H / H_kv * L, D): query heads that share a key head are stacked along the queries."""
    batch, length, heads, size = query.shape
    return query.transpose(1, 2).reshape(batch, kv_heads, heads // max(kv_heads, 1) * length, size)
