"""diffmax_loss: against forty digits, entmax and cross-entropy; its properties, gradients, edges, memory, and messages."""

import copy
import functools
import itertools
import math

import entmax
import mpmath
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy, one_hot

import diffmax
from diffmax import DiffmaxLoss, diffmax_bisect, diffmax_loss
from diffmax.operators.loss import terms
from diffmax.testing import solve_exactly
from tests import fresh

pytestmark = pytest.mark.sampled(7)

ALPHAS = [1e-6, 0.05, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99, 0.999, 0.9999, 1 - 1e-6]
HALVES = [torch.float16, torch.bfloat16]
inf, nan = math.inf, math.nan


@functools.cache
def exact_weights(row, alpha):
    return solve_exactly(row, alpha, digits=50)


def exact_loss(row, target, alpha):
    """Omega(y) - Omega(p) + <p - y, x> as section 12 defines it, with 60 digits; `target` an index or probabilities."""
    with mpmath.workdps(60):
        alpha = mpmath.mpf(alpha)
        e = 1 - alpha
        x, p = [mpmath.mpf(v) for v in row], exact_weights(tuple(row), alpha)
        y = [mpmath.mpf(t) for t in target] if isinstance(target, list) else [mpmath.mpf(i == target) for i in range(len(row))]
        y = [t / mpmath.fsum(y) for t in y]  # rounded, they do not sum to 1, and 1/e times the difference would count

        def omega(q):
            return (mpmath.fsum(v ** (1 + e) for v in q) - 1) / (e * (1 + e))

        return omega(y) - omega(p) + mpmath.fsum((a - b) * v for a, b, v in zip(p, y, x, strict=True))


def exact_slope(row, target, alpha):
    """dL/dalpha by a central difference."""
    with mpmath.workdps(60):
        h = mpmath.mpf(10) ** -12
        up, down = (exact_loss(row, target, mpmath.mpf(alpha) + step) for step in (h, -h))
        return float((up - down) / (2 * h))


def conditioning(row, target, alpha):
    """How far the loss moves when every score moves by 1, and its own size: what rounding the input alone makes of it."""
    p = [float(q) for q in exact_weights(tuple(row), mpmath.mpf(alpha))]
    y = target if isinstance(target, list) else [float(i == target) for i in range(len(row))]
    spread = max(row) - min(v for v, a, b in zip(row, p, y, strict=True) if a + b > 0)
    return sum(abs(a - b) for a, b in zip(p, y, strict=True)) * max(1.0, spread)


def some_rows(n=12, count=2, sigma=1.5):
    return [(torch.randn(n, dtype=torch.float64) * sigma).tolist() for _ in range(count)]


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_of_an_index_has_forty_digits_on_its_side(alpha, dtype):
    """Also where the prediction is all but right and the loss far below the rounding of its terms."""
    rows = some_rows() + [[9.0 - g, *torch.randn(6, dtype=torch.float64).tolist()] for g in (0.0, 4.0, 7.0)]
    for row in rows:
        row = torch.tensor(row, dtype=dtype).double().tolist()
        for target in (0, 1, len(row) - 1):
            exact = float(exact_loss(row, target, alpha))
            a = torch.tensor([[alpha]], dtype=torch.float64)
            loss = diffmax_loss(torch.tensor([row], dtype=dtype), torch.tensor([target]), a, reduction="none").item()
            # the scores' own rounding moves the loss by its gradient; entries at the edge of the support cost a factor more
            allowed = 16 * torch.finfo(dtype).eps * (exact + conditioning(row, target, alpha))
            assert abs(loss - exact) <= allowed
            assert loss >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_of_probabilities_has_forty_digits_on_its_side(alpha, dtype):
    for row in some_rows():
        x = torch.tensor([row], dtype=dtype)
        near = diffmax_bisect(x.double() + 1e-3 * torch.randn(12), alpha, n_iter=200)
        for y in (torch.rand(1, 12).softmax(1).double(), near, one_hot(torch.tensor([3]), 12).double() * 0.9 + 0.1 / 12):
            y = (y / y.sum()).to(dtype)
            row, target = x.double()[0].tolist(), y.double()[0].tolist()
            exact = float(exact_loss(row, target, alpha))
            a = torch.tensor([[alpha]], dtype=torch.float64)
            loss = diffmax_loss(x, y, a, reduction="none").item()
            ulp = torch.finfo(dtype).eps
            assert abs(loss - exact) <= 16 * ulp * (exact + conditioning(row, target, alpha) + ulp)
            assert loss >= 0


