"""What `python -m diffmax bench` times: `testing/<name>/bench.py` makes a `Bench`, which the operator's spec names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

HEADS, HEAD_DIM = 4, 64


class Case(NamedTuple):
    """One line of the table.

    Attributes:
        number, length: How many rows or heads, and how many scores each has.
        ours, theirs: What diffmax's function is called with, and what torch's.
    """

    number: int
    length: int
    ours: tuple[Tensor, ...]
    theirs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Bench:
    """A table: a function of diffmax beside one of torch.

    Attributes:
        title: Heads the table.
        counted: What `Case.number` counts.
        base: The name of torch's function.
        cases: Of a number of elements and a device.
        ours: Of a case's tensors, alpha and the name of a backend.
        theirs: Of a case's tensors.
        has_backward: Whether forward and backward are timed too.
    """

    title: str
    counted: str
    base: str
    cases: Callable[[int, str], Iterator[Case]]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    has_backward: bool = True
