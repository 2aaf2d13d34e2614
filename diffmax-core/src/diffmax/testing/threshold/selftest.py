"""What `python -m diffmax selftest` checks of threshold attention."""

from __future__ import annotations

import torch

from diffmax.testing.selftest import Check
from diffmax.testing.threshold import checks


def _check(name: str, gradients: bool = False) -> Check:
    case = checks.CASES[name]

    def run(backend: str, device: str, dtype: torch.dtype) -> None:
        check = checks.gradients_are_right_on_average if gradients else checks.results_pass_the_gate
        check(backend, device, case, dtype)

    run.__doc__ = name.capitalize()
    operator = "threshold_attention_backward" if gradients else "threshold_attention"
    return Check(operator, run, frozenset(case.features()))


CHECKS = (_check("rectified scores"), _check("bias"), _check("square above a threshold", gradients=True))
