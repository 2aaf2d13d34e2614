"""What `python -m diffmax selftest` checks of threshold attention."""

from __future__ import annotations

from functools import partial

from diffmax.testing.selftest import checks_of_cases
from diffmax.testing.threshold import checks

_results = partial(checks_of_cases, "threshold_attention", checks.results_pass_the_gate, checks.CASES)
_gradients = partial(checks_of_cases, "threshold_attention_backward", checks.gradients_are_right_on_average, checks.CASES)

CHECKS = (
    *_results("rectified scores", "softmax", "bias", "grouped heads, value size", "padding", "window", "packed"),
    *_gradients("square above a threshold", "bias"),
)
