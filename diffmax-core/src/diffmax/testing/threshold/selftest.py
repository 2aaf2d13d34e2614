"""What `python -m diffmax selftest` checks of threshold attention."""

from __future__ import annotations

from functools import partial

from diffmax.testing.selftest import check_of_cases
from diffmax.testing.threshold import checks

_results = partial(check_of_cases, "threshold_attention", checks.results_pass_the_gate, checks.CASES)
_gradients = partial(check_of_cases, "threshold_attention_backward", checks.gradients_are_right_on_average, checks.CASES)

CHECKS = (_results("rectified scores"), _results("bias"), _gradients("square above a threshold"))