@pytest.mark.parametrize(("alpha", "theirs"), [(0.5, entmax.entmax15_loss), (None, entmax.sparsemax_loss)], ids=["0.5", "0"])
def test_it_is_entmax_s_loss(alpha, theirs):
    x, y = torch.randn(40, 30, dtype=torch.float64) * 3, torch.randint(30, (40,))
    a = torch.tensor(0.0, dtype=torch.float64) if alpha is None else alpha
    assert (diffmax_loss(x, y, a, reduction="none") - theirs(x, y)).abs().max() < 1e-13


def test_it_is_entmax_bisect_s_loss_between():
    x, y = torch.randn(40, 30, dtype=torch.float64) * 3, torch.randint(30, (40,))
    for alpha in (0.05, 0.3, 0.85):
        ours, theirs = diffmax_loss(x, y, alpha, reduction="none"), entmax.entmax_bisect_loss(x, y, 2 - alpha, 100)
        assert (ours - theirs).abs().max() < 1e-12


SHAPES = [((7,), ()), ((5, 7), (5,)), ((5, 7, 3), (5, 3)), ((2, 7, 3, 4), (2, 3, 4))]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: str(s[0]))
def test_the_limit_is_cross_entropy_with_all_its_arguments(shape, weighted, reduction):
    scores, rows = shape
    x, y = torch.randn(scores, dtype=torch.float64, requires_grad=True), torch.randint(7, rows)
    if rows:
        y.view(-1)[::3] = 2
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    arguments = {"weight": weight, "ignore_index": 2 if rows else -100, "reduction": reduction}
    one = torch.tensor(1.0, dtype=torch.float64)
    ours, theirs = diffmax_loss(x, y, one, **arguments), cross_entropy(x, y, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    g = torch.randn_like(ours)
    ours, theirs = (torch.autograd.grad(loss, x, g)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: str(s[0]))
def test_for_probabilities_the_limit_has_cross_entropy_s_gradient_and_differs_by_an_entropy(shape, weighted):
    x = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    dim = 0 if x.ndim == 1 else 1
    y = torch.rand(shape[0], dtype=torch.float64).softmax(dim)
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    ours = diffmax_loss(x, y, torch.tensor(1.0, dtype=torch.float64), weight=weight)
    theirs = cross_entropy(x, y, weight=weight)
    per_class = (weight if weighted else torch.ones(7, dtype=torch.float64)).view(
        [-1 if a == dim else 1 for a in range(x.ndim)]
    )
    mass = (y * per_class).sum(dim, keepdim=True)
    entropy = -(y * per_class * (y * per_class / mass).log()).sum(dim).mean()
    assert abs(theirs - ours - entropy) < 1e-13
    one, other = (torch.autograd.grad(loss, x)[0] for loss in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_an_index_is_the_corner_of_the_simplex():
    x, y = torch.randn(20, 9) * 2, torch.randint(9, (20,))
    for alpha in (0.1, 0.5, 0.9):
        one, other = (diffmax_loss(x, t, alpha, reduction="none") for t in (y, one_hot(y, 9).float()))
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("e", [1e-12, 0.15, 0.5, 0.9, 1.0])
def test_eq_17_and_19_d_is_the_integral_and_its_series_ends_below_rounding(e):
    for q in (1e-9, 1e-3, 0.1, 0.25, -0.1, -0.25):
        with mpmath.workdps(50):
            exact_e, r = mpmath.mpf(e), 1 - mpmath.mpf(q)
            by_formula = (1 - r**exact_e) / exact_e - (1 - r ** (1 + exact_e)) / (1 + exact_e)
            by_integral = mpmath.quad(lambda s, k=exact_e: s ** (k - 1) * (1 - s), [r, 1])
            assert abs(by_formula / by_integral - 1) < 1e-20
        for dtype in (torch.float32, torch.float64):
            series = terms._near(torch.tensor(q, dtype=dtype), e).item()
            with mpmath.workdps(50):
                rounded = 1 - mpmath.mpf(torch.tensor(q, dtype=dtype).item())
                exact = (1 - rounded**exact_e) / exact_e - (1 - rounded ** (1 + exact_e)) / (1 + exact_e)
                assert abs(series / exact - 1) <= 4 * torch.finfo(dtype).eps


# --- properties ---


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.85, 0.99])
def test_it_is_convex_never_negative_and_zero_only_where_p_is_y(alpha):
    y = torch.randint(12, (500,))
    soft = diffmax_bisect(torch.randn(500, 12, dtype=torch.float64) * 2, alpha, n_iter=200)
    a, b = (torch.randn(500, 12, dtype=torch.float64) * 3 for _ in range(2))
    for target in (y, soft):
        at = [diffmax_loss(a + (b - a) * t, target, alpha, reduction="none", n_iter=200) for t in (0.0, 0.3, 0.5, 1.0)]
        assert all((value >= 0).all() for value in at)
        assert (at[1] <= 0.7 * at[0] + 0.3 * at[3] + 1e-13).all()
        assert (at[2] <= 0.5 * at[0] + 0.5 * at[3] + 1e-13).all()
        assert (at[2] < 0.5 * at[0] + 0.5 * at[3] - 1e-3).any()
    p = diffmax_bisect(a, alpha, n_iter=200)
    assert diffmax_loss(a, p, alpha, reduction="none", n_iter=200).max() < 1e-25
    moved = a + torch.randn_like(a)
    differs = (diffmax_bisect(moved, alpha, n_iter=200) - p).abs().amax(1) > 1e-2
    assert differs.sum() > 300
    assert diffmax_loss(moved, p, alpha, reduction="none", n_iter=200)[differs].min() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_a_lead_of_the_margin_is_a_loss_of_exactly_zero_and_less_is_not(alpha, dtype):
    margin = 1 / (1 - alpha)
    x = torch.tensor([[0.0, 0.0, margin], [0.0, -3.0, margin], [0.0, 0.0, margin - 0.125]], dtype=dtype)
    x.requires_grad_()
    losses = diffmax_loss(x, torch.tensor([2, 2, 2]), alpha, reduction="none")
    losses.sum().backward()
    assert (losses[:2] == 0).all()
    assert (x.grad[:2] == 0).all()
    assert losses[2] > 0
    assert x.grad[2].abs().min() > 0


