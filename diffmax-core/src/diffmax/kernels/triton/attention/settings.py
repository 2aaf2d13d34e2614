"""Launch settings of attention's kernels per architecture: a table, whose first matching row is used.

An entry in a vendor's table (`common.tuning`) takes precedence. Each row has its origin: these settings were not timed, but
chosen by the compiler's figures for registers and shared memory (docs/kernels.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import torch

from diffmax.kernels.triton.common.launch import compiler_options, power_of_two


@dataclass(frozen=True)
class Settings:
    """Settings of a forward kernel. Tiles have 64 keys, and 64 queries unless `rows` says 128.

    Attributes:
        warps: Warps per program.
        stages: Pipeline stages: tiles in flight.
        programs: Programs per multiprocessor: they determine the grid and the size of the scratch buffers.
        keys: Keys processed at a time; of the first kernel, in its pass over all: 64 or 128.
        chunk: Entries of the head dimension multiplied at a time.
        values: Entries of the value dimension accumulated at a time.
        rows: Queries of a program of the second kernel, 64 or 128, which share the tiles that it loads; 64 of packed
            sequences.
        side: As in `common.launch.compiler_options`.
    """

    warps: int
    stages: int
    programs: int
    keys: int = 64
    chunk: int = 256
    values: int = 256
    rows: int = 64
    side: int = 0

    def with_few_rows(self) -> Settings:
        """Those of programs of 64 queries, with as many warps for each, at least four."""
        times = self.rows // 64
        return replace(self, rows=64, warps=max(4, self.warps // times), programs=self.programs * times) if times > 1 else self


@dataclass(frozen=True)
class Block:
    """Settings of a backward kernel, and its tile.

    Attributes:
        rows, keys: Queries and keys of a tile.
        warps: Warps per program.
        stages: Pipeline stages: tiles in flight.
        chunk: Entries of the head dimension multiplied at a time; at most the whole head.
        side: As in `Settings`.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    chunk: int = 256
    side: int = 0

    def with_few_rows(self) -> Block:
        """That of programs of 64 queries, with as many warps for each, at least four."""
        return replace(self, rows=64, warps=max(4, self.warps * 64 // self.rows)) if self.rows > 64 else self

    def arguments(self) -> dict[str, int]:
        """The settings as launch arguments."""
        tile = {"BLOCK_M": self.rows, "BLOCK_N": self.keys, "CHUNK": self.chunk}
        return tile | compiled_with(self)


def compiled_with(settings: Settings | Block) -> dict[str, int]:
    """What the compiler has to know, as launch arguments."""
    return compiler_options(settings.warps, settings.stages, settings.side)


class Forward(NamedTuple):
    """The settings of the two forward kernels, and those of the second where it computes U too, unless they are the same."""

    solve: Settings
    output: Settings
    training: Settings | None = None

    def output_of(self, keep: bool) -> Settings:
        """The settings of the second kernel. keep: whether it computes U."""
        return self.training if keep and self.training is not None else self.output

    def with_few_rows(self) -> Forward:
        """Those whose programs have 64 queries."""
        return Forward(
            self.solve, self.output.with_few_rows(), None if self.training is None else self.training.with_few_rows()
        )


class Backward(NamedTuple):
    """The settings of the three backward kernels."""

    dq: Block
    dkv: Block
    dbias: Block

    def with_few_rows(self) -> Backward:
        """Those whose programs for dQ have 64 queries at most."""
        return self._replace(dq=self.dq.with_few_rows())

    def without_overlap(self) -> Backward:
        """The same settings with one stage.

        For masks and dropout on AMD: with two stages Triton 3.9 fails on gfx90a and gfx942, "shared-memory element type bit
        width must be a multiple of 8; got 1". 3.6 and 3.7 do not.
        """
        return Backward(*(replace(block, stages=1) for block in self))


Launches = TypeVar("Launches", Forward, Backward)


@dataclass(frozen=True)
class Rule(Generic[Launches]):
    """A row of the table.

    Attributes:
        family: Family of architectures, see `_families`.
        dtypes: Dtypes of the queries.
        most: Largest padded head dimension.
        launches: Settings of the kernels.
        extras: Whether it is for calls with a mask, bias, ALiBi, softcap or dropout, which need more registers; None for both.
        origin: The origin of the numbers.
    """

    family: str
    dtypes: tuple[torch.dtype, ...]
    most: int
    launches: Launches
    extras: bool | None = None
    origin: str = "predicted by decision 0055: the compiler spills nothing or little"


def _tiles(dq: Block, dkv: Block) -> Backward:
    # dbias keeps a tile in the shape of the bias in registers
    return Backward(dq, dkv, Block(min(dq.rows, 32), min(dq.keys, 32), dq.warps, 1, dq.chunk, dkv.side))


NARROW = (torch.float16, torch.bfloat16)
FLOAT16, BFLOAT16, WIDE = (torch.float16,), (torch.bfloat16,), (torch.float32,)

_COUNTED = "predicted by decision 0090: the fewest instructions per score"
_ONCE = "predicted by decision 0137: no warp computes what another does"
FORWARD = (
    Rule("mma", WIDE, 256, Forward(Settings(8, 1, 1, chunk=32), Settings(4, 1, 2, 16, 32, 32)), extras=True, origin=_ONCE),
    Rule("mma", WIDE, 256, Forward(Settings(4, 1, 2, chunk=16), Settings(4, 1, 2, 16, 32, 32)), origin=_ONCE),
    Rule("nvidia", WIDE, 256, Forward(Settings(8, 1, 1, chunk=32), Settings(8, 1, 1, keys=16, chunk=32, values=32))),
    Rule("nvidia", NARROW, 256, Forward(Settings(8, 1, 1, chunk=64), Settings(8, 1, 1, 16, 64, values=128)), extras=True),
    # four warps are one group, whose tile has 64 rows; of eight, half do the work of the others again
    Rule("sm90", NARROW, 64, Forward(Settings(4, 2, 2, keys=128), Settings(8, 2, 1, rows=128)), origin=_COUNTED),
    Rule("sm90", NARROW, 128, Forward(Settings(4, 2, 2), Settings(8, 2, 1, keys=32, rows=128)), origin=_COUNTED),
    # float16 scales weights up, which takes registers
    Rule("nvidia", FLOAT16, 64, Forward(Settings(4, 2, 2), Settings(8, 2, 1, keys=32))),
    Rule("nvidia", BFLOAT16, 64, Forward(Settings(4, 2, 2), Settings(4, 2, 2), Settings(4, 2, 2, keys=32)), origin=_COUNTED),
    Rule("nvidia", NARROW, 128, Forward(Settings(8, 2, 1), Settings(8, 2, 1, keys=32))),
    Rule("nvidia", NARROW, 256, Forward(Settings(8, 1, 1, chunk=64), Settings(8, 1, 1, keys=32, chunk=64, values=128))),
    # an instruction's result is 32 by 32: a warp of four would do the work of another again
    Rule("cdna", WIDE, 256, Forward(Settings(4, 1, 1, chunk=64), Settings(4, 1, 1, 32, 64, 64, side=16)), extras=True),
    Rule("cdna", WIDE, 256, Forward(Settings(4, 1, 1, chunk=64), Settings(2, 1, 2, keys=32, chunk=64, values=64))),
    Rule("cdna", NARROW, 256, Forward(Settings(4, 1, 2, chunk=64), Settings(4, 1, 1, keys=32, chunk=64, side=16)), extras=True),
    Rule("cdna", NARROW, 128, Forward(Settings(4, 1, 2, keys=128), Settings(2, 1, 2, keys=32)), origin=_COUNTED),
    Rule("cdna", NARROW, 256, Forward(Settings(4, 1, 2, chunk=64), Settings(4, 1, 1, keys=32, chunk=64, side=16))),
    Rule("rdna", WIDE, 256, Forward(Settings(16, 1, 1, chunk=16), Settings(16, 1, 1, keys=16, chunk=16, values=64))),
    Rule("rdna", NARROW, 64, Forward(Settings(8, 1, 1), Settings(8, 1, 1, keys=32)), extras=False),
    Rule("rdna", NARROW, 256, Forward(Settings(16, 1, 1, chunk=32), Settings(4, 1, 2, 16, 32, values=128)), origin=_ONCE),
)

_LARGEST = "predicted by decision 0091: the fewest instructions per score without spills"
_SMALLER = "predicted by decision 0057: the largest tiles that no compiler spills"
BACKWARD = tuple(
    Rule(family, dtypes, most, _tiles(dq, dkv), extras=True, origin=_SMALLER)
    for family, dtypes, most, dq, dkv in (
        ("mma", NARROW, 64, Block(32, 32, 4, 2), Block(32, 64, 4, 1)),
        ("sm90", NARROW, 64, Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        ("sm90", NARROW, 128, Block(64, 32, 4, 2), Block(16, 64, 4, 2)),
        ("sm100", NARROW, 64, Block(32, 32, 4, 2), Block(32, 64, 4, 2)),
        ("sm100", NARROW, 128, Block(64, 32, 8, 2), Block(32, 64, 8, 1)),
        ("cdna", NARROW, 128, Block(64, 32, 4, 1, side=16), Block(32, 64, 4, 1, side=16)),
    )
) + tuple(
    Rule(family, dtypes, most, _tiles(dq, dkv), origin=_LARGEST)
    for family, dtypes, most, dq, dkv in (
        ("mma", NARROW, 64, Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        ("mma", NARROW, 128, Block(64, 32, 4, 2), Block(64, 64, 8, 1)),
        ("mma", NARROW, 256, Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        ("sm90", NARROW, 64, Block(128, 64, 8, 2), Block(64, 64, 4, 2)),
        ("sm90", NARROW, 128, Block(128, 64, 8, 2), Block(32, 64, 4, 1)),
        ("sm90", NARROW, 256, Block(32, 32, 8, 2), Block(32, 32, 8, 1)),
        ("sm100", NARROW, 64, Block(64, 64, 4, 2), Block(64, 64, 4, 2)),
        ("sm100", NARROW, 128, Block(64, 32, 8, 2), Block(32, 64, 4, 1)),
        ("sm100", NARROW, 256, Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        ("cdna", NARROW, 128, Block(64, 64, 4, 2, side=16), Block(32, 64, 4, 2, side=16)),
        ("cdna", NARROW, 256, Block(32, 32, 2, 1, side=16), Block(32, 32, 2, 1, 128, side=16)),
        ("rdna", NARROW, 256, Block(64, 16, 4, 1), Block(16, 64, 4, 1)),
        ("mma", WIDE, 64, Block(32, 32, 8, 1), Block(32, 16, 8, 1)),
        ("mma", WIDE, 128, Block(32, 32, 8, 1, 32), Block(32, 32, 8, 1)),
        ("mma", WIDE, 256, Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
        ("sm90", WIDE, 64, Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        ("sm90", WIDE, 128, Block(16, 16, 8, 1), Block(32, 32, 8, 1)),
        ("sm90", WIDE, 256, Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
        ("sm100", WIDE, 64, Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        ("sm100", WIDE, 128, Block(16, 16, 8, 1), Block(32, 32, 8, 1)),
        ("sm100", WIDE, 256, Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
        ("cdna", WIDE, 64, Block(32, 32, 2, 1, side=16), Block(32, 32, 2, 1, side=16)),
        ("cdna", WIDE, 128, Block(32, 32, 2, 1, side=16), Block(32, 32, 2, 1, side=16)),
        ("cdna", WIDE, 256, Block(32, 32, 2, 1, 64, side=16), Block(16, 32, 2, 1, 64, side=16)),
        ("rdna", WIDE, 64, Block(16, 16, 8, 1), Block(16, 16, 8, 1)),
        ("rdna", WIDE, 128, Block(16, 16, 8, 1, 16), Block(16, 16, 8, 1, 16)),
        ("rdna", WIDE, 256, Block(16, 16, 8, 1, 16), Block(16, 16, 16, 1, 16)),
    )
)


def forward_settings(architecture: str, dtype: torch.dtype, size: int, extras: bool) -> Forward:
    """The settings of the two forward kernels.

    Args:
        architecture: Such as "sm90" or "gfx942"; an unknown one gets the settings of the nearest.
        dtype: Dtype of the queries.
        size: The larger head dimension of queries and values.
        extras: Whether the call has a mask, bias, ALiBi, softcap or dropout.
    """
    return _first(FORWARD, architecture, dtype, size, extras)


def backward_blocks(architecture: str, dtype: torch.dtype, size: int, extras: bool = False) -> Backward:
    """The settings of the three backward kernels, with the same arguments."""
    return _first(BACKWARD, architecture, dtype, size, extras)


def partial_sums(architecture: str) -> int:
    """How many partial sums the kernels have of a row: entries that a thread of a matrix unit holds are so far apart.

    RDNA's need 16 besides: Triton 3.6 and 3.7 do not compile a branch that gives fewer columns than an instruction has.
    """
    return 16 if "rdna" in _families(architecture) else 8


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
