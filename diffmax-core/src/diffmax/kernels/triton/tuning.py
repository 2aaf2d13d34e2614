"""How rows are cut into programs: what a vendor's tables hold for each architecture, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tile:
    """Rows of one width in one program.

    Attributes:
        rows: Rows per program.
        warps: Warps per program.
        keep: Forward only: keep the last evaluation in registers until the weights are written, rather than repeat it.
    """

    rows: int
    warps: int
    keep: bool = True


@dataclass(frozen=True)
class Table:
    """The tiles of one architecture.

    Attributes:
        origin: Where the numbers come from: "predicted", or the result file of the run that measured them.
        forward, backward: The padded length of a row (a power of two) to its tile. Longer rows are streamed.
        forward_float64, backward_float64: The same for float64.
        stream_block, stream_warps: The tile of a row that is streamed; for float64 half the block.
        adjacent_elements: Entries per program where neighbouring rows, not the entries of a row, lie side by side in memory.
    """

    origin: str
    forward: Mapping[int, Tile]
    backward: Mapping[int, Tile]
    forward_float64: Mapping[int, Tile]
    backward_float64: Mapping[int, Tile]
    stream_block: int
    stream_warps: int
    adjacent_elements: int

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Table:
        """From what `plain` returned."""
        tiles = {name: {int(n): Tile(*tile) for n, tile in plain[name].items()} for name in TILES}
        return cls(**{**plain, **tiles})

    def plain(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return asdict(self) | {name: {str(n): [*asdict(t).values()] for n, t in getattr(self, name).items()} for name in TILES}


TILES = ("forward", "backward", "forward_float64", "backward_float64")


def read_tables(path: Path) -> dict[str, Table]:
    """The tables of a file, by architecture."""
    return {name: Table.of(plain) for name, plain in json.loads(path.read_text(encoding="utf-8")).items()}


def write_tables(path: Path, tables: Mapping[str, Table]) -> None:
    """Write them, one line for each kind of tile, so that a diff shows what changed."""
    blocks = []
    for name, table in sorted(tables.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.plain().items())
        blocks.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def predicted_table(*, lanes: int, most_warps: int) -> Table:
    """The table that counting registers suggests, before a compiler or a clock has seen it.

    A thread holds 16 entries of a row and what was computed of them, 32 where that saves adding up over warps, 8 in float64.

    Args:
        lanes: Threads of a warp.
        most_warps: Warps that one program can have.
    """

    def tiles(longest: int, single: int, shared: int) -> dict[int, Tile]:
        result = {}
        for n in (1 << power for power in range(4, longest.bit_length())):
            per_thread = single if n <= single * lanes else shared
            result[n] = Tile(max(1, per_thread * lanes // n), min(most_warps, max(1, n // (per_thread * lanes))))
        return result

    return Table(
        origin="predicted",
        forward=tiles(16384, 32, 16),
        backward=tiles(8192, 32, 16),
        forward_float64=tiles(4096, 8, 8),
        backward_float64=tiles(4096, 8, 8),
        stream_block=8192,
        stream_warps=most_warps,
        adjacent_elements=4096,
    )