def test_the_loss_of_an_index_rises_with_alpha():
    x, y = torch.randn(200, 12, dtype=torch.float64) * 2, torch.randint(12, (200,))
    losses = [diffmax_loss(x, y, a, reduction="none") for a in (0.1, 0.4, 0.8, 0.99)]
    assert all((one <= two + 1e-14).all() for one, two in itertools.pairwise(losses))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_adding_a_number_to_a_row_changes_nothing(alpha):
    x, y = torch.randn(20, 9).round(decimals=1) * 4, torch.randint(9, (20,))
    x = (x * 8).round() / 8
    for target in (y, torch.rand(20, 9).softmax(1)):
        assert torch.equal(diffmax_loss(x, target, alpha), diffmax_loss(x + 1024, target, alpha))


# --- gradients ---


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.85, 0.999])
def test_the_gradient_is_p_minus_y(alpha):
    x = (torch.randn(30, 40, dtype=torch.float64) * 2).requires_grad_()
    y, p = torch.randint(40, (30,)), diffmax_bisect(x.detach(), alpha)
    for target, dense in ((y, one_hot(y, 40)), (p.flip(1), p.flip(1))):
        grad = torch.autograd.grad(diffmax_loss(x, target, alpha, reduction="sum"), x)[0]
        assert (grad - (p - dense)).abs().max() <= 2e-16
        assert (grad.sum(1)).abs().max() < 1e-14


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("alpha", [0.003, *ALPHAS[1:]])
def test_the_gradient_in_alpha_agrees_with_a_finite_difference_of_sixty_digits(alpha, soft):
    for row in some_rows(count=2):
        y = torch.rand(12, dtype=torch.float64).softmax(0)
        y = y / y.sum()
        target = y.tolist() if soft else 3
        exact = exact_slope(row, target, alpha)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-6)):
            a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
            given = y.to(dtype).unsqueeze(0) if soft else torch.tensor([3])
            diffmax_loss(torch.tensor([row], dtype=dtype), given, a).backward()
            assert abs(a.grad.item() - exact) <= tolerance * max(1, abs(exact))
            assert soft or a.grad >= 0


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("alpha", [0.6, 0.75, 0.85, 0.95, 0.999])
def test_gradcheck_and_gradgradcheck_in_x_and_alpha(alpha, soft):
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    a = torch.full((3, 1), alpha, dtype=torch.float64, requires_grad=True)
    y = torch.rand(3, 6, dtype=torch.float64).softmax(1) if soft else torch.tensor([1, 5, 0])

    def loss(x, a):
        return diffmax_loss(x, y, a, reduction="none", n_iter=200)

    assert gradcheck(loss, (x, a), eps=1e-7, atol=2e-6)
    assert gradgradcheck(loss, (x, a), atol=1e-4)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5])
