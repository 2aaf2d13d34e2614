"""The gate: what it allows depends little on luck, and a kernel that errs by a small multiple of it is refused."""

import pytest
import torch

from diffmax import reference
from diffmax.testing import gates
from diffmax.testing.gate import DRAWS, FEWEST_DRAWS, _neighbours


def backward(seed, shape=(7, 64), sigma=0.3, alpha=0.99, dtype=torch.float16):
    """The reference's backward and what it is given, by default where an Intel processor failed on a coin that fell badly."""
    torch.manual_seed(seed)
    x, grad = (torch.randn(shape) * sigma).to(dtype), torch.randn(shape).to(dtype)
    kept = x if dtype == torch.float16 else None

    def compute(grad, p, m, delta):
        return reference.bisect_backward(grad, p, m, delta, kept, 1 - alpha, grad.ndim - 1, True)

    return compute, (grad, *reference.bisect(x, 1 - alpha, 1, 50, True))


def by_one_run(compute, given, which):
    """What the gate allowed before: twice the error of a single run, and 2 ulp."""
    exact, own = (f(*given)[which] for f in (lambda *t: compute(*(t.double() for t in t)), compute))
    ulp = torch.finfo(own.dtype).eps * max(1.0, float(exact.abs().max()))
    return 2 * float((own.double() - exact).abs().max()) + 2 * ulp


CASES = [
    {"dtype": torch.float16},
    {"dtype": torch.float32, "shape": (3, 129), "alpha": 0.5},
    {"dtype": torch.bfloat16, "shape": (40, 257), "alpha": 0.1, "sigma": 3.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_allowed_depends_little_on_luck(case):
    """One run's allowed error is ten times as much for one neighbour as for another, whose gradient is nearly the same."""
    compute, given = backward(0, **case)
    allowed = []
    for seed in range(40):
        torch.manual_seed(seed)
        neighbours = [t[1] for t in _neighbours(list(given), 1)]
        allowed.append(gates(compute, *neighbours, stacked=True)[1].allowed)
    assert max(allowed) <= 4 * min(allowed)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_an_error_of_three_times_what_one_run_allows_is_refused(case, which):
    """On average over draws of the inputs, so that this too depends little on luck."""
    before, now = [], []
    for seed in range(20):
        compute, given = backward(seed, **case)
        before.append(by_one_run(compute, given, which))
        now.append(gates(compute, *given, stacked=True)[which].allowed)
    assert sum(now) < 2.5 * sum(before)
    assert sum(n < 3 * sum(before) / len(before) for n in now) >= 18


def test_a_kernel_with_too_few_digits_is_refused_and_the_reference_is_not():
    """What it is given loses half its digits, as in a kernel that computes in too few."""
    compute, given = backward(0, dtype=torch.float32, shape=(40, 257))
    grad_x, grad_e = gates(compute, *given, stacked=True)
    x, e = compute(*(t.bfloat16().float() for t in given))
    assert (x.double() - grad_x.exact).abs().max() > 100 * grad_x.allowed
    assert (e.double() - grad_e.exact).abs().max() > 100 * grad_e.allowed
    ours = compute(*given)
    assert (ours[0].double() - grad_x.exact).abs().max() <= grad_x.allowed / 2
    assert (ours[1].double() - grad_e.exact).abs().max() <= grad_e.allowed / 2


def test_the_reference_passes_with_half_of_what_is_allowed_whatever_the_function():
    """Its own input is among those that are measured."""
    x = torch.randn(3, 50, dtype=torch.float32)
    for function in (torch.exp, lambda t: t.softmax(-1), lambda t: t.sum(-1)):
        ((exact, allowed),) = gates(function, x)
        assert (function(x).double() - exact).abs().max() <= allowed / 2


def test_one_after_the_other_or_stacked_is_the_same():
    x = torch.randn(5, 30)
    for more in ({}, {"average": True}, {"scale": torch.full((5, 1), 3.0)}):
        alone = gates(lambda x: (x.softmax(-1), x.exp()), x, **more)
        together = gates(lambda x: (x.softmax(-1), x.exp()), x, stacked=True, **more)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.exact, b.exact)
            assert a.allowed == pytest.approx(b.allowed, rel=0.2)  # torch may sum them in another order


def test_float64_is_measured_in_float32():
    x = torch.randn(4, 20, dtype=torch.float64)
    seen = set()

    def function(x):
        seen.add(x.dtype)
        return x.softmax(-1)

    ((exact, allowed),) = gates(function, x)
    assert seen == {torch.float32, torch.float64}
    assert torch.equal(exact, x.softmax(-1))
    eps = torch.finfo(torch.float64).eps
    assert 4 * eps <= allowed <= 12 * eps


def test_neighbours_keep_what_is_not_a_number_and_disturb_no_generator():
    torch.manual_seed(3)
    x = torch.tensor([[0.0, -torch.inf, torch.nan, 65504.0, 1.0, 3e-8]]).half()
    mask = torch.tensor([True, False])
    before = torch.get_rng_state()
    stack, masks, nothing = _neighbours([x, mask, None], 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert nothing is None
    assert stack.shape == (DRAWS, 1, 6)
    assert masks.shape == (DRAWS, 2)
    assert torch.equal(stack[0].nan_to_num(nan=7.0), x.nan_to_num(nan=7.0))
    assert (stack[:, 0, 0] == 0).all()
    assert (stack[:, 0, 1] == -torch.inf).all()
    assert stack[:, 0, 2].isnan().all()
    assert stack[:, 0, 3].isfinite().all()
    assert len(stack[:, 0, 4].unique()) == 3
    assert torch.equal(stack.nan_to_num(nan=7.0), _neighbours([x], 0)[0].nan_to_num(nan=7.0))  # the seed is torch's


def test_large_inputs_are_drawn_less_often():
    assert len(_neighbours([torch.zeros(10)], 0)[0]) == DRAWS
    assert len(_neighbours([torch.zeros(10)], 10**9)[0]) == FEWEST_DRAWS
    assert len(_neighbours([torch.zeros(4000)], 0)[0]) == 8


def test_results_without_numbers_pass():
    (one, two) = gates(lambda x: (x[..., :0], x), torch.randn(3))
    assert one.exact.shape == (0,)
    assert two.allowed > one.allowed > 0
