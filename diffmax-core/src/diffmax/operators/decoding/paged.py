"""Keys and values that lie in pages, and caches that begin late, in terms of what the operators take."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.operators.attention.checks import check_packing
from diffmax.operators.common.checks import _readable, _shape
from diffmax.operators.decoding import checks


def from_pages(name: str, key: Tensor, value: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """The packed keys (T, H_kv, D) and values of sequences whose pages `block_table` (N, pages) lists."""
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


def from_late_start(
    name: str,
    leftpad: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    rows: Tensor | None,
    appends: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cache whose sequences begin at `leftpad`, as one in pages of one token; lengths and a table that leave the rest out."""
    batch, room = lengths.shape[0], k_cache.shape[1]
    if not isinstance(leftpad, Tensor):
        raise TypeError(f"{name}: cache_leftpad must be an int32 tensor, got {type(leftpad).__name__}")
    checks._check_index(name, "cache_leftpad", leftpad, (batch,), k_cache.device)
    if _readable(leftpad) and _readable(lengths) and not bool(((leftpad >= 0) & (leftpad <= lengths)).all()):
        raise ValueError(
            f"{name}: cache_leftpad must lie between 0 and cache_seqlens, got {leftpad.tolist()} for {lengths.tolist()}"
        )
    pages = []
    for what, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if appends and cache.shape[0] > 1 and cache.stride(0) != room * cache.stride(1):
            raise ValueError(
                f"{name}: {what} must have its rows one behind the other where k and v are appended with cache_leftpad, got "
                f"strides {cache.stride()}\nmake it contiguous first"
            )
        pages.append(cache.flatten(0, 1).unsqueeze(1))
    row = torch.arange(batch, device=leftpad.device) if rows is None else rows.long()
    place = leftpad.long().unsqueeze(1) + torch.arange(room, device=leftpad.device)
    table = row.unsqueeze(1) * room + place.clamp(max=max(room - 1, 0))
    return pages[0], pages[1], (lengths - leftpad).to(torch.int32), table.to(torch.int32)