def test_gradcheck_in_x_and_alpha_where_second_derivatives_are_unbounded(alpha):
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, a: diffmax_loss(x, torch.tensor([1, 5, 0]), a), (x, a), eps=1e-7, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (1, 1, 5), (3, 1, 5)], ids=str)
def test_gradcheck_of_alphas_that_broadcast_with_weights_and_ignored_rows(shape):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    a = (torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    y, weight = torch.randint(4, (3, 5)), torch.rand(4, dtype=torch.float64)
    y[0, :2] = -100
    for reduction in ("mean", "none"):
        assert gradcheck(lambda x, a, r=reduction: diffmax_loss(x, y, a, weight=weight, reduction=r), (x, a))


def test_the_ends_of_alpha_have_finite_values_and_gradients():
    x, y = torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))
    for end, near in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        values = []
        for alpha in (end, near):
            a, leaf = torch.tensor(alpha, dtype=torch.float64, requires_grad=True), x.clone().requires_grad_()
            loss = diffmax_loss(leaf, y, a)
            values.append([loss.detach(), *torch.autograd.grad(loss, (leaf, a))])
        for one, other in zip(*values, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_learned_alpha_is_reached_through_a_function_and_a_map():
    beta, hill = torch.tensor(0.3, requires_grad=True), diffmax.HillMap(0.3)
    diffmax_loss(torch.randn(5, 7), torch.randint(7, (5,)), lambda: hill(beta)).backward()
    assert beta.grad < 0  # a larger beta, a lower alpha, a lower loss


def test_only_what_needs_a_gradient_gets_one():
    x, y, a = torch.randn(3, 4), torch.randint(4, (3,)), torch.tensor(0.5, requires_grad=True)
    diffmax_loss(x, y, a).backward()
    assert x.grad is None
    assert a.grad.shape == ()
    assert not diffmax_loss(x, y, 0.5).requires_grad


# --- half precision ---


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85, 0.99])
def test_half_precision_is_float32_rounded_once(alpha, dtype):
    x, y = (torch.randn(50, 300) * 3).to(dtype).requires_grad_(), torch.randint(300, (50,))
    full = x.detach().float().requires_grad_()
    for reduction in ("none", "mean", "sum"):
        half, single = diffmax_loss(x, y, alpha, reduction=reduction), diffmax_loss(full, y, alpha, reduction=reduction)
        assert torch.equal(half, single.to(dtype))
    grad, exact = torch.autograd.grad(half, x)[0], torch.autograd.grad(single, full)[0]
    assert torch.equal(grad, exact.to(dtype))


