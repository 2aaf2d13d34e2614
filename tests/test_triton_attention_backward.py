"""Attention's Triton backward against the reference, on a CPU: Triton decides at its import whether it interprets.

So the tests run in a process of their own; `triton_attention_interpreted.py` holds them.
"""

import pytest

from tests import interpreted


@pytest.mark.interpreter
@interpreted.in_tiers
def test_the_kernels_pass_under_the_interpreter(tier):
    interpreted.passes("triton_attention_interpreted.py", tier, sample=80)
