"""The stages of a run, in their order, and the cells of each, for the kinds of machines that there are."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.device import cells_smoke, cells_timed, cells_tuning
from benchmarks.device.cells import Cell, rehearsed

KINDS = ("gpu", "npu", "interpret", "npu-rehearsal")
NAMES = ("ceilings", "smoke", "decisive", "kits", "tuning", "grid")
PREPARING = 12  # processes that compile side by side


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        share: Of the time that is left, in parts of what this and the later stages have.
        parallel: Workers at once; more than one only where nothing is timed.
        chunk: Cells of one worker.
        ahead: The share of its time in which kernels may be compiled side by side before it measures.
    """

    name: str
    share: float
    cells: tuple[Cell, ...]
    parallel: int = 1
    chunk: int = 1000
    ahead: float = 0.0


def of(kind: str) -> list[Stage]:
    """The stages for a kind of machine."""
    tiny = rehearsed(kind)
    ceilings = (*cells_timed.ceilings(kind),)
    found = [
        Stage("ceilings", 3, ceilings),
        Stage("smoke", 12, (*cells_smoke.cells(kind),), parallel=1 if tiny else 12, chunk=1000 if tiny else 16),
        Stage("decisive", 14, (*cells_timed.decisive(kind),), ahead=0 if tiny else 0.35, chunk=1000 if tiny else 8),
        Stage("kits", 10, (Cell("kits", ""),)),
        Stage("tuning", 9, (*cells_tuning.cells(kind),), ahead=0.5, chunk=1000 if tiny else 6),
        Stage("grid", 9, (*cells_timed.grid(kind),), ahead=0 if tiny else 0.25, chunk=1000 if tiny else 12),
    ]
    return [stage for stage in found if stage.cells]


def every_cell(kind: str) -> dict[str, Cell]:
    """By name; a name that is used twice is a mistake."""
    known: dict[str, Cell] = {}
    for stage in of(kind):
        for cell in stage.cells:
            if known.setdefault(cell.id, cell) is not cell:
                raise ValueError(f"stages: two cells are named {cell.id!r}")
    return known
