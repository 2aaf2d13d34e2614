"""Conversion of packed sequences to a batch, padded to the longest sequence, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.plugin import TILE, AttentionCall


def packings(call: AttentionCall) -> tuple[Packing, Packing]:
    """The packing of the queries, and that of the keys."""
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        raise ValueError("attention: cu_seqlens_q and cu_seqlens_k are given together or not at all, got one of them")
    return Packing(call.cu_seqlens_q, call.max_seqlen_q), Packing(call.cu_seqlens_k, call.max_seqlen_k)


class Packing:
    """The layout of N packed sequences, and the conversion to a padded batch and back."""

    def __init__(self, cu_seqlens: Tensor, longest: int) -> None:
        self.starts, self.ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        self.lengths, self.longest = self.ends - self.starts, longest

    def pad(self, t: Tensor) -> Tensor:
        """(1, H, T, n) as (N, H, longest, n), 0 after the end of a sequence."""
        place = torch.arange(self.longest, device=t.device)
        inside = place < self.lengths.unsqueeze(1)
        index = torch.where(inside, self.starts.unsqueeze(1) + place, 0)
        return torch.where(inside.unsqueeze(2), t[0][:, index], 0).transpose(0, 1)

    def unpad(self, t: Tensor, total: int) -> Tensor:
        """(N, H, longest, ...) as (1, H, total, ...), 0 after the last sequence."""
        place = torch.arange(total, device=t.device)
        sequence = torch.searchsorted(self.ends, place, right=True).clamp_max(len(self.ends) - 1)
        rows = t.transpose(1, 2)[sequence, (place - self.starts[sequence]).clamp(0, self.longest - 1)]
        inside = self.inside(total).view(-1, *(1,) * (rows.ndim - 1))
        return torch.where(inside, rows, torch.zeros_like(rows)).transpose(0, 1).unsqueeze(0).contiguous()

    def inside(self, total: int) -> Tensor:
        """Boolean (total,): which tokens belong to a sequence."""
        return torch.arange(total, device=self.ends.device) < self.ends[-1]

    def unpad_tiles(self, live: Tensor, total: int) -> Tensor:
        """(N, H, tiles, words) in the order of `live`'s contract."""
        first = self.starts // TILE + torch.arange(len(self.starts), device=live.device)
        row = torch.arange(total // TILE + len(self.starts), device=live.device)
        sequence = (torch.searchsorted(first, row, right=True) - 1).clamp_min(0)
        tile = row - first[sequence]
        rows = live.transpose(1, 2)[sequence, tile.clamp(0, live.shape[2] - 1)]
        inside = (tile >= 0) & (tile * TILE < self.lengths[sequence])
        return torch.where(inside.view(-1, 1, 1), rows, 0).transpose(0, 1).unsqueeze(0).contiguous()
