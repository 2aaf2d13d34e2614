"""What `python -m diffmax selftest` checks of power attention."""

from __future__ import annotations

import torch

from diffmax.testing.power import checks
from diffmax.testing.selftest import Check


def _power(*names: str, gradients: bool = False) -> Check:
    cases = [checks.CASES[name] for name in names]

    def run(backend: str, device: str, dtype: torch.dtype) -> None:
        check = checks.gradients_are_right_on_average if gradients else checks.results_pass_the_gate
        for case in cases:
            check(backend, device, case, dtype)

    run.__doc__ = "; ".join(names).capitalize()
    features = frozenset[str]().union(*(case.features() for case in cases))
    return Check("power_attention_backward" if gradients else "power_attention", run, features)


def _goes_on(backend: str, device: str, dtype: torch.dtype) -> None:
    """Token after token equals all at once."""
    checks.decoding_goes_on(backend, device, dtype)


CHECKS = (
    _power("plain", "chunks"),
    _power("grouped heads", "state in, state out"),
    _power("degree 4"),
    Check("power_attention", _goes_on, frozenset({"gates", "state", "gqa"}), holds_for_reference=True),
    _power("chunks that do not divide", gradients=True),
)
