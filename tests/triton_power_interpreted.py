"""Power attention's Triton kernels under Triton's interpreter: `test_triton_power.py` runs this file."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffmax.plugin import PowerCall
from diffmax.testing.interpreter import harden, quicken
from diffmax.testing.power import checks
from diffmax.testing.power.checks import Case

harden()
quicken()

sys.path.insert(0, str(Path(__file__).parent))
import triton_power_backend as backend

backend.register()
NAME = backend.NAME
NARROW = [torch.float16, torch.bfloat16]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton 3.6's loops
]

CASES = {
    **checks.CASES,
    "head size 8": Case(head_dim=8, value_dim=24, many=40, gates=1.0, chunk=16),
    "head size 24": Case(head_dim=24, value_dim=8, many=40, gates=1.0, chunk=33),
    "head size 32, degree 4": Case(heads=1, kv_heads=1, head_dim=32, value_dim=5, many=20, degree=4, chunk=16),
    "one state of many": Case(heads=1, kv_heads=1, head_dim=8, value_dim=130, many=20, final=True, gates=1.0, chunk=8),
    "resets": Case(gates=-60.0, chunk=32),
    "tail in the middle of a chunk": Case(length=21, many=50, gates=1.0, chunk=16, heads=4),
}


@pytest.mark.parametrize("name", CASES)
def test_results(name):
    checks.results_pass_the_gate(NAME, "cpu", CASES[name], torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    checks.gradients_are_right_on_average(NAME, "cpu", CASES[name], torch.float32)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_of_narrow_numbers(name, dtype):
    checks.results_pass_the_gate(NAME, "cpu", CASES[name], dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_narrow_numbers(name, dtype):
    checks.gradients_are_right_on_average(NAME, "cpu", CASES[name], dtype)
