"""What `python -m diffmax selftest` checks of attention."""

from __future__ import annotations

from functools import partial

import torch

from diffmax.testing.attention import checks
from diffmax.testing.selftest import Check, checks_of_cases

_results = partial(checks_of_cases, "attention", checks.forward_passes_the_gate, checks.CASES)
_gradients = partial(checks_of_cases, "attention_backward", checks.gradients_are_right_on_average, checks.CASES)


def _bad_queries(backend: str, device: str, dtype: torch.dtype) -> None:
    """Queries that see nothing, NaN, +inf."""
    checks.masked_and_bad_queries(backend, device, dtype)


def _packed(backend: str, device: str, dtype: torch.dtype) -> None:
    """Packed sequences, each on its own."""
    checks.packed_sequences_are_each_on_their_own(backend, device, dtype)


CHECKS = (
    *_results("plain", "one query", "head size 80", "scale", "causal, lower right", "grouped heads"),
    *_results("mask of queries and keys", "window", "sink", "softcap, bias, ALiBi"),
    Check("attention", _bad_queries, holds_for_reference=True),
    Check("attention", _packed, frozenset({"varlen"}), holds_for_reference=True),
    *_gradients("plain", "causal", "scale", "window", "grouped heads, causal, alpha per head"),
)
