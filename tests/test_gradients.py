"""Gradients in x and alpha: against finite differences of a 60-digit solution, gradcheck, and at every edge."""

import math

import mpmath
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from diffmax import diffmax_bisect, reference
from diffmax.kernels.cpu import rows as cpu_rows
from diffmax.testing import gates, solve_exactly

pytestmark = pytest.mark.sampled(3)

ALPHAS = [0.003, 0.05, 0.1, 0.3, 0.5, 2 / 3, 0.85, 0.9, 0.95, 0.99, 0.999, 0.9999]
inf, nan = math.inf, math.nan


def exact_alpha_gradient(row, alpha, weights):
    """d/dalpha <weights, p>, by a central difference with 60 digits."""
    with mpmath.workdps(70):
        h = mpmath.mpf(10) ** -20

        def value(a):
            return mpmath.fdot(weights, solve_exactly(row, a, digits=60))

        alpha = mpmath.mpf(alpha)
        return float((value(alpha + h) - value(alpha - h)) / (2 * h))


def exact_x_gradient(row, alpha, weights):
    with mpmath.workdps(70):
        h = mpmath.mpf(10) ** -20
        gradient = []
        for i in range(len(row)):
            up, down = list(map(mpmath.mpf, row)), list(map(mpmath.mpf, row))
            up[i] += h
            down[i] -= h
            difference = mpmath.fdot(weights, solve_exactly(up, alpha, 60)) - mpmath.fdot(
                weights, solve_exactly(down, alpha, 60)
            )
            gradient.append(float(difference / (2 * h)))
        return torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_both_gradients_agree_with_a_sixty_digit_finite_difference(alpha):
    row = (torch.randn(12) * 1.5).tolist()
    weights = torch.randn(12).tolist()
    exact_x, exact_alpha = exact_x_gradient(row, alpha, weights), exact_alpha_gradient(row, alpha, weights)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x = torch.tensor(row, dtype=dtype, requires_grad=True)
        a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)  # float64: 0.9999 is no float32
        (diffmax_bisect(x, a) * torch.tensor(weights, dtype=dtype)).sum().backward()
        assert (x.grad.double() - exact_x).abs().max() <= tolerance
        assert abs(a.grad.item() - exact_alpha) <= tolerance * max(1, abs(exact_alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("sigma", [0.3, 1, 3, 10])
def test_gradcheck_in_x_and_alpha(alpha, sigma):
    x = (torch.randn(3, 8, dtype=torch.float64) * sigma).requires_grad_()
    a = torch.full((3, 1), alpha, dtype=torch.float64, requires_grad=True)
    # the step must not leave (0, 1) nor move an entry over the edge of the support
    assert gradcheck(lambda x, a: diffmax_bisect(x, a, n_iter=200), (x, a), eps=1e-7, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (2, 1, 4, 1), (1, 1, 1, 1)], ids=str)
def test_gradcheck_of_broadcast_alphas(shape):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    a = (torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    assert gradcheck(lambda x, a: diffmax_bisect(x, a), (x, a))


@pytest.mark.parametrize("dim", [0, 1, -2])
def test_gradcheck_along_other_dims(dim):
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, a: diffmax_bisect(x, a, dim), (x, a))


@pytest.mark.parametrize("alpha", [0.6, 0.75, 0.85, 0.95, 0.999])
def test_second_derivatives_in_x_and_alpha(alpha):
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x, a: diffmax_bisect(x, a, n_iter=200), (x, a), atol=1e-4)


def test_second_derivatives_stay_finite_where_weights_are_zero():
    x = torch.tensor([1.0, 0.5, -4.0, -inf], requires_grad=True)
    a = torch.tensor(0.3, requires_grad=True)
    (gx, ga) = torch.autograd.grad(diffmax_bisect(x, a).square().sum(), (x, a), create_graph=True)
    (gx.square().sum() + ga.square()).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[2:] == 0).all()
    assert x.grad[:2].abs().min() > 0
    assert torch.isfinite(a.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.85, 0.99])
def test_the_backward_kernel_passes_the_gate(alpha, dtype):
    e = 1 - alpha
    for sigma in (0.3, 1, 3, 10):
        x = (torch.randn(40, 257) * sigma).to(dtype)
        grad = torch.randn(40, 257).to(dtype)
        given = grad, *reference.bisect(x, e, 1, 50, True)
        kept = x if dtype == torch.float16 else None
        wanted = gates(lambda *given, kept=kept: reference.bisect_backward(*given, kept, e, 2, True), *given, stacked=True)
        for result, (exact, allowed) in zip(cpu_rows.bisect_backward(*given, kept, e, 1, True), wanted, strict=True):
            assert (result.double() - exact).abs().max() <= allowed


