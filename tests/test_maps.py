"""HillMap, TanhMap, ExpMap."""

import math

import mpmath
import pytest
import torch
from torch.autograd import gradcheck

from diffmax import ExpMap, HillMap, TanhMap

MAPS = [HillMap, TanhMap, ExpMap]
SHAPES = {
    HillMap: lambda u: u / (1 + u),
    TanhMap: mpmath.tanh,
    ExpMap: lambda u: -mpmath.expm1(-u),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("c", [0.3, 1.0])
@pytest.mark.parametrize("beta", [1e-300, 1e-12, 0.01, 1.0, 3.0, 50.0, 1e20])
def test_one_minus_alpha_has_full_relative_accuracy(kind, c, beta):
    with mpmath.workdps(50):
        exact = c * SHAPES[kind](mpmath.mpf(beta) / 2)
        alpha_map = kind(c, beta0=2.0)
        assert abs(alpha_map.one_minus_alpha(beta) / exact - 1) < 1e-13
        e = alpha_map.one_minus_alpha_of_log(torch.tensor(math.log(beta), dtype=torch.float64)).item()
        assert abs(e / exact - 1) < 1e-12
        assert abs(alpha_map(beta) - (1 - exact)) < 1e-15


def test_the_example_of_the_design():
    assert HillMap(c=0.3)(1.0) == 0.85
    assert HillMap(c=0.3, beta0=4.0)(4.0) == 0.85


@pytest.mark.parametrize("kind", MAPS)
def test_larger_beta_is_sparser_and_alpha_stays_in_reach(kind):
    beta = torch.logspace(-6, 6, 200, dtype=torch.float64)
    alpha = kind(0.4)(beta)
    assert (alpha.diff() <= 0).all()
    assert alpha.min() >= 0.6
    assert alpha.max() < 1
    assert kind(0.4)(0.0) == 1.0


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("alpha", [0.11, 0.5, 0.85, 0.999999])
def test_inverse(kind, alpha):
    alpha_map = kind(0.9, beta0=0.7)
    assert alpha_map(alpha_map.inverse(alpha)) == pytest.approx(alpha, abs=1e-15)
    tensor = torch.tensor([alpha, 0.6], dtype=torch.float64)
    torch.testing.assert_close(alpha_map(alpha_map.inverse(tensor)), tensor)


@pytest.mark.parametrize("kind", MAPS)
def test_gradients(kind):
    log_beta = torch.linspace(-8, 8, 9, dtype=torch.float64, requires_grad=True)
    assert gradcheck(kind(0.7, 2.0).one_minus_alpha_of_log, log_beta)
    assert gradcheck(kind(0.7, 2.0), log_beta.detach().exp().requires_grad_(), eps=1e-9, atol=1e-4)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients_are_finite_wherever_training_drives_beta(kind, dtype):
    log_beta = torch.tensor([-1e4, -200.0, -80, 0, 29, 69, 70, 88, 200, 1e4], dtype=dtype, requires_grad=True)
    e = kind(1.0).one_minus_alpha_of_log(log_beta)
    e.sum().backward()
    assert torch.isfinite(log_beta.grad).all()
    assert (e[0], e[-1]) == (0, 1)
    beta = torch.tensor([0.0, 1e-30, 1.0, 1e29, 1e31, math.inf], dtype=dtype, requires_grad=True)
    e = kind(1.0).one_minus_alpha(beta)
    e.sum().backward()
    assert torch.isfinite(beta.grad).all()
    assert (e[0], e[-1]) == (0, 1)


def test_maps_compare_and_print_as_values():
    assert HillMap(0.3) == HillMap(0.3, 1.0)
    assert HillMap(0.3) != TanhMap(0.3)
    assert repr(TanhMap(0.3, 2.0)) == "TanhMap(c=0.3, beta0=2.0)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HillMap(0.0), r"HillMap: c must satisfy 0 < c <= 1, got 0\.0"),
        (lambda: TanhMap(1.1), r"TanhMap: c must satisfy 0 < c <= 1, got 1\.1"),
        (lambda: ExpMap(math.nan), r"ExpMap: c must satisfy .* got nan"),
        (lambda: HillMap(0.5, 0.0), r"HillMap: beta0 must be positive and finite, got 0\.0"),
        (lambda: HillMap(0.5, math.inf), r"beta0 must be positive and finite, got inf"),
        (lambda: HillMap(0.5)(-1.0), r"HillMap: beta must not be negative, got -1\.0"),
        (lambda: HillMap(0.3).inverse(0.7), r"alpha must lie in \(0\.7, 1\), the range of c = 0\.3, got 0\.7"),
        (lambda: HillMap(0.3).inverse(1.0), r"alpha must lie in \(0\.7, 1\), .* got 1"),
        (lambda: TanhMap(0.3).inverse(torch.tensor([0.8, 0.1])), r"TanhMap: .* got values from 0\.1 to 0\.8"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
