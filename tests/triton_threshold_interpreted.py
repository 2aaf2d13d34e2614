"""Threshold attention's Triton kernels under Triton's interpreter: `test_triton_threshold.py` runs this file."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from diffmax.errors import NoBackendError
from diffmax.kernels.capability import THRESHOLD
from diffmax.plugin import ThresholdCall, ThresholdWanted
from diffmax.testing.interpreter import harden, quicken
from diffmax.testing.threshold import checks

harden()
quicken()

sys.path.insert(0, str(Path(__file__).parent))
import triton_threshold_backend as backend

backend.register()
NAME, operator = backend.NAME, backend.operator

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton 3.6's loops
]


@dataclass(frozen=True)
class Case:
    """A call. `theta`: the least and the largest threshold. `width`: of the relative bias, 0: none."""

    weights: str = "softmax"
    power: float = 1.0
    batch: int = 1
    theta: tuple[float, float] = (0.0, 0.06)
    heads: int = 2
    kv_heads: int = 1
    length: int = 37
    many: int = 50
    size: int = 12
    values: int = 20
    width: int = 0
    left: int = -1
    right: int = 0
    mask: str = ""

    def call(self):
        per_head = torch.rand(1, self.heads, self.length)
        theta = self.theta[0] + (self.theta[1] - self.theta[0]) * per_head
        mask = None
        if self.mask == "pairs":  # and query 3 sees nothing
            mask = torch.rand(self.batch, 1, self.length, self.many) > 0.3
            mask[0, 0, 3] = False
        if self.mask == "keys":
            mask = (torch.arange(self.many) < torch.tensor([self.many // 2, self.many])[: self.batch, None])[:, None, None, :]
        bias = torch.randn(self.heads, self.width) if self.width else None
        return ThresholdCall(
            scale=self.size**-0.5, weights=self.weights, power=self.power, theta=theta, bias=bias, mask=mask,
            left=self.left, right=self.right,
        )  # fmt: skip

    def inputs(self, dtype=torch.float32):
        torch.manual_seed(0)
        shapes = (
            (self.heads, self.length, self.size),
            (self.kv_heads, self.many, self.size),
            (self.kv_heads, self.many, self.values),
        )
        return [torch.randn(self.batch, *shape).to(dtype) for shape in shapes]


# the first case of a test runs in the fast tier
CASES = {
    "all at once": Case(theta=(-0.03, 0.06), width=21, mask="keys", batch=2, heads=1, length=20, many=33),
    "softmax": Case(),
    "scores": Case(weights="scores", theta=(0.0, 1.0)),
    "scores, bias, power 2": Case(weights="scores", theta=(-0.5, 0.5), width=40, power=2.0),
    "scores, power 1.5": Case(weights="scores", theta=(-0.5, 0.5), power=1.5, mask="keys"),
    "power 2": Case(power=2.0, theta=(-0.03, 0.03)),
    "power 1.5, mask": Case(power=1.5, mask="pairs"),
    "bias wider than the keys": Case(width=90, right=-1),
    "short bias": Case(width=7, theta=(-0.03, 0.03)),
    "two heads of keys": Case(heads=4, kv_heads=2, length=20, many=20, size=16, values=16, width=9),
    "one query": Case(length=1, width=60),
    "more queries than keys": Case(length=50, many=20, theta=(-0.03, 0.03), width=5),
    "window": Case(left=9, theta=(-0.03, 0.1), width=5),
    "window on both sides": Case(weights="scores", theta=(-0.5, 0.5), left=6, right=3, length=60, many=70),
    "window to the left": Case(left=11, right=-1, length=50, many=40, theta=(-0.03, 0.1)),
    "not causal": Case(right=-1, theta=(-0.03, 0.03)),
}
every_case = pytest.mark.parametrize("name", CASES)


def oracle(query, key, value, theta, bias, call):
    """out and mass by their formulas."""
    length, many, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    distance = torch.arange(length)[:, None] + many - length - torch.arange(many)
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen &= (distance >= -call.right) | (call.right < 0)
    seen &= (distance <= call.left) | (call.left < 0)
    seen = seen.expand(query.shape[0], query.shape[1], length, many)
    if call.mask is not None:
        seen = seen & call.mask
    s = call.scale * query @ key.transpose(2, 3)
    if bias is not None:
        near = (distance >= 0) & (distance < bias.shape[1])
        s = s + torch.where(near, bias[:, distance.clamp(0, bias.shape[1] - 1)], 0.0)
    u = s
    if call.weights == "softmax":
        u = s.masked_fill(~seen, -torch.inf).masked_fill(~seen.any(3, keepdim=True), 0.0).softmax(3)
    y = u - theta.unsqueeze(3)
    w = torch.where(seen & (y > 0), torch.where(y > 0, y, 1.0) ** call.power, 0.0)
    return w @ value, w.sum(3)


def both_ways(query, key, value, call, grad, grad_mass):
    """All results and gradients, with the operator's own functions."""
    found = operator.threshold_attention(query, key, value, call, True)
    wanted = ThresholdWanted(theta=True, bias=call.bias is not None)
    gradients = operator.threshold_attention_backward(grad, grad_mass, query, key, value, found.saved, call, wanted)
    return found, gradients


