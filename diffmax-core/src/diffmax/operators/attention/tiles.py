"""Live tiles of attention as bits: `live` of `diffmax.plugin.Saved`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.plugin import TILE, AttentionCall

WORD = 32
"""Tiles whose bits share a word."""


def live_shape(query: Tensor, key: Tensor, call: AttentionCall) -> tuple[int, ...]:
    """The shape of `live`, see `diffmax.reference.attention.attention`."""
    batch, heads, length, _ = query.shape
    if call.cu_seqlens_q is None:
        tiles, keys = -(-length // TILE), key.shape[2]
    else:
        tiles, keys = length // TILE + call.cu_seqlens_q.shape[0] - 1, call.max_seqlen_k
    return batch, heads, tiles, -(-keys // (TILE * WORD))


def tiles_with(entries: Tensor) -> Tensor:
    """Boolean per tile: whether the tile of a boolean (..., L, S) holds True."""
    length, keys = entries.shape[-2:]
    tiles_q, tiles_k = -(-length // TILE), -(-keys // TILE)
    entries = widened(widened(entries, tiles_k * TILE).mT, tiles_q * TILE).mT
    return entries.reshape(*entries.shape[:-2], tiles_q, TILE, tiles_k, TILE).any(-1).any(-2)


def widened(t: Tensor, size: int) -> Tensor:
    """Pad the last dimension with zeros. pad of torch 2.4 does not accept a dimension of 0."""
    missing = size - t.shape[-1]
    return torch.cat([t, t.new_zeros(*t.shape[:-1], missing)], -1) if missing else t


def packed_bits(tiles: Tensor) -> Tensor:
    """Booleans (..., n) as int32 words (..., ceil(n / WORD)), the first in the lowest bit."""
    count = -(-tiles.shape[-1] // WORD)
    words = widened(tiles, count * WORD).view(*tiles.shape[:-1], count, WORD).long()
    return (words << torch.arange(WORD, device=tiles.device)).sum(-1).to(torch.int32)  # bit 31 wraps to the sign


def unpacked_bits(words: Tensor) -> Tensor:
    """The inverse: booleans (..., n * WORD)."""
    bits = words.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(-2)
