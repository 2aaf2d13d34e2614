"""The cells that are measured: which operation, on which scores, by whom.

Every tensor has about `ELEMENTS` elements, so that a cell costs the same at any n and rows, not one row, are what is timed.
Three grids:

- default: softmax (eager, compiled) and diffmax everywhere in
    float32, one thread: every n, alpha and sigma; for the gradients the corners alpha 0.1, 0.5, 0.85 and sigma 1, 10;
    bfloat16, one thread: n = 64, 1024, 32768, alpha 0.1, 0.5, 0.85, sigma 1;
    float32, two threads: every n, alpha 0.3 and 0.85, sigma 1.
  The slow rivals (`RIVALS`) only where n = 1024, or in float32 with one thread and sigma 1.
- full: the product of everything. entmax15 still runs at alpha = 0.5 alone and sparsemax at `SPARSEMAX_NEIGHBOUR`, because
  they compute nothing else.
- quick: small tensors in two shapes, to see that everything runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

ELEMENTS = 1 << 19
QUICK_ELEMENTS = 1 << 14
SIZES = (16, 64, 336, 1024, 4096, 32768, 131072)
ALPHAS = (0.1, 0.3, 0.5, 0.85, 0.95)
SIGMAS = (1.0, 3.0, 10.0)
DTYPES = ("float32", "bfloat16")
RIVALS = ("entmax_bisect", "entmax15", "sparsemax")
SPARSEMAX_NEIGHBOUR = 0.1  # sparsemax is the limit alpha -> 0: it is timed beside the smallest alpha


@dataclass(frozen=True)
class Case:
    """One input and what is done with it: "forward", "backward" (of a graph that is kept) or "both"."""

    operation: str
    n: int
    rows: int
    alpha: float
    sigma: float
    dtype: str
    threads: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """N(0, sigma) scores and an N(0, 1) gradient for the weights; the same at every call."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.n, generator=generator) * self.sigma
        grad = torch.randn(self.rows, self.n, generator=generator)
        return x.to(self.torch_dtype), grad.to(self.torch_dtype)


def cases(operations: tuple[str, ...], grid: str, threads: tuple[int, ...]) -> Iterator[Case]:
    """The cells of a grid. Those that share a compiled softmax follow each other."""
    elements = QUICK_ELEMENTS if grid == "quick" else ELEMENTS
    for count, dtype, n in itertools.product(threads, DTYPES, SIZES):
        for operation, alpha, sigma in itertools.product(operations, ALPHAS, SIGMAS):
            case = Case(operation, n, max(1, elements // n), alpha, sigma, dtype, count)
            if grid == "full" or (_in_quick(case) if grid == "quick" else _in_default(case)):
                yield case


def takes_part(contestant: str, case: Case, grid: str) -> bool:
    """Whether a contestant is measured in a cell."""
    if contestant == "entmax15" and case.alpha != 0.5:
        return False
    if contestant == "sparsemax" and case.alpha != SPARSEMAX_NEIGHBOUR:
        return False
    if contestant not in RIVALS or grid != "default":
        return True
    return case.n == 1024 or (case.sigma == 1 and case.dtype == "float32" and case.threads == 1)


def _in_quick(case: Case) -> bool:
    return case.dtype == "float32" and case.n in (16, 1024) and case.alpha in (0.1, 0.5, 0.85) and case.sigma == 1


def _in_default(case: Case) -> bool:
    if case.threads > 1:
        return case.dtype == "float32" and case.sigma == 1 and case.alpha in (0.3, 0.85)
    if case.dtype != "float32":
        return case.n in (64, 1024, 32768) and case.sigma == 1 and case.alpha in (0.1, 0.5, 0.85)
    return case.operation == "forward" or (case.alpha in (0.1, 0.5, 0.85) and case.sigma in (1, 10))