def agree(found, exact, digits):
    for name, ours, theirs in zip(("out", "mass", "query", "key", "value", "theta", "bias"), found, exact, strict=False):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
        assert error < digits, f"{name}: {error:.1e}"


def compare(case, dtype, digits):
    query, key, value = case.inputs(dtype)
    call = case.call()
    learned = [t.double().requires_grad_() for t in (query, key, value, call.theta.expand(case.batch, -1, -1))]
    bias = None if call.bias is None else call.bias.double().requires_grad_()
    out, mass = oracle(*learned, bias, call)
    grad, grad_mass = torch.randn(out.shape).to(dtype), torch.randn(mass.shape)
    learned += [] if bias is None else [bias]
    exact = torch.autograd.grad((out, mass), learned, (grad.double(), grad_mass.double()))
    found, gradients = both_ways(query, key, value, call, grad, grad_mass)
    agree((*found[:2], *gradients), (out, mass, *exact), digits)


@every_case
def test_results_and_gradients(name):
    compare(CASES[name], torch.float32, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_of_narrow_numbers(dtype):
    compare(CASES["all at once"], dtype, 2e-2)


# of the kit: small ones, and what the kernels do not claim is left out
KIT = {
    name: replace(case, batch=1, length=min(case.length, 33), many=min(case.many, 33))
    for name, case in reversed(checks.CASES.items())
    if case.weights != "diffmax"
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KIT)
def test_results_and_gradients_pass_the_kit(name, dtype):
    checks.results_pass_the_gate(NAME, "cpu", KIT[name], dtype)
    checks.gradients_are_right_on_average(NAME, "cpu", KIT[name], dtype)


@pytest.mark.parametrize(
    "check", [checks.bad_numbers_stay_where_they_belong, checks.nothing_comes_of_nothing, checks.residuals_are_exchangeable]
)
def test_conduct_passes_the_kit(check):
    check(NAME, "cpu", torch.float32, THRESHOLD)


def test_huge_and_strided_numbers_pass_the_kit():
    checks.huge_scores(NAME, "cpu", torch.float32, THRESHOLD)
    checks.strided_inputs(NAME, "cpu", torch.float32)


def test_diffmax_weights_are_refused():
    with pytest.raises(NoBackendError, match=f"{NAME}: .*lacks"):
        checks.results_pass_the_gate(NAME, "cpu", checks.CASES["diffmax"], torch.float32)


def test_packed_sequences_are_calls_of_their_own():
    """Also an empty one, and rows behind the last one."""
    case = Case(length=60, many=90, width=9)
    query, key, value = case.inputs()
    starts, key_starts = [0, 21, 21, 55], [0, 30, 47, 84]
    call = case.call()
    grad, grad_mass = torch.randn(1, 2, 60, 20), torch.randn(1, 2, 60)
    ends = {name: torch.tensor(t, dtype=torch.int32) for name, t in (("q", starts), ("k", key_starts))}
    packed = replace(call, cu_seqlens_q=ends["q"], cu_seqlens_k=ends["k"], max_seqlen_q=34, max_seqlen_k=37)
    found, gradients = both_ways(query, key, value, packed, grad, grad_mass)
    assert not found.out[:, :, 55:].any()
    assert not gradients.query[:, :, 55:].any()
    assert not gradients.key[:, :, 84:].any()
    of_bias = 0
    for q, k in ((slice(0, 21), slice(0, 30)), (slice(21, 55), slice(47, 84))):
        single = replace(call, theta=call.theta[:, :, q])
        own, theirs = both_ways(
            query[:, :, q], key[:, :, k], value[:, :, k], single, grad[:, :, q], grad_mass[:, :, q]
        )  # fmt: skip
        agree((found.out[:, :, q], found.mass[:, :, q]), own, 1e-6)
        agree((gradients.query[:, :, q], gradients.key[:, :, k], gradients.value[:, :, k]), theirs, 1e-6)
        agree((gradients.theta[:, :, q],), theirs[3:], 1e-6)
        of_bias = of_bias + theirs.bias
    agree((gradients.bias,), (of_bias,), 1e-6)


def test_tiles_without_weights_are_not_read():
    """Values of keys that no query gives a weight are NaN here, in tiles of their own."""
    case = Case(length=32, many=48, right=-1, theta=(0.02, 0.02))
    query, key, value = case.inputs()
    query[..., 0], key[..., 0] = 20.0, 0.0
    key[:, :, 32:, 0] = 5.0
    grad, grad_mass = torch.randn(1, 2, 32, 20), torch.randn(1, 2, 32)
    call = case.call()
    found, gradients = both_ways(query, key, value, call, grad, grad_mass)
    spoilt = value.clone()
    spoilt[:, :, :32] = float("nan")
    again, theirs = both_ways(query, key, spoilt, call, grad, grad_mass)
    for ours, other in zip((*found, *gradients[:2]), (*again, *theirs[:2]), strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, other)
    assert found.mass.gt(0).any()


def test_nothing_behind_a_row_is_read():
    """Heads and values of 5 and 3 entries lie between NaN, with other strides; so does theta."""
    case = Case(size=5, values=3, length=20, many=20)
    given = case.inputs()
    call = case.call()
    grad = torch.randn(1, 2, 20, 3)
    apart = []
    for t in (*given, grad):
        wide = torch.full((1, t.shape[2], t.shape[1], 24), float("nan")).transpose(1, 2)
        wide[..., 8 : 8 + t.shape[3]] = t
        apart.append(wide[..., 8 : 8 + t.shape[3]])
    strided = torch.full((1, 20, 4), float("nan"))
    strided[..., :2] = call.theta.transpose(1, 2)
    found, gradients = both_ways(*apart[:3], replace(call, theta=strided[..., :2].transpose(1, 2)), apart[3], None)
    own, theirs = both_ways(*given, call, grad, None)
    assert all(torch.equal(a, b) for a, b in zip((*found, *gradients), (*own, *theirs), strict=True))


@pytest.mark.parametrize("weights", ["softmax", "scores"])
def test_nan_stays_where_it_belongs(weights):
    """In a query it spoils that query alone, and no gradient of a block of keys behind it."""
    case = Case(weights=weights, length=40, many=48, kv_heads=2)
    query, key, value = case.inputs()
    query[0, 0, 20, 3] = float("nan")
    call, grad = case.call(), torch.randn(1, 2, 40, 20)
    found, gradients = both_ways(query, key, value, call, grad, None)
    spoilt = torch.zeros(1, 2, 40, dtype=torch.bool)
    spoilt[0, 0, 20] = True
    assert torch.equal(found.out.isnan().all(3), spoilt)
    assert torch.equal(found.mass.isnan(), spoilt)
    assert torch.equal(gradients.query.isnan().all(3), spoilt)
    assert torch.equal(gradients.theta.isnan(), spoilt)
    for t in (gradients.key, gradients.value):
        assert t[0, 0, 32:].isfinite().all()
        assert t[0, 1].isfinite().all()


def test_empty_calls():
    for length, many in ((0, 5), (5, 0)):
        case = Case(length=length, many=many, theta=(-1.0, 0.0))
        query, key, value = case.inputs()
        found, gradients = both_ways(query, key, value, case.call(), torch.ones(1, 2, length, 20), None)
        assert not any(t.any() for t in (found.out, found.mass, *gradients))


def test_a_signature_is_planned_once_and_gives_the_same_bits():
    case = replace(CASES["all at once"], length=18)
    query, key, value = case.inputs()
    call, grad, grad_mass = case.call(), torch.randn(2, 1, 18, 20), torch.randn(2, 1, 18)
    found, gradients = both_ways(query, key, value, call, grad, grad_mass)
    made = operator.plans.made
    again, theirs = both_ways(query, key, value, call, grad, grad_mass)
    assert operator.plans.made == made
    assert all(torch.equal(a, b) for a, b in zip((*found, *gradients), (*again, *theirs), strict=True))
