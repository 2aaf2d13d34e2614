"""What `python -m diffmax bench` times of power attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffmax.operators.power.api import power_attention
from diffmax.testing.bench import HEADS, Bench, Case

LENGTHS = (1024, 16384)
HEAD_DIM = 32


def _cases(elements: int, device: str) -> Iterator[Case]:
    for length in (min(length, elements) for length in LENGTHS):
        given = tuple(torch.randn(1, HEADS, length, HEAD_DIM, device=device) for _ in range(3))
        yield Case(HEADS, length, given, given)


BENCH = Bench(
    title="power attention of degree 2",
    counted="heads",
    base="sdpa",
    cases=_cases,
    ours=lambda query, key, value, alpha, backend: power_attention(query, key, value, backend=backend),
    theirs=lambda query, key, value: scaled_dot_product_attention(query, key, value, is_causal=True),
)