def test_float16_keeps_the_gradient_of_weights_that_flush_to_zero():
    """At small alpha the slope p^alpha of a weight is near 1 even where the weight itself is below float16's smallest."""
    alpha, e = 0.2, 0.8
    low, high = -2.0, 0.4
    for _ in range(60):
        middle = (low + high) / 2
        weight = diffmax_bisect(torch.tensor([0.5, 0.4, middle], dtype=torch.float64), alpha, n_iter=200)[2].item()
        low, high = (low, middle) if weight > 2e-8 else (middle, high)
    x = torch.tensor([0.5, 0.4, high], dtype=torch.float64)
    p, m, delta = reference.bisect(x, e, 0, 200, True)
    assert 1e-9 < p[2] < 3e-8
    assert p.half()[2] == 0
    g = torch.tensor([0.0, 0.0, 1.0])
    exact = reference.bisect_backward(g.double(), p, m, delta, None, e, 0, False)[0]
    assert exact[2] > 0.02
    # the scores are kept in float32 here: in float16 they could not stand so near to the edge of the support
    for kernel in (reference.bisect_backward, cpu_rows.bisect_backward):
        ours = kernel(g.half(), p.half(), m.float(), delta.float(), x.float(), e, 0, False)[0]
        assert (ours.double() - exact).abs().max() < 0.003


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7])
def test_float16_has_the_same_gradient_with_create_graph(alpha):
    """Review finding: with create_graph=True the support was read off the float16 weights."""
    x, g = torch.randn(4000, 64).half().requires_grad_(), (torch.randn(4000, 64) * 1000).half()
    plain = torch.autograd.grad(diffmax_bisect(x, alpha), x, g)[0]
    graph = torch.autograd.grad(diffmax_bisect(x, alpha), x, g, create_graph=True)[0]
    torch.testing.assert_close(graph, plain, rtol=2e-3, atol=1e-2)
    assert ((plain != 0) == (graph != 0)).float().mean() > 0.99999
    second = torch.autograd.grad((graph.float() / 1e4).square().sum(), x)[0]  # within float16's range
    assert torch.isfinite(second).all()


def test_masked_entries_and_fully_masked_rows_have_gradient_zero():
    for dtype in (torch.float16, torch.float32):
        x = torch.randn(4, 6).to(dtype)
        x[0, 2:] = -inf
        x[1] = -inf
        x.requires_grad_()
        a = torch.full((4, 1), 0.6, requires_grad=True)
        (diffmax_bisect(x, a) * torch.randn(4, 6)).sum().backward()
        assert (x.grad[0, 2:] == 0).all()
        assert (x.grad[1] == 0).all()
        assert x.grad[[0, 2, 3]].abs().sum(-1).min() > 0
        assert a.grad[1] == 0
        assert torch.isfinite(a.grad).all()


def test_a_nan_row_has_nan_gradients_and_its_neighbours_do_not():
    for dtype in (torch.float16, torch.float32):
        x = torch.randn(3, 6).to(dtype)
        x[1, 2] = nan
        x.requires_grad_()
        (diffmax_bisect(x, 0.6) * torch.randn(3, 6)).sum().backward()
        assert x.grad[1].isnan().all()
        assert torch.isfinite(x.grad[[0, 2]]).all()


def test_gradients_sum_to_zero_along_the_row():
    x = torch.randn(20, 50, dtype=torch.float64, requires_grad=True)
    (diffmax_bisect(x, 0.7) * torch.randn(20, 50)).sum().backward()
    assert x.grad.sum(-1).abs().max() < 1e-14


def test_alpha_gradient_at_both_ends_of_the_range():
    """A training run can drive alpha to 0 and 1 themselves: value and gradient stay right there."""
    row, weights = torch.randn(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    for end, near in ((1.0, 1 - 1e-12), (0.0, 1e-12)):
        exact = exact_alpha_gradient(row.tolist(), near, weights.tolist())
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-6)):
            x = row.to(dtype).clone().requires_grad_()
            a = torch.tensor(end, dtype=dtype, requires_grad=True)
            (diffmax_bisect(x, a, n_iter=200) * weights.to(dtype)).sum().backward()
            assert abs(a.grad.item() - exact) <= tolerance * max(1, abs(exact))
            assert torch.isfinite(x.grad).all()


def test_training_drives_alpha_to_both_ends_without_a_nan():
    torch.manual_seed(1)
    x = torch.randn(64, 32) * 2
    for target in (torch.softmax(x * 0.2, -1), torch.nn.functional.one_hot(x.argmax(-1), 32).float()):
        a = torch.full((64, 1), 0.5, requires_grad=True)
        optimizer = torch.optim.SGD([a], lr=2.0)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (diffmax_bisect(x, a) - target).square().sum()
            loss.backward()
            assert torch.isfinite(a.grad).all()
            optimizer.step()
            with torch.no_grad():
                a.clamp_(0, 1)
        end = 1.0 if target.min() > 0 else 0.0  # the dense target pulls alpha to 1, the sparse one to 0
        assert (a == end).sum() > 40
        assert torch.isfinite(loss)


def test_only_what_needs_a_gradient_gets_one():
    x, a = torch.randn(3, 4), torch.tensor(0.5, requires_grad=True)
    diffmax_bisect(x, a).square().sum().backward()
    assert x.grad is None
    assert a.grad.shape == ()
    assert not diffmax_bisect(x, 0.5).requires_grad


def test_the_same_row_is_reached_through_expanded_input():
    x = torch.randn(1, 7, requires_grad=True)
    diffmax_bisect(x.expand(3, 7), 0.5).square().sum().backward()
    expected = torch.autograd.grad(diffmax_bisect(x, 0.5).square().sum(), x)[0] * 3
    torch.testing.assert_close(x.grad, expected)
