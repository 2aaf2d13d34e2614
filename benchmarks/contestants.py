"""Who is measured: diffmax, softmax eager and compiled, and the entmax package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import entmax
import torch
from torch import Tensor

import diffmax
from benchmarks.shapes import Case

Normalizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A map from scores to weights along the last axis.

    Attributes:
        name: What the results call it.
        build: Makes the function that is timed for a case; may compile.
        exact_e: The e = 1 - alpha at which `diffmax.reference` computes the same thing; 0 is softmax.
        ours: Held to the gate of our own kernels instead of the rivals' looser one.
    """

    name: str
    build: Callable[[Case], Normalizer]
    exact_e: Callable[[Case], float]
    ours: bool = False


def contestants() -> tuple[Contestant, ...]:
    """Everybody, the two yardsticks first: the ratios are to "softmax" and to "diffmax"."""
    return (
        Contestant("softmax", lambda case: lambda x: torch.softmax(x, -1), lambda case: 0.0),
        Contestant("diffmax", lambda case: lambda x: diffmax.diffmax_bisect(x, case.alpha), _own_e, ours=True),
        *(Contestant(f"diffmax[{name}]", functools.partial(_on_backend, name), _own_e, ours=True) for name in other_kernels()),
        Contestant("softmax_compiled", _compiled_softmax, lambda case: 0.0),
        Contestant("entmax_bisect", lambda case: lambda x: entmax.entmax_bisect(x, 2 - case.alpha), _own_e),
        Contestant("entmax15", lambda case: lambda x: entmax.entmax15(x, -1), lambda case: 0.5),
        Contestant("sparsemax", lambda case: lambda x: entmax.sparsemax(x, -1), lambda case: 1.0),
    )


def other_kernels() -> list[str]:
    """Backends made for the CPU that could run but are not preferred."""
    records = [r for r in diffmax.backends() if r.operator == "bisect" and r.device == "cpu"]
    return [r.backend for r in records if r.status == "available"]


def _own_e(case: Case) -> float:
    return 1.0 - case.alpha


def _on_backend(name: str, case: Case) -> Normalizer:
    e = 1.0 - case.alpha
    return lambda x: torch.ops.diffmax.bisect(x, e, None, x.ndim - 1, 50, True, name)[0]


def _compiled_softmax(case: Case) -> Normalizer:
    return _compile(case.operation == "forward", case.rows, case.n, case.dtype, case.threads)


@functools.lru_cache(maxsize=1)
def _compile(forward_only: bool, rows: int, n: int, dtype: str, threads: int) -> Normalizer:
    """One compilation per shape, not marked dynamic: the best code that the compiler has for it."""
    torch._dynamo.reset()  # else the limit on recompilations of one function is reached after a few shapes
    return torch.compile(lambda x: torch.softmax(x, -1), dynamic=False)
