"""The share f of the other ranks' keys that context parallel attention asks for (Eq. 49), on queries and keys of real models.

    python -m benchmarks.device.capture FILE
    python -m benchmarks.count_live_blocks FILE [--output JSON]

Counted on one process: no message is sent. "exact" is the share of keys in blocks of 32 that have a weight for a query of the
rank at all: what is asked for beyond it is lost by the bounds of Eq. 46 to 48. The scores are at the matched scale,
16^-(1 - alpha).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffmax
from benchmarks.environment import environment, result_path
from benchmarks.harness import write
from diffmax.operators.attention import context_parallel, live_blocks

ALPHAS, RANKS, LAYOUTS = (0.5, 0.75, 0.9), (2, 4, 8), ("contiguous", "zigzag")
ROWS = 512  # queries whose weights are in memory at a time


def options(alpha: float, layout: str, causal: bool, dim: int) -> context_parallel.Options:
    """Those of the call, at the matched scale."""
    scale = 16 ** -(1 - alpha) / math.sqrt(dim)
    return context_parallel.Options("live_blocks", layout, causal, scale, True, alpha, None, None, 0.0, None, None)


def weighed(query: Tensor, key: Tensor, given: context_parallel.Options) -> Tensor:
    """Which keys have a weight for which query of any head that shares them, boolean (H_kv, L, L)."""
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query[0].float().unflatten(0, (kv_heads, -1))
    found = torch.zeros(kv_heads, length, length, dtype=torch.bool)
    for h in range(kv_heads):
        for first in range(0, length, ROWS):
            rows = slice(first, first + ROWS)
            scores = grouped[h, :, rows] @ key[0, h].float().T * given.scale
            if given.is_causal:
                position = torch.arange(first, min(first + ROWS, length))
                scores = scores.masked_fill(torch.arange(length) > position[:, None], -math.inf)
            found[h, rows] = (diffmax.diffmax_bisect(scores, alpha=given.alpha) > 0).any(0)
    return found


def shares(query: Tensor, key: Tensor, given: context_parallel.Options, size: int, found: Tensor) -> tuple[float, float, float]:
    """Of the other ranks' keys: those that are asked for, those in blocks with a weight, and those that are seen at all."""
    length = query.shape[2]
    lengths = [length // size] * size
    order = context_parallel.order_of_tokens(given.layout, lengths, query.device)
    parts = order.split(lengths)
    runs = context_parallel.runs_of(given.layout, lengths)
    summaries = [live_blocks.summary(key[:, :, own], of_rank) for own, of_rank in zip(parts, runs, strict=True)]
    blocks = live_blocks.blocks_of(torch.stack(summaries), runs)
    asked = exact = seen = 0
    for rank, own in enumerate(parts):
        others = blocks.rank != rank
        visible = torch.zeros_like(others)
        wanted = torch.zeros(key.shape[1], len(others), dtype=torch.bool)
        for run in runs[rank]:
            wanted |= live_blocks.wanted_by(query[:, :, own], blocks, run, given, rank)[0]
            visible |= others & (blocks.start < run.start) if given.is_causal else others
        of_keys = found[:, own].any(1).float().cumsum(1)
        of_keys = torch.nn.functional.pad(of_keys, (1, 0))
        weighs = (of_keys[:, blocks.start + blocks.size] > of_keys[:, blocks.start]) & others
        asked += int((wanted * blocks.size).sum())
        exact += int((weighs * blocks.size).sum())
        seen += int((visible * blocks.size).sum()) * key.shape[1]
    total = key.shape[1] * length * (size - 1)
    return asked / total, exact / total, seen / total


def count(captured: dict[str, Sequence[Tensor]]) -> Iterator[dict[str, Any]]:
    """A row for each model, alpha, number of ranks and layout."""
    for name, (query, key, _) in captured.items():
        causal = "LM" in name
        for alpha in ALPHAS:
            found = weighed(query, key, options(alpha, "contiguous", causal, query.shape[3]))
            for size in RANKS:
                for layout in LAYOUTS:
                    given = options(alpha, layout, causal, query.shape[3])
                    asked, exact, seen = (round(share, 4) for share in shares(query, key, given, size, found))
                    row = {"input": name, "tokens": query.shape[2], "causal": causal, "alpha": alpha, "ranks": size}
                    yield row | {"layout": layout, "asked": asked, "exact": exact, "seen": seen}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of docs/distributed.md."""
    lines = ["| input | alpha | layout | seen | with a weight | f |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["ranks"] == 4:
            figures = " | ".join(f"{row[what]:.2f}" for what in ("seen", "exact", "asked"))
            lines.append(f"| {row['input']} | {row['alpha']} | {row['layout']} | {figures} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captured", type=Path, help="what benchmarks.device.capture wrote")
    parser.add_argument("--output", type=Path, help="result file (default: as of the benchmarks)")
    given = parser.parse_args(arguments)
    rows = []
    for row in count(torch.load(given.captured, weights_only=True)):
        print(json.dumps(row), flush=True)
        rows.append(row)
    print("\n".join(table(rows)))
    about = environment("count_live_blocks", [])
    path = given.output or result_path("count_live_blocks", about)
    write(path, {"environment": about, "rows": rows})


if __name__ == "__main__":
    main()
