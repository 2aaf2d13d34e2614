"""Write the tuning tables of diffmax-cuda and diffmax-rocm without a device: `python -m benchmarks.tune_triton --compile`.

Candidates are compiled for each architecture, and what fits its registers is taken: such tables say "predicted" in `origin`.
What a device finds better, `python -m benchmarks.device` measures and its report writes.

Among the tiles that spill nothing, the one with the fewest warps is taken that still keeps enough bytes in flight to hide the
memory's latency; fewer warps add up over fewer barriers.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "cuda": ROOT / "diffmax-cuda" / "src" / "diffmax_cuda" / "tables.json",
    "hip": ROOT / "diffmax-rocm" / "src" / "diffmax_rocm" / "tables.json",
}

# Target to the name of its table; `configs` says which one serves the architectures between.
COMPILED = {"sm75": "7.5", "sm80": "8.0", "sm90": "9.0", "sm100": "10.0", "gfx942": "gfx942", "gfx1100": "gfx1100"}

REGISTERS = {"cuda": 65536, "hip": 131072}  # of 4 bytes, per multiprocessor or compute unit
PROGRAMS, THREADS = 32, 2048  # that one holds at most
BYTES_IN_FLIGHT = 32 * 1024  # per multiprocessor: 4.3 TB/s over 132 of them for 1 us is 33 KB
SHARE_IN_FLIGHT = {torch.float32: 1, torch.bfloat16: 0.5, torch.float64: 0.1}  # who computes longer needs fewer
CANDIDATE_ENTRIES = (32, 16, 8, 4)  # per thread
NARROW_WARPS = (1, 4)  # of a program that takes several rows
LONGEST = {"forward": 16384, "backward": 8192, "forward_float64": 8192, "backward_float64": 4096}
WIDTHS = (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_triton", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", required=True)
    parser.add_argument("--targets", nargs="+", choices=COMPILED, default=list(COMPILED))
    options = parser.parse_args(arguments)
    from diffmax.kernels.triton.common.tuning import read_tables, write_tables
    from diffmax.testing.ahead_of_time import TARGETS

    for target in options.targets:
        runtime = TARGETS[target].backend
        tables = read_tables(FILES[runtime]) if FILES[runtime].exists() else {}
        before = tables.get(COMPILED[target])
        tables[COMPILED[target]] = replace(compiled_table(target), entries=before.entries if before else {})
        write_tables(FILES[runtime], tables)
    return 0


def compiled_table(target: str) -> Any:
    """The table for an architecture that need not be here."""
    from diffmax.kernels.triton.common.tuning import predicted_table
    from diffmax.testing.ahead_of_time import TARGETS

    lanes, most_warps = TARGETS[target].lanes, 1024 // TARGETS[target].lanes
    table = predicted_table(lanes=lanes, most_warps=most_warps)
    for kind, longest in LONGEST.items():
        tiles = {}
        for width in tqdm([1 << power for power in WIDTHS if 1 << power <= longest], desc=f"{target} {kind}"):
            fitting = next(
                (tile for tile in candidates(width, lanes, most_warps) if fits(target, table, kind, width, tile)), None
            )
            if fitting is None:
                break  # this width and longer ones are streamed
            tiles[width] = fitting
        table = replace(table, **{kind: tiles})
    return table


def candidates(width: int, lanes: int, most_warps: int) -> list[Any]:
    """Tiles for rows of a width, the one with the fewest warps first."""
    from diffmax.kernels.triton.common.tuning import Tile

    found = []
    for entries in CANDIDATE_ENTRIES:
        wide = width >= entries * lanes
        for warps in (width // (entries * lanes),) if wide else NARROW_WARPS:
            if warps <= most_warps:
                found.append(Tile(max(1, entries * lanes * warps // width), warps))
    return list(dict.fromkeys(found))


def fits(target: str, table: Any, kind: str, width: int, tile: Any) -> bool:
    """Whether the tile's kernels spill nothing and leave room for enough programs."""
    from diffmax.testing.ahead_of_time import TARGETS, recording

    lanes = TARGETS[target].lanes
    dtypes = (torch.float64,) if kind.endswith("float64") else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for resources in resources_of(target, table, kind, width, tile, dtype, recording):
            threads = tile.warps * lanes
            registers = threads * max(32, -(-resources["registers"] // 8) * 8)
            resident = min(PROGRAMS, THREADS // threads, REGISTERS[TARGETS[target].backend] // registers)
            in_flight = resident * tile.rows * width * min(4, dtype.itemsize)
            if resources["spilled"] or in_flight < BYTES_IN_FLIGHT * SHARE_IN_FLIGHT[dtype]:
                return False
    return True


def resources_of(
    target: str, table: Any, kind: str, width: int, tile: Any, dtype: torch.dtype, recording: Any
) -> list[dict[str, int]]:
    """Compile the kernels of a tile that use most registers: run-time exponents, alpha as a tensor and its gradient."""
    from diffmax.kernels.triton.rows.backward import bisect_bwd_rows_kernel
    from diffmax.kernels.triton.rows.forward import bisect_rows_kernel
    from diffmax.kernels.triton.rows.launch import RowOperator
    from diffmax.testing.ahead_of_time import TARGETS

    one = replace(table, **{kind: {width: tile}})
    operator = RowOperator(lambda _: one, lambda _: 1, ptx=TARGETS[target].backend == "cuda")
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, m = torch.zeros(tile.rows, width, dtype=dtype), torch.zeros(tile.rows, 1, dtype=acc)
    with recording(target, bisect_rows_kernel, bisect_bwd_rows_kernel) as launched:
        if kind.startswith("forward"):
            for e in (0.15, torch.full((tile.rows, 1), 0.3, dtype=acc)):
                operator.bisect(x, e, 1, 50, True)
        else:
            operator.bisect_backward(x, x, m, m, None, torch.full((tile.rows, 1), 0.3, dtype=acc), 1, True)
    return [compiled.resources for compiled in launched]


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main(sys.argv[1:]))
