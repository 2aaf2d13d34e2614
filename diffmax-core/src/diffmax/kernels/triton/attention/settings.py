"""How attention's kernels are launched on each architecture: one table, whose first row that fits a call counts.

An entry of a vendor's own table (`common.tuning`) goes before it. Each row says where it comes from: no clock has seen these,
they are chosen by what the compiler says of registers and shared memory (docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import torch

from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS, power_of_two


@dataclass(frozen=True)
class Settings:
    """The launch of a forward kernel. Tiles are 64 by 64; what differs is who shares one.

    Attributes:
        warps: Warps of a program.
        stages: How many tiles are under way at once.
        programs: Programs per multiprocessor: the grid, and with it the scratch.
        keys: Keys that are looked at together.
        chunk: Entries of a head that are multiplied at a time.
        values: Entries of the values that a program sums at a time.
    """

    warps: int
    stages: int
    programs: int
    keys: int = 64
    chunk: int = 256
    values: int = 256


@dataclass(frozen=True)
class Block:
    """The launch of a backward kernel, and its tile.

    Attributes:
        rows, keys: Queries and keys.
        warps: Warps of a program.
        stages: How many tiles are under way at once.
        chunk: Entries of a head that are multiplied at a time; the whole head, if it has no more.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    chunk: int = 256

    def arguments(self) -> dict[str, int]:
        """As a launch takes them."""
        tile = {"BLOCK_M": self.rows, "BLOCK_N": self.keys, "CHUNK": self.chunk}
        return tile | {"num_warps": self.warps, "num_stages": self.stages, **COMPILER_OPTIONS}


class Forward(NamedTuple):
    """The launches of the two forward kernels."""

    solve: Settings
    output: Settings


class Backward(NamedTuple):
    """The launches of the three backward kernels."""

    dq: Block
    dkv: Block
    dbias: Block

    def without_overlap(self) -> Backward:
        """The same, one tile after the other.

        For masks and dropout on AMD: with two stages Triton 3.9 fails on gfx90a and gfx942, "shared-memory element type bit
        width must be a multiple of 8; got 1". 3.6 and 3.7 do not.
        """
        return Backward(*(replace(block, stages=1) for block in self))


Launches = TypeVar("Launches", Forward, Backward)


@dataclass(frozen=True)
class Rule(Generic[Launches]):
    """A row of the table.

    Attributes:
        family: Of architectures: `_families`.
        dtypes: Of the queries.
        most: Entries of a head, padded, at most.
        launches: Of the kernels.
        extras: Whether it is for calls with a mask, bias, ALiBi, softcap or dropout, which need registers too; None for both.
        origin: Where the numbers come from.
    """

    family: str
    dtypes: tuple[torch.dtype, ...]
    most: int
    launches: Launches
    extras: bool | None = None
    origin: str = "predicted by decision 0055: the compiler spills nothing or little"


def _tiles(dq: Block, dkv: Block) -> Backward:
    # dbias keeps a tile of the bias's own shape in registers
    return Backward(dq, dkv, Block(min(dq.rows, 32), min(dq.keys, 32), dq.warps, 1, dq.chunk))


NARROW = (torch.float16, torch.bfloat16)
FLOAT16, BFLOAT16, WIDE = (torch.float16,), (torch.bfloat16,), (torch.float32,)

FORWARD = (
    Rule("nvidia", WIDE, 256, Forward(Settings(8, 1, 1, chunk=32), Settings(8, 1, 1, keys=16, chunk=32, values=32))),
    Rule("nvidia", NARROW, 256, Forward(Settings(8, 1, 1, chunk=64), Settings(8, 1, 1, 16, 64, values=128)), extras=True),
    # float16 scales its weights up, which takes registers
    Rule("nvidia", FLOAT16, 64, Forward(Settings(4, 2, 2), Settings(8, 2, 1, keys=32))),
    Rule("nvidia", BFLOAT16, 64, Forward(Settings(4, 2, 2), Settings(4, 2, 2, keys=32))),
    Rule("nvidia", NARROW, 128, Forward(Settings(8, 2, 1), Settings(8, 2, 1, keys=32))),
    Rule("nvidia", NARROW, 256, Forward(Settings(8, 1, 1, chunk=64), Settings(8, 1, 1, keys=32, chunk=64, values=128))),
    Rule("cdna", WIDE, 256, Forward(Settings(4, 1, 1, chunk=64), Settings(4, 1, 1, keys=32, chunk=64, values=64))),
    Rule("cdna", NARROW, 256, Forward(Settings(4, 1, 2, chunk=64), Settings(4, 1, 1, keys=32, chunk=64)), extras=True),
    Rule("cdna", NARROW, 128, Forward(Settings(4, 1, 2), Settings(4, 1, 1, keys=32))),
    Rule("cdna", NARROW, 256, Forward(Settings(4, 1, 2, chunk=64), Settings(4, 1, 1, keys=32, chunk=64))),
    Rule("rdna", WIDE, 256, Forward(Settings(16, 1, 1, chunk=16), Settings(16, 1, 1, keys=16, chunk=16, values=16))),
    Rule("rdna", NARROW, 64, Forward(Settings(8, 1, 1), Settings(8, 1, 1, keys=32)), extras=False),
    Rule("rdna", NARROW, 256, Forward(Settings(16, 1, 1, chunk=32), Settings(16, 1, 1, keys=32, chunk=32, values=32))),
)

