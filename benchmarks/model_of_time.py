"""Predicted times on an H100 from the instructions in the table of budgets: attention relative to FlashAttention-2, and rows.

    python -m benchmarks.model_of_time

Assumptions, for bfloat16 heads of 64 under causality at 1.7 GHz. The unit is clocks of a multiprocessor per tile of 64 by 64:

- An instruction per score takes 32 clocks (4096 scores, 128 lanes), at 80 % of the issue rate 40. A product takes 128.
- A multiprocessor gets 27 bytes of the L2 cache per clock. A tile of keys or values is read once by the queries of a program,
  as many as `attention.settings` says; a tile of queries and gradients by the keys of one.
- A pass takes the largest of the three; nothing else does, and all multiprocessors are busy.
- FlashAttention-2 runs at 300 TFLOP/s forward, 280 backward: 787 clocks per tile forward, and 2350 backward.
- How many passes there are, of which share of the tiles: `Passes`. That follows `benchmarks.count_products`, with its estimate
  of the threshold right (one dense pass) where the scores have zeros.

Rows, as a share of the bandwidth of a device copy: that moves 3.0 TB/s, and 132 multiprocessors issue at 80 % of their rate.
The steps per row are those of `benchmarks.count_evaluations` for 1024 scores N(0, 1).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks import count_evaluations
from benchmarks.count_instructions import Line, read
from diffmax.kernels.triton.attention.settings import backward_blocks, forward_settings

TILE, SIZE = 64, 64
CLOCKS_PER_INSTRUCTION = TILE * TILE / 128 / 0.8
CLOCKS_PER_PRODUCT = 128.0
BYTES_PER_CLOCK = 27.0
FLASH_FORWARD, FLASH_BACKWARD = 787.0, 2350.0

COPY_BYTES_PER_S = 3.0e12
ISSUE_PER_S = 132 * 1.7e9 * 128 * 0.8
SPECIAL_PER_S = 132 * 1.7e9 * 16
# The alpha of the table with the same code
ROW_CODE = {"0.5": "0.5", "0.85": "0.85", "0.95": "0.85"}


@dataclass(frozen=True)
class Passes:
    """What a call does.

    Attributes:
        alpha: As in the table.
        live: Share of the tiles of 64 queries with a weight.
        wide: The same of 128 queries, whose programs visit what either half needs.
        further: Evaluations after the dense one, in units of all tiles.
        training: Whether the forward also computes U.
    """

    alpha: str
    live: float
    wide: float
    further: float
    training: bool


CASES = {
    # wide: 1.14 times as many, as on a language model's scores (benchmarks.count_lists)
    "32k, 70 % zeros, training": Passes("0.5", 0.3, 0.342, 0.09, True),
    "32k, 70 % zeros, inference": Passes("0.5", 0.3, 0.342, 0.09, False),
    "dense, alpha 0.9, 16k, training": Passes("0.9", 1.0, 1.0, 0.04, True),
    "dense, alpha 0.9, 16k, inference": Passes("0.9", 1.0, 1.0, 0.04, False),
}


def passes_of(case: str) -> Passes:
    """By its name in `CASES`."""
    return CASES[case]


PRODUCTS = {"output, inference": 2, "output, training": 3, "dQ": 3, "dK, dV": 4}


def shared_by(part: str) -> int:
    """How many queries, or of dK dV keys, share a tile that a program of a part loads."""
    forward, backward = (of("sm90", torch.bfloat16, SIZE, False) for of in (forward_settings, backward_blocks))
    return {
        "output, inference": forward.output_of(False).rows,
        "output, training": forward.output_of(True).rows,
        "dQ": backward.dq.rows,
        "dK, dV": backward.dkv.keys,
    }.get(part, TILE)


def clocks(part: str, instructions: float) -> float:
    """Clocks of a tile of 64 by 64 in a part of the table, from its instructions per score."""
    operands = 2 if part in PRODUCTS else 1
    loaded = operands * TILE * SIZE * 2 * TILE / shared_by(part)
    return max(instructions * CLOCKS_PER_INSTRUCTION, PRODUCTS.get(part, 1) * CLOCKS_PER_PRODUCT, loaded / BYTES_PER_CLOCK)


def tile_times(instructions: Mapping[str, float], passes: Passes) -> dict[str, float]:
    """Clocks per tile of a causal call, forward and both directions, from instructions per score by `Line.part`."""
    each = {part: clocks(part, count) for part, count in instructions.items()}

    def live(part: str) -> float:
        return (passes.wide if shared_by(part) > TILE else passes.live) * each[part]

    forward = (
        live("dense pass")
        + (1 - passes.live) * each.get("dense pass, dead", each["dense pass"])
        + passes.further * each["further pass"]
        + live("output, training" if passes.training else "output, inference")
    )
    return {"forward": forward, "both": forward + live("dQ") + live("dK, dV")}


def times_flash(lines: Sequence[Line], case: str) -> tuple[float, float]:
    """Forward, and both directions, each times FlashAttention-2's."""
    passes = passes_of(case)
    found = tile_times({line.part: line.instructions for line in lines if line.alpha == passes.alpha}, passes)
    return found["forward"] / FLASH_FORWARD, found["both"] / (FLASH_FORWARD + FLASH_BACKWARD)


def share_of_copy(lines: Sequence[Line], dtype: str, alpha: str, size: int) -> tuple[float, float]:
    """Instructions per score of a row, and the share of the copy's bandwidth that they leave."""
    parts = {line.part: line for line in lines if (line.dtype, line.alpha, line.size) == (dtype, ROW_CODE[alpha], size)}
    torch.manual_seed(0)
    early, steps = count_evaluations.steps(torch.randn(64, 1024).double(), float(alpha), dtype == "bfloat16")
    taken = {"rows, once": 1.0, "rows, early step": early, "rows, step": steps}
    instructions, special = (
        sum(number * getattr(parts[part], field) for part, number in taken.items() if part in parts)
        for field in ("instructions", "special")
    )
    scores = COPY_BYTES_PER_S / (8 if dtype == "float32" else 4)
    issue, units = ISSUE_PER_S / scores, SPECIAL_PER_S / scores
    return instructions, min(1.0, issue / instructions, units / max(special, 1e-9))


def main(arguments: Sequence[str]) -> int:
    """Print a line per version of Triton and case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_of_time", description=(__doc__ or "").splitlines()[0])
    parser.parse_args(arguments)
    own = [line for line in read().values() if (line.target, line.dtype, line.size) == ("sm90", "bfloat16", SIZE)]
    print("| Triton | case | forward, times FlashAttention-2's | forward and backward |\n|---|---|---|---|")
    for version in sorted({line.triton for line in own}):
        for case in [case for case in CASES if any((line.triton, line.alpha) == (version, CASES[case].alpha) for line in own)]:
            forward, both = times_flash([line for line in own if line.triton == version], case)
            print(f"| {version} | {case} | {forward:.2f} | {both:.2f} |")
    print("\n| Triton | n | dtype | alpha | instructions per score | share of copy bandwidth |\n|---|---|---|---|---|---|")
    rows = [line for line in read().values() if line.target == "sm90" and line.part.startswith("rows, ")]
    for version, size in sorted({(line.triton, line.size) for line in rows if line.alpha == "0.85"}):
        for dtype, alpha in itertools.product(("float32", "bfloat16"), ROW_CODE):
            instructions, share = share_of_copy([line for line in rows if line.triton == version], dtype, alpha, size)
            print(f"| {version} | {size} | {dtype} | {alpha} | {instructions:.1f} | {share:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
