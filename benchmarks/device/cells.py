"""A cell: what is asked of a device at a time. Cells are data; `run` names the function that a worker calls with a context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REHEARSALS = {"interpret": "gpu", "npu-rehearsal": "npu"}  # kinds of runs without a device, and what they rehearse


def rehearsed(kind: str) -> bool:
    return kind in REHEARSALS


@dataclass(frozen=True)
class Cell:
    """One question.

    Attributes:
        id: Its name, the same in every run: what is resumed goes by it.
        run: "module:function" in benchmarks.device.
        case: The function's arguments.
        seconds: How long it, or one contestant of it, may take before it counts as hanging.
        kernels: What it compiles; of those that compile the same one is prepared ahead. "": it is not prepared.
    """

    id: str
    run: str
    case: dict[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    kernels: str = ""