_LARGEST = "predicted by decision 0057: the largest tiles that no compiler spills"
BACKWARD = tuple(
    Rule(family, dtypes, most, _tiles(dq, dkv), origin=_LARGEST)
    for family, dtypes, most, dq, dkv in (
        ("mma", NARROW, 64, Block(32, 32, 4, 2), Block(32, 64, 8, 2)),
        ("mma", NARROW, 128, Block(64, 64, 8, 2), Block(32, 64, 8, 2)),
        ("mma", NARROW, 256, Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        ("sm90", NARROW, 64, Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        ("sm90", NARROW, 128, Block(64, 32, 4, 2), Block(16, 64, 4, 2)),
        ("sm90", NARROW, 256, Block(32, 32, 8, 2), Block(32, 32, 8, 1)),
        ("sm100", NARROW, 64, Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        ("sm100", NARROW, 128, Block(64, 32, 8, 2), Block(32, 64, 8, 1)),
        ("sm100", NARROW, 256, Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        ("cdna", NARROW, 64, Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        ("cdna", NARROW, 128, Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        ("cdna", NARROW, 256, Block(32, 16, 8, 1), Block(16, 32, 8, 1)),
        ("rdna", NARROW, 64, Block(32, 32, 4, 1), Block(16, 32, 4, 1)),
        ("rdna", NARROW, 128, Block(16, 16, 4, 1, 32), Block(16, 16, 8, 1, 16)),
        ("rdna", NARROW, 256, Block(16, 16, 8, 1, 16), Block(16, 16, 16, 1, 16)),
        ("mma", WIDE, 64, Block(32, 32, 8, 1), Block(32, 16, 8, 1)),
        ("mma", WIDE, 128, Block(32, 32, 8, 1, 32), Block(32, 32, 8, 1)),
        ("mma", WIDE, 256, Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
        ("sm90", WIDE, 64, Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        ("sm90", WIDE, 128, Block(16, 16, 8, 1), Block(32, 32, 8, 1)),
        ("sm90", WIDE, 256, Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
        ("sm100", WIDE, 64, Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        ("sm100", WIDE, 128, Block(16, 16, 8, 1), Block(32, 32, 8, 1)),
        ("sm100", WIDE, 256, Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
        ("cdna", WIDE, 64, Block(32, 32, 4, 1), Block(32, 32, 4, 1)),
        ("cdna", WIDE, 128, Block(32, 16, 8, 1), Block(16, 32, 8, 1)),
        ("cdna", WIDE, 256, Block(16, 16, 8, 1), Block(16, 16, 8, 1)),
        ("rdna", WIDE, 64, Block(16, 16, 8, 1, 16), Block(16, 16, 8, 1, 16)),
        ("rdna", WIDE, 128, Block(16, 16, 8, 1, 16), Block(16, 16, 8, 1, 16)),
        ("rdna", WIDE, 256, Block(16, 16, 8, 1, 16), Block(16, 16, 16, 1, 16)),
    )
)


def forward_settings(architecture: str, dtype: torch.dtype, size: int, extras: bool) -> Forward:
    """For the two forward kernels.

    Args:
        architecture: Such as "sm90" or "gfx942"; a new one is like its nearest.
        dtype: Of the queries.
        size: The larger of the entries of a query and of a value.
        extras: Whether the call has a mask, bias, ALiBi, softcap or dropout.
    """
    return _first(FORWARD, architecture, dtype, size, extras)


def backward_blocks(architecture: str, dtype: torch.dtype, size: int) -> Backward:
    """For the three backward kernels, likewise."""
    return _first(BACKWARD, architecture, dtype, size, False)


def _first(table: tuple[Rule[Launches], ...], architecture: str, dtype: torch.dtype, size: int, extras: bool) -> Launches:
    families, size = _families(architecture), power_of_two(size)
    return next(
        rule.launches
        for rule in table
        if rule.family in families and dtype in rule.dtypes and size <= rule.most and rule.extras in (None, extras)
    )


def _families(architecture: str) -> tuple[str, ...]:
    """mma: the matrix instructions of sm80 to sm89 and of sm120. cdna: wavefronts of 64 lanes; rdna: of 32."""
    if architecture.startswith("gfx"):
        return ("cdna",) if architecture.startswith("gfx9") else ("rdna",)
    number = int(architecture.removeprefix("sm"))
    return "nvidia", "sm90" if 90 <= number < 100 else "sm100" if 100 <= number < 120 else "mma"
