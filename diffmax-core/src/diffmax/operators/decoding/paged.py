"""Paged keys and values, converted to the packed layout of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.operators.attention.checks import check_packing
from diffmax.operators.common.checks import _readable, _shape
from diffmax.operators.decoding import checks


def from_pages(name: str, key: Tensor, value: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Packed keys (T, H_kv, D) and values of N sequences, from the pages listed in `block_table` (N, pages)."""
    for what, t in (("key", key), ("value", value)):
        if isinstance(t, Tensor) and t.ndim != 4:
            raise ValueError(f"{name}: with block_table, {what} must be (num_blocks, page_size, H_kv, D), got {_shape(t)}")
        checks.check_cache(name, what, t)
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(f"{name}: key and value must have the same pages, got {_shape(key)} and {_shape(value)}")
    total = int(cu_seqlens_k[-1]) if isinstance(cu_seqlens_k, Tensor) and cu_seqlens_k.numel() else 0
    ends = check_packing(name, "k", cu_seqlens_k, 2**31 - 1, total, key.device).long()
    table = checks.check_block_table(name, block_table, key, ends.shape[0] - 1)
    size, room = key.shape[1], key.shape[1] * block_table.shape[1]
    lengths = ends.diff()
    if _readable(lengths) and lengths.numel() and int(lengths.max()) > room:
        raise ValueError(f"{name}: block_table must have pages for every token, got {room} places for {int(lengths.max())}")
    checks.check_pages(name, table, lengths, 0, key)
    sequence = torch.repeat_interleave(lengths, output_size=total)
    place = torch.arange(total, device=key.device) - ends[sequence]
    page, row = block_table[sequence, place // max(size, 1)].long(), place % max(size, 1)
    return key[page, row], value[page, row]
