"""How attention on the CPU is cut: parts of the heads, which share converted keys, and blocks of queries in them.

What a kernel does with a block is in `diffmax.kernels.cpu.attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmax.kernels.cpu import dropout
from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.tiles import WORD, packed_bits, unpacked_bits
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import TILE, AttentionCall

# Scores of one block: several heads where they are short, else some rows of one, but never fewer rows than a tile has.
BLOCK_ELEMENTS = 1 << 19
# Rows of a block of few keys: fewer cost more in calls than they save in scores.
LEAST_ROWS = 4 * TILE
# Leaving columns out costs a copy of the others. It pays where this share or less is left.
SPARSE_SHARE = 0.6


@dataclass(frozen=True)
class Sequence:
    """Where one sequence's queries, keys and tiles begin in the tensors, its lengths, and its number among the packed."""

    length: int
    keys: int
    number: int = 0
    query_at: int = 0
    key_at: int = 0
    tile_at: int = 0

    def shift(self, call: AttentionCall) -> int:
        """Query i stands at key i + shift."""
        return self.keys - self.length if call.lower_right else 0

    def seen(self, start: int, stop: int, call: AttentionCall) -> tuple[int, int]:
        """The range of keys that causality and window leave for the queries from start to stop."""
        shift = self.shift(call)
        first, last = rules.visible_span(start + shift, stop - 1 + shift, call.left, call.right, self.keys)
        return first, max(first, last)


