"""The blocks of attention: queries of some heads, with the keys that they see. The host knows all sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from diffmax.kernels.tools import visible_span
from diffmax.plugin import TILE, AttentionCall

# Scores of one block. They and two buffers, 96 MiB in float32, stay in the 192 MiB of cache of an Ascend 910B.
BLOCK_ELEMENTS = 1 << 23

# The random words of dropout are int64, and half a dozen such tensors are needed at a time.
SHARE_WITH_DROPOUT = 8


@dataclass(frozen=True)
class Block:
    """The queries `rows` of some query heads, and the keys `keys` of their key heads.

    The shape of its scores is (batch entries, key heads, query heads per key head, queries, keys).
    """

    batch: slice
    kv_heads: slice
    group: slice
    rows: slice
    keys: slice

    def of_queries(self, t: Tensor) -> Tensor:
        """The block's part of (B, H_kv, H / H_kv, L, ...); axes of size 1 broadcast."""
        return t[self._cuts(t, self.batch, self.kv_heads, self.group, self.rows)]

    def of_scores(self, t: Tensor) -> Tensor:
        """The block's part of (B, H_kv, H / H_kv, L, S); axes of size 1 broadcast."""
        return t[self._cuts(t, self.batch, self.kv_heads, self.group, self.rows, self.keys)]

    def of_keys(self, t: Tensor) -> Tensor:
        """The block's part of (B, H_kv, S, n)."""
        return t[self.batch, self.kv_heads, self.keys]

    def of_tiles(self, t: Tensor) -> Tensor:
        """The block's part of (B, H_kv, H / H_kv, tiles of queries, tiles of keys)."""
        rows, keys = (slice(s.start // TILE, -(-s.stop // TILE)) for s in (self.rows, self.keys))
        return t[self.batch, self.kv_heads, self.group, rows, keys]

    @staticmethod
    def _cuts(t: Tensor, *cuts: slice) -> tuple[slice, ...]:
        return tuple(cut if size > 1 else slice(None) for cut, size in zip(cuts, t.shape, strict=False))


def by_groups(t: Tensor, kv_heads: int) -> Tensor:
    """(B, H, ...) as (B, H_kv, H / H_kv, ...); a head axis of size 1 stays 1."""
    return t.unsqueeze(1) if t.shape[1] == 1 else t.view(t.shape[0], kv_heads, t.shape[1] // kv_heads, *t.shape[2:])


def blocks(query: Tensor, key: Tensor, call: AttentionCall, packed: bool) -> Iterator[Block]:
    """Blocks that cover every query that sees a key. Each has as many heads and as few queries as fit, so causality saves most.

    Only the device knows the lengths of `packed` sequences: their blocks see all keys.
    """
    batch, heads, length, _ = query.shape
    kv_heads, many = key.shape[1:3]
    if not (batch and heads and length and many):
        return
    group = heads // kv_heads
    room = max(1, BLOCK_ELEMENTS // (SHARE_WITH_DROPOUT if call.dropout_p > 0 else 1) // (TILE * _width(call, many, packed)))
    shares = min(group, room)
    kv_share = max(1, min(kv_heads, room // group))
    batch_share = max(1, min(batch, room // heads)) if kv_share == kv_heads else 1
    height = max(1, room // (shares * kv_share * batch_share)) * TILE
    for batch_part in _parts(batch, batch_share):
        for kv_part in _parts(kv_heads, kv_share):
            for group_part in _parts(group, shares):
                for rows in _parts(length, height):
                    keys = slice(0, many) if packed else _seen(rows, length, many, call)
                    if keys.start < keys.stop:
                        yield Block(batch_part, kv_part, group_part, rows, keys)


def _parts(size: int, share: int) -> list[slice]:
    return [slice(start, min(start + share, size)) for start in range(0, size, share)]


def _width(call: AttentionCall, many: int, packed: bool) -> int:
    """The maximum number of keys that a tile of queries sees."""
    if packed or call.left < 0 or call.right < 0:
        return many
    return min(many, call.left + call.right + 3 * TILE)


def _seen(rows: slice, length: int, many: int, call: AttentionCall) -> slice:
    """The range of keys that these queries see by causality and window, starting at a tile boundary."""
    shift = many - length if call.lower_right else 0
    first, last = visible_span(rows.start + shift, rows.stop - 1 + shift, call.left, call.right, many)
    return slice(first // TILE * TILE, last)
