"""What `python -m diffmax bench` times of the row operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffmax.operators.rows.api import diffmax_bisect
from diffmax.testing.bench import Bench, Case

LENGTHS = (64, 1024, 16384)


def _cases(elements: int, device: str) -> Iterator[Case]:
    for length in LENGTHS:
        x = torch.randn(elements // length, length, device=device)
        yield Case(x.shape[0], length, (x,), (x,))


BENCH = Bench(
    title="diffmax_bisect",
    counted="rows",
    base="softmax",
    cases=_cases,
    ours=lambda x, alpha, backend: diffmax_bisect(x, alpha, backend=backend),
    theirs=lambda x: torch.softmax(x, -1),
)
