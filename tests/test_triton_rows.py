"""The shared Triton kernels over the conformance kit, on a CPU: Triton decides at its import whether it interprets.

So they run in a process of their own; `triton_interpreted.py` holds the tests.
"""

import pytest

from tests import interpreted


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("tier", "what"),
    [
        ("not slow", "TestRows and not special_alphas"),
        pytest.param("slow", "TestRows", marks=pytest.mark.slow),
        pytest.param("slow", "not TestRows", marks=pytest.mark.slow),
        pytest.param("not slow", "not TestRows or special_alphas", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_pass_under_the_interpreter(tier, what):
    interpreted.passes("triton_interpreted.py", tier, "-k", what, sample=40)
