"""What a cell's function is given, and what it may raise."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import faults
from benchmarks.device.cells import Cell
from benchmarks.device.place import Place


class SkipError(Exception):
    """A cell or contestant that cannot be here, and why."""


class WrongError(AssertionError):
    """A result that is not right: the reason, and in figures by how much."""

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


@dataclass
class Context:
    """One cell's run.

    Attributes:
        without: Contestants to leave out, as they took the process with them.
        note: Tells the watcher that a contestant begins, and how long it may take.
        part: Writes a line for a contestant.
        prepare: Nothing is to be measured or judged: compile what the cell needs.
    """

    cell: Cell
    place: Place
    seed: int
    work: Path
    attempt: int = 1
    without: Collection[str] = ()
    prepare: bool = False
    note: Callable[[str | None, float], None] = lambda contestant, seconds: None
    part: Callable[..., None] = lambda *_, **__: None
    draws: int = field(default=0)

    def begin(self, contestant: str) -> None:
        """Say that a contestant begins."""
        self.note(contestant, self.cell.seconds)
        faults.begin(self.cell.id, contestant, self.attempt)

    def randn(self, *shape: int) -> torch.Tensor:
        """N(0, 1) in float32 on the device; drawn there where its generator is as good as torch's own."""
        where = self.place.device if self.place.device == "cuda" else "cpu"
        return torch.randn(shape, device=where, generator=self.generator(where)).to(self.place.device)

    def generator(self, device: str | None = None) -> torch.Generator:
        """Fresh numbers at each call, the same ones for the same seed."""
        self.draws += 1
        return torch.Generator(device or self.place.device).manual_seed(self.seed + 7919 * self.draws)


def seed_of(base: int, cell: str, attempt: int) -> int:
    return zlib.crc32(f"{base} {cell} {attempt}".encode())
