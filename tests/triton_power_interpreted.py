"""Power attention's Triton kernels under Triton's interpreter: `test_triton_power.py` runs this file."""

import sys
from pathlib import Path

import pytest
import torch

from diffmax.plugin import PowerCall, PowerWanted
from diffmax.testing.interpreter import harden, quicken
from diffmax.testing.power import checks
from diffmax.testing.power.checks import Case

harden()
quicken()

sys.path.insert(0, str(Path(__file__).parent))
import triton_power_backend as backend

backend.register()
NAME, operator = backend.NAME, backend.operator

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton 3.6's loops
]

# the first case of a test runs in the fast tier
CASES = {
    "all at once": Case(kv_heads=1, many=37, head_dim=8, value_dim=5, gates=1.0, state=True, final=True, chunk=23),
    **checks.CASES,
    "head size 24": Case(head_dim=24, value_dim=8, many=40, gates=1.0, chunk=33),
    "more values than a program of the update": Case(
        heads=1, kv_heads=1, head_dim=8, value_dim=130, many=20, final=True, chunk=8
    ),
    "resets": Case(gates=-60.0, chunk=32),
    "tail in the middle of a chunk": Case(length=21, many=50, gates=1.0, chunk=16, heads=4),
}
every_case = pytest.mark.parametrize("name", CASES)
# An interpreted program takes as long as it has monomials, not tokens: of thousands the results are enough, for "degree 4" has
# the same kernels. Of narrow numbers every third case in float16 tells: its products are float32's.
MANY = ("degree 4, head size 16",)
LIGHT = [name for name in CASES if name not in (*MANY, "head size 64")]
NARROW = [(name, torch.bfloat16) for name in LIGHT] + [(name, torch.float16) for name in LIGHT[::3]]
every_narrow = pytest.mark.parametrize(("name", "dtype"), NARROW, ids=str)
SINGLE = {
    "strided": lambda: checks.strided_inputs(NAME, "cpu", torch.float32),
    "zeros": lambda: checks.zero_keys_and_gates(NAME, "cpu", torch.float32, frozenset({"gates"})),
    "bad numbers": lambda: checks.bad_numbers_stay_where_they_belong(NAME, "cpu", torch.float32),
    "residuals": lambda: checks.residuals_are_exchangeable(NAME, "cpu", torch.float32),
    "narrow residuals": lambda: checks.residuals_are_exchangeable(NAME, "cpu", torch.bfloat16),
    "chunks": lambda: checks.chunks_change_rounding_alone(NAME, "cpu", torch.float32),
    "decoding": lambda: checks.decoding_goes_on(NAME, "cpu", torch.float32),
    "repeatable": lambda: checks.is_repeatable(NAME, "cpu", torch.float32),
}


@every_case
def test_results(name):
    checks.results_pass_the_gate(NAME, "cpu", CASES[name], torch.float32)


@pytest.mark.parametrize("name", [name for name in CASES if name not in MANY])
def test_gradients(name):
    checks.gradients_are_right_on_average(NAME, "cpu", CASES[name], torch.float32)


@every_narrow
def test_results_of_narrow_numbers(name, dtype):
    checks.results_pass_the_gate(NAME, "cpu", CASES[name], dtype)


@pytest.mark.parametrize(
    ("name", "dtype"), [case for case in NARROW if case[0] not in ("degree 4", "degree 6")], ids=str
)  # those are the slowest, and float32's are above
def test_gradients_of_narrow_numbers(name, dtype):
    checks.gradients_are_right_on_average(NAME, "cpu", CASES[name], dtype)


@pytest.mark.parametrize("name", SINGLE)
def test_a_check_of_the_kit(name):
    SINGLE[name]()


def test_empty_calls():
    checks.empty_calls(NAME, "cpu", torch.float32, frozenset({"value_dim"}))


def both_ways(case, **options):
    """All results and gradients of a case, with the operator's own functions."""
    torch.manual_seed(0)
    query, key, value, log_gates, sums, norm = case.inputs(torch.float32)
    call = PowerCall(
        degree=case.degree, scale=0.5, chunk=case.chunk, final=case.final, log_gates=log_gates, sums=sums, norm=norm
    )  # fmt: skip
    found = operator.power_attention(query, key, value, call, True)
    ends = (found.sums, found.norm) if case.final else (None, None)
    wanted = PowerWanted(log_gates is not None, sums is not None)
    return (*found, *operator.power_attention_backward(found.out, *ends, query, key, value, found.saved, call, wanted))


def test_segments_change_no_bit(monkeypatch):
    """Where the states of all chunks do not fit, a segment goes on where the one before it stopped."""
    case = Case(heads=2, kv_heads=1, many=70, head_dim=4, value_dim=3, gates=1.0, state=True, final=True, chunk=16)
    whole = both_ways(case)
    for numbers in (1, 3 * 48):  # one chunk at a time, and two
        monkeypatch.setattr(operator, "scratch", numbers)
        assert all(torch.equal(a, b) for a, b in zip(whole, both_ways(case), strict=True))


def test_nothing_behind_a_row_is_read():
    """Heads and values of 5 and 3 entries lie between NaN; tiles have 16."""
    case = Case(many=20, head_dim=5, value_dim=3, chunk=16)
    given = case.inputs(torch.float32)
    between = [torch.full((*t.shape[:3], 24), float("nan")) for t in given[:3]]
    for wide, t in zip(between, given[:3], strict=True):
        wide[..., 8 : 8 + t.shape[3]] = t
    query, key, value = (wide[..., 8 : 8 + t.shape[3]] for wide, t in zip(between, given[:3], strict=True))
    call, wanted = PowerCall(degree=2, scale=0.5, chunk=16), PowerWanted()
    found = operator.power_attention(query, key, value, call, True)
    theirs = operator.power_attention(*given[:3], call, True)
    assert torch.equal(found.out, theirs.out)
    grad = torch.full((1, 2, 20, 24), float("nan"))[..., 8:11]
    grad.copy_(found.out)
    ours = operator.power_attention_backward(grad, None, None, query, key, value, found.saved, call, wanted)
    assert all(t.isfinite().all() for t in ours)


def test_a_signature_is_planned_once():
    case = Case(many=20, head_dim=4, value_dim=4, chunk=16)
    both_ways(case)
    made = operator.plans.made
    both_ways(case)
    assert operator.plans.made == made
