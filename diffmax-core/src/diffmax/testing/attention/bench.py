"""What `python -m diffmax bench` times of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffmax.operators.attention.api import attention
from diffmax.testing.bench import HEAD_DIM, HEADS, Bench, Case

LENGTHS = (256, 1024)


def _cases(elements: int, device: str) -> Iterator[Case]:
    longest = max(64, int(elements**0.5) * 2)
    for length in (min(length, longest) for length in LENGTHS):
        given = tuple(torch.randn(3, 1, HEADS, length, HEAD_DIM, device=device).unbind())
        yield Case(HEADS, length, given, given)


BENCH = Bench(
    title="attention, causal",
    counted="heads",
    base="sdpa",
    cases=_cases,
    ours=lambda q, k, v, alpha, backend: attention(q, k, v, is_causal=True, alpha=alpha, backend=backend),
    theirs=lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
)
