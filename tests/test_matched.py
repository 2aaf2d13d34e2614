"""diffmax.matched_scale: what defines it, in float64, and the table of docs/theory.md."""

import math
from pathlib import Path

import pytest
import torch

from diffmax import diffmax_bisect, matched_scale

ALPHAS = [0.1, 0.5, 0.75, 0.9, 0.99]
close = torch.testing.assert_close


def jacobian(weights, x):
    return torch.autograd.functional.jacobian(weights, x)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("keys", [2, 4, 16, 100])
def test_on_as_many_equal_scores_the_derivatives_are_those_of_softmax(alpha, keys):
    """Eq. 36, by autograd of the public operator; at scale 1 they are not."""
    x, s = torch.zeros(keys, dtype=torch.float64), matched_scale(alpha, 1 / keys)
    wanted = jacobian(lambda x: x.softmax(0), x)
    close(jacobian(lambda x: diffmax_bisect(s * x, alpha), x), wanted, rtol=1e-12, atol=1e-15)
    bare = jacobian(lambda x: diffmax_bisect(x, alpha), x)
    close(bare, wanted / s, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_curve_is_the_tangent_of_softmaxs_from_below(alpha):
    """Eq. 37: value and slope agree at the weight, and elsewhere diffmax is below; the difference is -e u^2 / 2."""
    e, weight = 1 - alpha, 1 / 16
    s = matched_scale(alpha, weight)
    u = torch.linspace(-4, math.log(16), 400, dtype=torch.float64)
    tau = -(weight**e) / e  # s x - tau is weight^e / e at x = 0
    by_eq_1 = (e * (s * u - tau)).clamp_min(0) ** (1 / e)
    close(by_eq_1, weight * (1 + e * u).clamp_min(0) ** (1 / e), rtol=1e-11, atol=0)
    assert (by_eq_1 <= weight * u.exp() * (1 + 1e-12)).all()
    near = torch.tensor([-1e-3, 1e-3], dtype=torch.float64)
    close((1 + e * near).log() / e - near, -e * near.square() / 2, rtol=1e-2, atol=0)
    # where it ends: 1 / e below the weight's score
    assert by_eq_1[u < -1 / e].eq(0).all()
    assert by_eq_1[u > -1 / e].gt(0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_weight_of_one_falls_to_zero_at_the_distance_of_the_page(alpha):
    """Eq. 38, with the operator: the second of two scores has weight 0 from there on, and not before."""
    e = 1 - alpha
    s, distance = matched_scale(alpha), 16**e / e
    for factor, zero in ((1 - 1e-9, False), (1 + 1e-9, True)):
        p = diffmax_bisect(s * torch.tensor([0.0, -distance * factor], dtype=torch.float64), alpha, ensure_sum_one=False)
        assert bool(p[1] == 0) is zero or (not zero and p[1] < 1e-30)  # (1e-9)^(1 / e) underflows near alpha = 1


def test_values_and_gradient_of_floats_and_tensors():
    assert matched_scale(0.75) == 0.5
    assert matched_scale(0.5) == 0.25
    assert matched_scale(0.5, 1 / 4) == 0.5
    ends = matched_scale(torch.tensor([0.0, 1.0]))
    close(ends, torch.tensor([1 / 16, 1.0]))
    alpha = torch.tensor([[0.3], [0.8]], dtype=torch.float64, requires_grad=True)
    s = matched_scale(alpha)
    assert s.shape == alpha.shape
    assert s.dtype == torch.float64
    (gradient,) = torch.autograd.grad(s.sum(), alpha)
    close(gradient, math.log(16) * s.detach(), rtol=1e-14, atol=0)  # Eq. 39
    assert torch.autograd.gradcheck(matched_scale, alpha)
    assert matched_scale(torch.tensor(0.5, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((1.5,), ValueError, r"matched_scale: alpha must lie strictly between 0 and 1, got 1\.5"),
        ((torch.tensor([0.5, 1.5]),), ValueError, "matched_scale: alpha must lie between 0 and 1, got values from 0.5 to 1.5"),
        ((torch.tensor([1]),), TypeError, "matched_scale: alpha must be of a floating dtype, got int64"),
        (("0.5",), TypeError, "matched_scale: alpha must be a float or a tensor"),
        ((0.5, 0.0), ValueError, "matched_scale: weight must satisfy 0 < weight <= 1, got 0.0"),
        ((0.5, True), TypeError, "matched_scale: weight must be a number, got True of type bool"),
    ],
)
def test_wrong_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        matched_scale(*arguments)


def test_the_table_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
    for alpha in (0.95, 0.9, 0.85, 0.75, 0.6, 0.5):
        e, s = 1 - alpha, matched_scale(alpha)
        slopes = (s * p ** (alpha - 1) for p in (1, 1 / 4, 1 / 256, 1 / 4096))
        cells = [f"{alpha:g}", *(f"{v:.3f}" for v in (s, *slopes)), f"{1 / (e * s):.1f}", f"{1 / e:.1f}"]
        assert f"| {' | '.join(cells)} |" in page
