"""Decoding on a GPU: one step at batch 1 and 16, 4k to 1M tokens, eight query heads to a key head. `bench_gpu` calls it.

Every cell is checked against the plain-PyTorch kernel on the same device before it is timed.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax

HEAD_SIZE, KV_HEADS, GROUP = 128, 2, 8
BATCHES = (1, 16)
LENGTHS = (4096, 32768, 131072, 1 << 20)
KINDS = {"needles": 0.5, "flat": 0.9, "spread": 0.5}  # as in bench_decode, and their alpha
MOST_BYTES = 24 << 30


def measure(timed: Callable[[Callable[[], object]], dict[str, Any]], backend: str, deadline: float) -> list[dict[str, Any]]:
    """A row per contestant and cell, until all are there or the time is up."""
    rows = []
    for batch, length, kind in itertools.product(BATCHES, LENGTHS, KINDS):
        if 4 * batch * length * KV_HEADS * HEAD_SIZE > MOST_BYTES:
            continue
        if time.monotonic() > deadline:
            print("gpu_decode: the time is up", file=sys.stderr)
            break
        rows += _cell(batch, length, kind, timed, backend)
    return rows


def inputs(batch: int, length: int, kind: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q (B, 1, H, D), k_cache and v_cache (B, length, H_kv, D)."""
    q = torch.randn(batch, 1, KV_HEADS * GROUP, HEAD_SIZE, device=device, dtype=dtype)
    k_cache, v_cache = (torch.randn(batch, length, KV_HEADS, HEAD_SIZE, device=device, dtype=dtype) for _ in range(2))
    if kind == "needles":
        first = q[:, 0, ::GROUP].clone()
        q = first.repeat_interleave(GROUP, 1).unsqueeze(1) + q / 8
        k_cache *= 0.2
        for place in (3, length // 3, length - 2):
            k_cache[:, place] = 1.5 * first
    return q, k_cache, v_cache


def _cell(batch: int, length: int, kind: str, timed: Callable[..., dict[str, Any]], backend: str) -> list[dict[str, Any]]:
    q, k_cache, v_cache = inputs(batch, length, kind)
    bounds = diffmax.page_bounds(k_cache, length)
    options: dict[str, Any] = {"alpha": KINDS[kind], "backend": backend}

    def ours(page_bounds: diffmax.PageBounds | None, **more: Any) -> Any:
        return diffmax.attention_with_kvcache(q, k_cache, v_cache, page_bounds=page_bounds, **{**options, **more})

    heads_first = [t.transpose(1, 2) for t in (q, k_cache, v_cache)]
    field: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: scaled_dot_product_attention(*heads_first, enable_gqa=True),
        "diffmax": lambda: ours(None),
        "diffmax, bounds": lambda: ours(bounds),
    }
    case = {"operation": "decode", "dtype": "bfloat16", "batch": batch, "length": length, "kind": kind, "alpha": KINDS[kind]}
    pages = int(ours(bounds, return_stats=True)[1].pages_read.sum())
    found = {"pages": bounds.low.shape[1] * batch * KV_HEADS, "pages_read": pages}
    exact = ours(None, backend="reference") if length * batch <= 1 << 20 else None
    rows = []
    for name, call in field.items():
        row: dict[str, Any] = {"contestant": name, **case, **found, "correct": True, "checked": exact is not None}
        if exact is not None and name != "sdpa":
            error = float((call().float() - exact.float()).abs().max())
            # both round to bfloat16 once
            row |= {
                "error": error,
                "correct": error <= 4 * torch.finfo(torch.bfloat16).eps * max(1.0, float(exact.abs().max())),
            }
        if row["correct"]:
            row |= timed(call)
        rows.append(row)
    return rows
