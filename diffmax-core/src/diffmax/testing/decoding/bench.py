"""What `python -m diffmax bench` times of attention over a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffmax.operators.decoding.api import attention_with_kvcache
from diffmax.testing.bench import HEAD_DIM, HEADS, Bench, Case

LENGTHS = (1024, 16384)


def _cases(elements: int, device: str) -> Iterator[Case]:
    for length in (min(length, elements) for length in LENGTHS):
        given = tuple(torch.randn(1, size, HEADS, HEAD_DIM, device=device) for size in (1, length, length))
        yield Case(HEADS, length, given, tuple(t.transpose(1, 2) for t in given))


BENCH = Bench(
    title="decoding one token",
    counted="heads",
    base="sdpa",
    cases=_cases,
    ours=lambda q, k, v, alpha, backend: attention_with_kvcache(q, k, v, alpha=alpha, backend=backend),
    theirs=lambda q, k, v: scaled_dot_product_attention(q, k, v),
    has_backward=False,
)