def test_under_autocast_the_loss_is_float32_like_cross_entropy_s():
    x, y = torch.randn(4, 6).bfloat16().requires_grad_(), torch.randint(6, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = diffmax_loss(x, y, 0.5)
        assert loss.dtype == cross_entropy(x, y).dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == torch.bfloat16


# --- edges ---


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_masks_bad_rows_and_ignored_rows(dtype):
    x = torch.randn(7, 6).to(dtype)
    x[0, 3:], x[1], x[2, 3], x[3, 4], x[4, 1:], x[5, 2] = -inf, -inf, nan, inf, -inf, nan
    y = torch.tensor([0, 0, 0, 0, 0, -100, 1])
    x.requires_grad_()
    a = torch.full((7, 1), 0.6, requires_grad=True)
    losses = diffmax_loss(x, y, a, reduction="none")
    losses.sum().backward()
    assert losses[[1, 4, 5]].tolist() == [0, 0, 0]
    assert losses[2].isnan()
    assert losses[3].isnan()
    assert losses[0] > 0
    assert torch.isfinite(losses[[0, 6]]).all()
    assert (x.grad[0, 3:] == 0).all()
    assert (x.grad[[1, 4, 5]] == 0).all()
    assert x.grad[2].isnan().all()
    assert torch.isfinite(x.grad[[0, 1, 4, 5, 6]]).all()
    assert (a.grad[[1, 4, 5]] == 0).all()
    assert torch.isfinite(a.grad[[0, 1, 4, 5, 6]]).all()


def test_a_masked_target_is_infinitely_wrong():
    x = torch.tensor([[0.5, -inf, 0.0]], requires_grad=True)
    loss = diffmax_loss(x, torch.tensor([1]), 0.5)
    loss.backward()
    assert loss == inf == cross_entropy(x, torch.tensor([1]))
    assert torch.isfinite(x.grad).all()
    assert diffmax_loss(x.detach(), torch.tensor([[0.5, 0.5, 0.0]]), 0.5) == inf


def test_one_class_no_rows_and_nothing_but_ignored_rows():
    assert diffmax_loss(torch.tensor([[3.0], [-1e30]]), torch.tensor([0, 0]), 0.3, reduction="none").tolist() == [0, 0]
    x = torch.empty(0, 5, requires_grad=True)
    none = diffmax_loss(x, torch.empty(0, dtype=torch.int64), 0.3, reduction="sum")
    none.backward()
    assert none == 0
    assert x.grad.shape == (0, 5)
    ignored = torch.full((2,), -100)
    assert diffmax_loss(torch.randn(2, 3), ignored, 0.3).isnan() == cross_entropy(torch.randn(2, 3), ignored).isnan()
    assert diffmax_loss(torch.randn(2, 3), ignored, 0.3, reduction="sum") == 0


def test_a_right_prediction_at_an_enormous_distance_is_zero():
    x = torch.tensor([[1e30, -1e30, 0.0], [3e38, -3e38, 0.0]])
    assert diffmax_loss(x, torch.tensor([0, 0]), 0.5, reduction="none").tolist() == [0, 0]


def test_any_strides_and_expanded_scores():
    base, y = torch.randn(6, 9, 4), torch.randint(9, (6, 4))
    view = base.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    plain = base.clone().requires_grad_()
    one, other = diffmax_loss(view, y, 0.6), diffmax_loss(plain, y, 0.6)
    one, other = torch.autograd.grad(one, view)[0], torch.autograd.grad(other, plain)[0]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    row = torch.randn(1, 9, requires_grad=True)
    grad = torch.autograd.grad(diffmax_loss(row.expand(3, 9), torch.tensor([1, 1, 1]), 0.6, reduction="sum"), row)[0]
    torch.testing.assert_close(grad, 3 * torch.autograd.grad(diffmax_loss(row, torch.tensor([1]), 0.6), row)[0])


# --- blocks and memory ---


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(40, 16), (3, 16, 50), (17,)], ids=str)
def test_blocks_change_neither_values_nor_gradients(monkeypatch, shape, soft):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dim = 0 if len(shape) == 1 else 1
    a = torch.rand([1 if i == dim else s for i, s in enumerate(shape)], dtype=torch.float64).requires_grad_()
    rows = [s for i, s in enumerate(shape) if i != dim]
    y = torch.rand(shape, dtype=torch.float64).softmax(dim) if soft else torch.randint(shape[dim], rows)
    results = []
    for elements in (1 << 20, 1):  # one block whose weights are kept; one row per block, and weights that are not
        monkeypatch.setattr(terms, "CPU_BLOCK_ELEMENTS", elements)
        loss = diffmax_loss(x, y, a, reduction="sum")
        results.append([loss.detach(), *torch.autograd.grad(loss, (x, a))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def peak_beyond_inputs(call):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_a_vocabulary_s_loss_needs_its_gradient_and_a_few_blocks(monkeypatch):
    """Cross-entropy needs its log-probabilities and its gradient, two tensors like the scores."""
    monkeypatch.setattr(terms, "CPU_BLOCK_ELEMENTS", 1 << 15)
    x, y = torch.randn(64, 32000, requires_grad=True), torch.randint(32000, (64,))

    def step(loss):
        return lambda: torch.autograd.grad(loss(x, y), x)

    assert peak_beyond_inputs(step(lambda x, y: diffmax_loss(x, y, 0.5))) <= 1.2 * x.nbytes
    assert peak_beyond_inputs(step(cross_entropy)) >= 2 * x.nbytes


def test_what_is_kept_for_backward_is_the_scores_and_weights_of_one_block_only():
    def kept(x, y):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            diffmax_loss(x, y, 0.5, reduction="sum")
        return {t.data_ptr(): t.nbytes for t in saved if t.data_ptr() != x.data_ptr()}

    y = torch.randint(40, (8,))
    assert sum(kept(torch.randn(8, 40, requires_grad=True), y).values()) >= 8 * 40 * 4
    wide = torch.randn(2, terms.CPU_BLOCK_ELEMENTS, requires_grad=True)
    assert sum(kept(wide, y[:2]).values()) <= 100


def test_backward_can_run_twice_and_leaves_what_it_kept(monkeypatch):
    for elements in (1 << 20, 1):
        monkeypatch.setattr(terms, "CPU_BLOCK_ELEMENTS", elements)
        x, y = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
        loss = diffmax_loss(x, y, 0.5)
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, x)[0])


