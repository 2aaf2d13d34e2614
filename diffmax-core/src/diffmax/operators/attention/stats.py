"""Statistics of an attention call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.tiles import live_shape, unpacked_bits
from diffmax.plugin import TILE, AttentionCall


class AttentionStats(NamedTuple):
    """Per-query statistics of an attention call, without gradients.

    Attributes:
        tau: (B, H, L), or (T, H) for packed sequences: the threshold of each query (Eq. 1), in the accumulation dtype; -inf for
            fully masked queries.
        support_size: int32, like tau: the number of keys with a score above tau.
        tile_sparsity: (B, H), for packed sequences (H,), float32: the share of 64 x 64 tiles of queries and keys whose weights
            are all zero, among those that causality and the window do not mask. Tiles that a mask hides count as zero.
    """

    tau: Tensor
    support_size: Tensor
    tile_sparsity: Tensor


AttentionStats.__module__ = "diffmax"  # the module name that pickles store


def tile_sparsity(query: Tensor, key: Tensor, live: Tensor, call: AttentionCall) -> Tensor:
    """Per head, the share of empty tiles among those that causality and window do not mask."""
    if live.ndim == 1:
        return torch.full(query.shape[:2], torch.nan, device=query.device)  # the backend does not compute live tiles
    tiles = torch.sym_max(2, live_shape(query, key, call)[2])  # type: ignore[no-untyped-call]  # one too many counts nothing
    row = torch.arange(tiles, device=query.device)
    if call.cu_seqlens_q is None:
        length, keys, tile = torch.full_like(row, query.shape[2]), torch.full_like(row, key.shape[2]), row
    else:
        first = call.cu_seqlens_q[:-1] // TILE + torch.arange(len(call.cu_seqlens_q) - 1, device=query.device)
        sequence = (torch.searchsorted(first, row, right=True) - 1).clamp_min(0)
        length, keys = (ends.diff()[sequence] for ends in (call.cu_seqlens_q, call.cu_seqlens_k) if ends is not None)
        tile = row - first[sequence]
    last_row = torch.minimum(tile * TILE + TILE, length) - 1
    shift = keys - length if call.lower_right else torch.zeros_like(row)
    first, end = rules.visible_span(tile * TILE + shift, last_row + shift, call.left, call.right, keys)
    left = torch.where((end > first) & (tile * TILE <= last_row), (end - 1) // TILE - first // TILE + 1, 0).sum()
    full = unpacked_bits(live).sum(2)
    return 1 - full / left.clamp_min(1).float()
