"""What `python -m diffmax selftest` checks of power attention."""

from __future__ import annotations

from functools import partial

import torch

from diffmax.testing.power import checks
from diffmax.testing.selftest import Check, checks_of_cases

_results = partial(checks_of_cases, "power_attention", checks.results_pass_the_gate, checks.CASES)
_gradients = partial(checks_of_cases, "power_attention_backward", checks.gradients_are_right_on_average, checks.CASES)


def _goes_on(backend: str, device: str, dtype: torch.dtype) -> None:
    """Token after token equals all at once."""
    checks.decoding_goes_on(backend, device, dtype)


CHECKS = (
    *_results("plain", "chunks", "gates", "grouped heads", "state in, state out", "degree 4"),
    Check("power_attention", _goes_on, frozenset({"gates", "state", "gqa"}), holds_for_reference=True),
    *_gradients("plain", "chunks that do not divide"),
)
