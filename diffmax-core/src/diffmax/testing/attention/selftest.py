"""What `python -m diffmax selftest` checks of attention."""

from __future__ import annotations

import torch

from diffmax.testing.attention import checks
from diffmax.testing.selftest import Check


def _attention(*names: str, gradients: bool = False) -> Check:
    cases = [checks.CASES[name] for name in names]

    def run(backend: str, device: str, dtype: torch.dtype) -> None:
        for case in cases:
            if gradients:
                checks.gradients_are_right_on_average(backend, device, case, dtype)
            else:
                checks.forward_passes_the_gate(backend, device, case, dtype)

    run.__doc__ = "; ".join(names).capitalize()
    features = frozenset[str]().union(*(case.features() for case in cases))
    return Check("attention_backward" if gradients else "attention", run, features)


def _bad_queries(backend: str, device: str, dtype: torch.dtype) -> None:
    """Queries that see nothing, NaN, +inf."""
    checks.masked_and_bad_queries(backend, device, dtype)


def _packed(backend: str, device: str, dtype: torch.dtype) -> None:
    """Packed sequences, each on its own."""
    checks.packed_sequences_are_each_on_their_own(backend, device, dtype)


CHECKS = (
    _attention("plain", "one query", "head size 80"),
    _attention("causal, lower right", "mask of queries and keys", "grouped heads"),
    _attention("sink", "softcap, bias, ALiBi"),
    Check("attention", _bad_queries, holds_for_reference=True),
    Check("attention", _packed, frozenset({"varlen"}), holds_for_reference=True),
    _attention("plain", "causal", gradients=True),
    _attention("grouped heads, causal, alpha per head", gradients=True),
)