# --- torch around it ---


@pytest.mark.parametrize("case", ["index", "soft", "tensor alpha", "other dim", "no gradient", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_opcheck(monkeypatch, case, dtype):
    if case == "blocks":
        monkeypatch.setattr(terms, "CPU_BLOCK_ELEMENTS", 1)
    x = torch.randn(3, 5, 2).to(dtype).requires_grad_(case != "no gradient")
    dim = 2 if case == "other dim" else 1
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.randint(x.shape[dim], [1 if i == dim else s for i, s in enumerate(x.shape)])
    y = torch.rand(3, 5, 2).softmax(dim).to(dtype) if case == "soft" else y
    e = torch.full((3, 1, 1), 0.3, dtype=acc, requires_grad=True) if case == "tensor alpha" else None
    torch.library.opcheck(torch.ops.diffmax.loss.default, (x, y, 0.3, e, dim, 50, ""))
    with torch.no_grad():
        losses, weights = torch.ops.diffmax.loss(x, y, 0.3, e, dim, 50, "")
    arguments = (torch.randn_like(losses), x.detach(), weights, y, 0.3, e if e is None else e.detach(), dim, 50, True, True, "")
    torch.library.opcheck(torch.ops.diffmax.loss_backward.default, arguments)


@pytest.mark.parametrize(  # each pair of values once
    ("case", "dynamic", "compiler"),
    [
        ("index", False, "aot_eager"), ("index", True, "inductor"), ("soft", False, "inductor"),
        ("soft", True, "aot_eager"), ("weighted", True, "aot_eager"), ("weighted", False, "inductor"),
    ],
)  # fmt: skip
def test_compiles_in_one_graph_forward_and_backward(case, dynamic, compiler):
    torch._dynamo.reset()
    weight = torch.rand(7) if case == "weighted" else None

    def step(x, y, a):
        return diffmax_loss(x * 2, y, a, weight=weight)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for n in (5, 8):
        x, a = torch.randn(n, 7, requires_grad=True), torch.tensor(0.6, requires_grad=True)
        y = torch.rand(n, 7).softmax(1) if case == "soft" else torch.randint(7, (n,))
        results = [[loss, *torch.autograd.grad(loss, (x, a))] for loss in (compiled(x, y, a), step(x, y, a))]
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_runs_on_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 5, 3, dtype=torch.bfloat16, requires_grad=True)
        alpha = torch.full((2, 1, 1), 0.5, requires_grad=True)
        diffmax_loss(x, torch.zeros(2, 3, dtype=torch.int64), alpha).backward()
        assert x.grad.shape == x.shape
        assert alpha.grad.shape == alpha.shape
    x, y = torch.empty(4, 6, device="meta", requires_grad=True), torch.empty(4, dtype=torch.int64, device="meta")
    diffmax_loss(x, y, 0.5).backward()
    assert x.grad.shape == x.shape


def test_compiles_the_module_under_autocast():
    torch._dynamo.reset()
    module = DiffmaxLoss(torch.nn.Parameter(torch.tensor(0.7)))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(4, 6).bfloat16().requires_grad_(), torch.randint(6, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x, y).dtype == torch.float32
    compiled(x, y).backward()
    assert module.alpha.grad > 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_named_backend_computes_the_weights(backend):
    x, y = torch.randn(4, 6, requires_grad=True), torch.randint(6, (4,))
    named = diffmax_loss(x, y, 0.6, backend=backend)
    with diffmax.use_backend(backend):
        used = diffmax_loss(x, y, 0.6)
    assert torch.equal(named, used)
    torch.testing.assert_close(named, diffmax_loss(x.double(), y, 0.6).float())
    with pytest.raises(diffmax.NoBackendError, match="nobody"):
        diffmax_loss(x, y, 0.6, backend="nobody")


def test_a_forced_backend_is_asked_in_backward_too():
    """Where weights are not kept, backward solves again, and on the backend that forward was given."""
    description = next(r for r in diffmax.backends() if r.backend == "cpu" and r.operator == "bisect")
    assert description.status in ("active", "available")
    code = """
import torch, diffmax
from diffmax.operators.loss import terms
from diffmax.operators.rows import operator as rows_operator
terms.CPU_BLOCK_ELEMENTS = 1
asked, kernel = [], rows_operator.kernel
rows_operator.kernel = lambda name, x, backend, **k: asked.append((name, backend)) or kernel(name, x, backend, **k)
x = torch.randn(2, 4, requires_grad=True)
diffmax.diffmax_loss(x, torch.tensor([0, 1]), 0.5, backend="reference").backward()
assert asked == [("bisect", "reference")] * 4, asked
"""
    fresh.python(code)


def test_forward_mode_and_torch_func_are_refused_clearly():
    """Compiled code too, whose forward mode torch.autograd.forward_ad does not know of."""
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        diffmax_loss(forward_ad.make_dual(x, torch.ones_like(x)), y, 0.5)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms are not supported"):
        torch.func.grad(lambda x: diffmax_loss(x, y, 0.5))(x)
    compiled = torch.compile(lambda x, t: torch.func.jvp(lambda x: diffmax_loss(x, y, 0.5), (x,), (t,))[1], backend="aot_eager")
    with pytest.raises(Exception, match=r"forward-mode differentiation and .* are not supported"):
        compiled(x, torch.ones_like(x))


def test_the_module_is_the_function_and_can_be_copied_and_saved():
    x, y, weight = torch.randn(4, 6), torch.tensor([0, 3, 5, 1]), torch.rand(6)
    module = DiffmaxLoss(0.7, weight=weight, ignore_index=3, reduction="sum", n_iter=60)
    expected = diffmax_loss(x, y, 0.7, weight=weight, ignore_index=3, reduction="sum", n_iter=60)
    assert torch.equal(copy.deepcopy(module)(x, y), expected)
    assert list(module.state_dict()) == ["weight"]
    assert "alpha=0.7, ignore_index=3, reduction='sum'" in repr(module)
    assert list(DiffmaxLoss(torch.tensor(0.5)).state_dict()) == ["alpha"]
    assert [name for name, _ in DiffmaxLoss(torch.nn.Parameter(torch.tensor(0.5))).named_parameters()] == ["alpha"]


# --- messages ---

X, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])
SOFT = torch.full((3, 4), 0.25)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], Y), TypeError, r"diffmax_loss: X must be a torch\.Tensor, got list"),
        ((X.long(), Y), TypeError, r"X must be float16, bfloat16, float32 or float64, got int64"),
        ((torch.zeros(()), Y), ValueError, r"X must have a dimension of classes"),
        ((torch.zeros(3, 0), Y), ValueError, r"X must have at least one class, got shape \(3, 0\)"),
        ((X, [0, 1, 2]), TypeError, r"target must be a torch\.Tensor, got list"),
        ((X, Y.int()), TypeError, r"class indices as int64.*got int32\n.*target\.long\(\)"),
        ((X, Y > 0), TypeError, r"class indices as int64.*got bool"),
        ((X, Y[:2]), ValueError, r"class indices must have shape \(3,\), got \(2,\)\n  X \(3, 4\)   classes along dim 1"),
        ((X, Y.unsqueeze(1)), ValueError, r"must have shape \(3,\), got \(3, 1\)"),
        ((X, torch.tensor([0, 4, 1])), ValueError, r"must lie in \[0, 3\] or equal ignore_index = -100, got 4"),
        ((X, torch.tensor([0, -1, 1])), ValueError, r"must lie in \[0, 3\] or equal ignore_index = -100, got -1"),
        ((X, Y.float()), ValueError, r"probabilities must have X's shape \(3, 4\), got \(3,\)\n.*dtype int64"),
        ((X, SOFT * 2), ValueError, r"must sum to 1 along dim 1, got a smallest of 0\.5 and sums from 2 to 2"),
        ((X, torch.tensor([[1.5, -0.5, 0, 0]] * 3)), ValueError, r"must not be negative.*got a smallest of -0\.5"),
        ((X, SOFT.clone().requires_grad_()), ValueError, r"target must not require a gradient.*\npass target\.detach"),
        ((X, Y, 1.5), ValueError, r"diffmax_loss: alpha must lie strictly between 0 and 1, got 1\.5"),
        ((X, Y, torch.full((3,), 0.5)), ValueError, r"alpha must broadcast against X.*got shape \(3,\)"),
    ],
)
def test_says_what_is_wrong_with_the_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        diffmax_loss(*arguments)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"reduction": "batchmean"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got 'batchmean'"),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index must be an int, got 1\.0 of type float"),
        ({"weight": [1.0] * 4}, TypeError, r"weight must be a tensor of a floating dtype, got list"),
        ({"weight": torch.ones(4).long()}, TypeError, r"weight must be a tensor of a floating dtype, got int64"),
        ({"weight": torch.ones(3)}, ValueError, r"one number per class, shape \(4,\), got shape \(3,\)"),
        ({"weight": torch.ones(4, requires_grad=True)}, ValueError, r"weight must not require a gradient"),
        ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight and X must be on one device, got meta and cpu"),
        ({"n_iter": 0}, ValueError, r"n_iter must be at least 1, got 0"),
    ],
)
def test_says_what_is_wrong_with_the_named_arguments(named, error, message):
    with pytest.raises(error, match=message):
        diffmax_loss(X, Y, **named)


def test_says_that_ignore_index_is_for_indices_and_where_the_target_is():
    with pytest.raises(ValueError, match=r"ignore_index is for class indices, got 2 with a target of probabilities"):
        diffmax_loss(X, SOFT, ignore_index=2)
    with pytest.raises(ValueError, match=r"target and X must be on one device, got meta and cpu"):
        diffmax_loss(X, Y.to("meta"))
    with pytest.raises(ValueError, match=r"DiffmaxLoss: reduction must be one of"):
        DiffmaxLoss(reduction="elementwise_mean")


def test_a_negative_index_that_nobody_looks_at_is_still_an_error():
    """Under torch.compile the values of a target are not read; -1 must not pass for a row that does not count."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: diffmax_loss(x, y, 0.5), backend="eager")
    with pytest.raises(RuntimeError, match="out of bounds"):
        compiled(torch.randn(3, 4), torch.tensor([0, -1, 2]))


def test_a_weight_of_the_module_is_a_tensor():
    with pytest.raises(TypeError, match="DiffmaxLoss: weight must be a tensor"):
        diffmax.DiffmaxLoss(weight=[1.0] * 6)