@dataclass(frozen=True)
class Part:
    """Some key heads of some batch entries, of one sequence, with the query heads that read them, of so many in all."""

    sequence: Sequence
    batch: slice
    kv_heads: slice
    group: int
    query_heads: int

    @property
    def heads(self) -> int:
        """How many key heads, batch entries counted."""
        return int(self.batch.stop - self.batch.start) * int(self.kv_heads.stop - self.kv_heads.start)

    def _view(self, t: Tensor) -> Tensor:
        s = self.sequence
        return t[self.batch, self.kv_heads, s.key_at : s.key_at + s.keys]

    def keys_of(self, t: Tensor) -> Tensor:
        """The part of (B, H_kv, S, n) as (heads, S, n), in the accumulation dtype."""
        return self._view(t).to(accumulation_dtype(t.dtype)).flatten(0, 1)

    def write_keys(self, t: Tensor, values: Tensor) -> None:
        """Put (heads, S, n) where `keys_of` takes it from."""
        view = self._view(t)
        view.copy_(values.view(view.shape))

    def blocks(self, call: AttentionCall) -> Iterator[Block]:
        """Cover the queries that see a key."""
        length, first = self.sequence.length, self.kv_heads.start * self.group
        heads = (self.kv_heads.stop - self.kv_heads.start) * self.group
        height, together = length, heads
        if self.heads == 1:
            limit = max(TILE, BLOCK_ELEMENTS // max(1, self._width(call)))
            height = min(length, limit // TILE * TILE)
            if call.left >= 0 and call.right >= 0:  # a block sees as many keys more as it has rows
                height = min(height, max(LEAST_ROWS, -(-(call.left + call.right + 1) // TILE) * TILE))
            together = min(heads, max(1, limit // max(1, length)))
        for head in range(first, first + heads, together):
            for start in range(0, length, max(1, height)):
                stop = min(start + height, length)
                seen = self.sequence.seen(start, stop, call)
                if seen[0] < seen[1]:
                    yield Block(self, slice(head, min(head + together, first + heads)), start, stop, *seen)

    def _width(self, call: AttentionCall) -> int:
        in_window = call.left + call.right + 1 + TILE if call.left >= 0 and call.right >= 0 else self.sequence.keys
        return min(in_window, self.sequence.keys)


@dataclass(frozen=True)
class Block:
    """The queries from start to stop of a part's query heads, and the keys from first to last that they see.

    As a matrix it has the shape (key heads, query heads of each * (stop - start), last - first).
    """

    part: Part
    heads: slice
    start: int
    stop: int
    first: int
    last: int

    def _view(self, t: Tensor) -> Tensor:
        at = self.part.sequence.query_at
        return t[self.part.batch, self.heads, at + self.start : at + self.stop]

    def rows_of(self, t: Tensor) -> Tensor:
        """The block's rows of (B, H, L, n) as (key heads, rows, n), in the accumulation dtype; a copy."""
        view = self._view(t)
        copy = torch.empty(view.shape, dtype=accumulation_dtype(t.dtype)).copy_(view)
        return copy.view(self.part.heads, view.shape[:3].numel() // self.part.heads, t.shape[3])

    def row_values_of(self, t: Tensor) -> Tensor:
        """The block's rows of (B, H, L) as one column."""
        return self._view(t).reshape(-1, 1)

    def e_of(self, e: float | Tensor) -> float | Tensor:
        """e; where heads differ, one for each row, as a column."""
        return self.of_heads(e) if isinstance(e, Tensor) else e

    def of_heads(self, t: Tensor) -> Tensor:
        """Of numbers per head, (H,), that of each row, as a column."""
        batch = self.part.batch.stop - self.part.batch.start
        return t[self.heads].view(1, -1, 1).expand(batch, -1, self.stop - self.start).reshape(-1, 1)

    def write(self, t: Tensor, rows: Tensor) -> None:
        """Put the block's rows into (B, H, L, n) or (B, H, L)."""
        view = self._view(t)
        view.copy_(rows.view(view.shape))

    def completed(
        self,
        scores: Tensor,
        call: AttentionCall,
        some: tuple[rules.Rule, ...],
        columns: Tensor | None = None,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Scaled products (key heads, rows, keys), of all keys or of these columns, after some rules, in place.

        And the rules' slope, written to `slope` if that is given; None: 1.
        """
        region, view = _BlockRegion(self, call, columns), self._by_head(scores)
        if slope is None:
            rules.apply(view, call, region, some)
            return scores, None
        _, found = rules.apply_with_slope(view, call, region, some, self._by_head(slope))
        return scores, None if found is None else found.view(scores.shape)

    def add_to_bias(self, total: Tensor, d_s: Tensor, columns: Tensor | None) -> None:
        """Add (key heads, rows, keys) to what has the bias's shape, summed where that is 1."""
        view = self._by_head(d_s)
        alone = [axis for axis, size in enumerate(total.shape) if size == 1]
        share = view.sum(alone, keepdim=True) if alone else view
        target = self._rows_of_mask(total)
        if total.shape[3] == 1:
            target.add_(share)
        elif columns is None:
            target[..., self.first : self.last].add_(share)
        else:
            target.index_add_(3, columns + self.first, share)

    def dropped_by(self, weights: Tensor, call: AttentionCall, columns: Tensor | None) -> Tensor:
        """The scaled keep mask of dropout, (key/value heads, rows, keys); the sink may follow the keys."""
        if call.seed is None:
            raise ValueError("attention: dropout_p comes with a seed, got dropout_p alone")
        place = self.positions(columns)
        place = torch.cat([place, place.new_zeros(weights.shape[2] - len(place))])
        batch = torch.arange(self.part.batch.start, self.part.batch.stop) + self.part.sequence.number
        row = torch.arange(self.start, self.stop)
        head = (batch * self.part.query_heads).view(-1, 1, 1) + torch.arange(self.heads.start, self.heads.stop).view(-1, 1)
        shape = (len(batch), self.heads.stop - self.heads.start, len(row))
        head, row = (t.expand(shape).reshape(-1) for t in (head, row))
        rows = weights.view(len(head), -1)
        return dropout.factors(rows, head, row, place, call.seed, call.dropout_p).view(weights.shape)

    def _by_head(self, scores: Tensor) -> Tensor:
        return scores.view(self.part.batch.stop - self.part.batch.start, -1, self.stop - self.start, scores.shape[2])

    def positions(self, columns: Tensor | None) -> Tensor:
        """Of the block's keys, or of some columns."""
        return torch.arange(self.first, self.last) if columns is None else columns + self.first

    def _rows_of_mask(self, mask: Tensor) -> Tensor:
        parts = (self.part.batch, self.heads, slice(self.start, self.stop))
        return mask[tuple(part if size > 1 else slice(None) for part, size in zip(parts, mask.shape, strict=False))]

    def of_keys(self, mask: Tensor, columns: Tensor | None) -> Tensor:
        """The block's part of (B, H, L, S), of which dimensions may have size 1."""
        mask = self._rows_of_mask(mask)
        if mask.shape[3] == 1:
            return mask
        return mask[..., self.first : self.last] if columns is None else mask[..., columns + self.first]

    def _live_view(self, live: Tensor) -> Tensor:
        at = self.part.sequence.tile_at
        return live[self.part.batch, self.heads, at + self.start // TILE : at - (-self.stop // TILE)]

    def write_live(self, live: Tensor, p: Tensor, columns: Tensor | None) -> None:
        """Set the bits of the tiles that hold a weight."""
        view = self._live_view(live)
        strips = torch.split(p.view(*view.shape[:2], self.stop - self.start, -1), TILE, 2)
        touched = torch.stack([strip.amax(2) != 0 for strip in strips], 2)  # NaN counts: it has to reach the gradient
        place = self.positions(columns)
        counts = torch.zeros(*view.shape[:3], live.shape[3] * WORD, dtype=torch.int32)
        view.copy_(packed_bits(counts.index_add_(3, place // TILE, touched.int()) > 0))

    def live_columns(self, live: Tensor) -> Tensor | None:
        """The columns of the tiles that hold a weight; None for all, where leaving some out does not pay."""
        if self.part.heads > 1 or live.numel() == 0:
            return None
        tiles = unpacked_bits(self._live_view(live).flatten(0, 2)).any(0).nonzero()
        place = (tiles * TILE + torch.arange(TILE)).view(-1)
        columns = place[(place >= self.first) & (place < self.last)] - self.first
        return columns if len(columns) <= SPARSE_SHARE * (self.last - self.first) else None


class _BlockRegion(rules.Region):
    """A block's scores as (batch, query heads, rows, keys), of all keys or of some columns."""

    in_place = True

    def __init__(self, block: Block, call: AttentionCall, columns: Tensor | None) -> None:
        self.block, self.columns = block, columns
        self.start = block.start + block.part.sequence.shift(call)
        self.stop = block.stop + block.part.sequence.shift(call)

    def queries(self) -> Tensor:
        """(rows, 1)."""
        return torch.arange(self.start, self.stop).unsqueeze(1)

    def keys(self) -> Tensor:
        """(keys,)."""
        return self.block.positions(self.columns)

    def of_heads(self, t: Tensor) -> Tensor:
        """(batch, query heads, 1, 1)."""
        t = t.reshape(-1, t.shape[-1])
        return t[self.block.part.batch if len(t) > 1 else slice(None), self.block.heads, None, None]

    def of_scores(self, t: Tensor) -> Tensor:
        """The block's part of a mask or a bias."""
        return self.block.of_keys(t, self.columns)

    def edge(self, call: rules.Call, side: str) -> slice | None:
        """Keys before the first row's last, or behind the last row's first, are seen by every row."""
        if self.columns is not None:
            return rules.ALL
        if side == "right":
            return slice(max(self.start + call.right + 1 - self.block.first, 0), None)
        return slice(0, max(self.stop - 1 - call.left - self.block.first, 0))


def parts(query: Tensor, key: Tensor, call: AttentionCall) -> Iterator[Part]:
    """Cover all heads of all sequences: several at once where they are short."""
    batch, kv_heads = key.shape[:2]
    group = query.shape[1] // max(kv_heads, 1)
    for sequence in _sequences(query, key, call):
        together = max(1, BLOCK_ELEMENTS // max(1, group * sequence.length * sequence.keys))
        if together >= kv_heads:
            step = together // max(kv_heads, 1)
            spans = [(slice(b, min(b + step, batch)), slice(0, kv_heads)) for b in range(0, batch, max(1, step))]
        else:
            heads = [slice(h, min(h + together, kv_heads)) for h in range(0, kv_heads, together)]
            spans = [(slice(b, b + 1), some) for b in range(batch) for some in heads]
        yield from (Part(sequence, *span, group, query.shape[1]) for span in spans if kv_heads and group)


def _sequences(query: Tensor, key: Tensor, call: AttentionCall) -> Iterator[Sequence]:
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        yield Sequence(query.shape[2], key.shape[2])
        return
    ends_q, ends_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for n, (query_at, key_at) in enumerate(zip(ends_q[:-1], ends_k[:-1], strict=True)):
        yield Sequence(ends_q[n + 1] - query_at, ends_k[n + 1] - key_at, n, query_at, key_at, query_at // TILE + n)
