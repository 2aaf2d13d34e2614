"""Every formula and every measured number of docs/theory.md. The solver is written here again, from the page."""

import itertools
import math
import re
from pathlib import Path

import mpmath
import pytest
import torch
from entmax import entmax_bisect, sparsemax

from diffmax import diffmax_bisect
from diffmax.operators.common.numerics import MIN_E, alpha_weight, newton_steps
from diffmax.testing import solve_exactly

pytestmark = pytest.mark.sampled(3)

ROOT = Path(__file__).parents[1]
THEORY = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
NUMBERED = THEORY + (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")  # one sequence of numbers
ALPHAS = [0.003, 0.1, 0.3, 0.5, 0.7, 0.85, 0.9, 0.99, 0.9999]
INF = math.inf


# --- Newton's method as the page states it, in float64 ---


def powers(z, delta, e):
    """S, S_1 and the weights, in the form of section 7."""
    u = z - delta
    live = u > -1
    u = torch.where(live, u, 0.0)
    p = torch.where(live, torch.exp(torch.log1p(u) / e), 0.0)
    return p.sum(-1, keepdim=True), torch.where(live, p / (1 + u), 0.0).sum(-1, keepdim=True), p


def iterates(z, e, steps):
    """delta_0, ..., delta_steps by Eq. 2."""
    delta = torch.zeros_like(z[..., :1])
    yield delta
    for _ in range(steps):
        total, slope, _ = powers(z, delta, e)
        delta = delta - total * torch.expm1(-e * total.log()) / slope
        yield delta


def scaled(x, e):
    return e * (x - x.amax(-1, keepdim=True))


def hard_rows(n, e):
    """Random rows, and rows made to be hard: entries that leave the support one after another, ties, masks, all equal."""
    noise = torch.randn(32, n, dtype=torch.float64)
    ladder = -torch.linspace(0, 1, n, dtype=torch.float64).expand(8, n) * torch.rand(8, 1, dtype=torch.float64) / e
    geometric = (
        -(2.0 ** -(torch.arange(n, dtype=torch.float64) % 50)).expand(8, n) * torch.rand(8, 1, dtype=torch.float64) * 2 / e
    )
    one_high = torch.full((1, n), -1 / e * (1 - 1e-9), dtype=torch.float64).index_fill(1, torch.tensor([0]), 0.0)
    masked = noise.masked_fill(torch.rand_like(noise) < 0.5, -INF).index_fill(1, torch.tensor([0]), 0.0)
    return torch.cat([noise * s for s in (0.01, 1, 10)] + [noise.exp(), ladder, geometric, one_high, one_high * 0, masked])


# --- sections 1 to 4 ---


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_weights_are_eq_1_at_the_one_tau_that_sums_to_1(alpha):
    row = (torch.randn(12) * 2).tolist()
    p = diffmax_bisect(torch.tensor(row, dtype=torch.float64), alpha, n_iter=200)
    e = 1 - alpha
    tau = torch.tensor(row[int(p.argmax())], dtype=torch.float64) - p.max() ** e / e
    by_eq_1 = ((e * (torch.tensor(row, dtype=torch.float64) - tau)).clamp_min(0)) ** (1 / e)
    assert abs(p.sum() - 1) <= 1e-14
    assert torch.allclose(p, by_eq_1, rtol=0, atol=1e-11)
    assert torch.allclose(
        p, torch.tensor([float(q) for q in solve_exactly(row, alpha)], dtype=torch.float64), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_on_the_support_dp_dx_is_p_to_the_alpha(alpha):
    with mpmath.workdps(60):
        e, tau, h = 1 - mpmath.mpf(alpha), mpmath.mpf("-0.3"), mpmath.mpf(10) ** -20

        def p(x):
            return (e * (x - tau)) ** (1 / e)

        for base in ("0.01", "0.2", "0.7", "1"):
            x = tau + mpmath.mpf(base) / e
            derivative = (p(x + h) - p(x - h)) / (2 * h)
            assert abs(derivative / p(x) ** alpha - 1) < 1e-30


def test_the_limit_alpha_1_is_softmax_and_its_first_order_is_as_stated():
    x = torch.randn(5, 20, dtype=torch.float64)
    p, log_p = x.softmax(-1), x.log_softmax(-1)
    w = p * log_p**2 / 2
    for e in (1e-3, 1e-4, 1e-5):
        difference = diffmax_bisect(x, 1 - e) - p
        assert (difference + e * (w - p * w.sum(-1, keepdim=True))).abs().max() < 30 * e**2
    assert (diffmax_bisect(x, 1 - 1e-15) - p).abs().max() < 1e-14


def test_the_limit_alpha_0_is_sparsemax():
    x = torch.randn(50, 20, dtype=torch.float64)
    assert (diffmax_bisect(x, torch.tensor(0.0, dtype=torch.float64)) - sparsemax(x, dim=-1)).abs().max() < 1e-14
    assert (diffmax_bisect(x, 1e-9) - sparsemax(x, dim=-1)).abs().max() < 1e-7


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.85, 0.99])
def test_eq_11_tau_falls_with_alpha(alpha):
    with mpmath.workdps(60):
        row, h = [0.3, 1.0, -0.4, 0.9, -3.0, 0.0], mpmath.mpf(10) ** -20

        def tau(a):
            p, e = solve_exactly(row, a, digits=50), 1 - a
            return mpmath.mpf(1) - p[1] ** e / e

        alpha = mpmath.mpf(alpha)
        p, e = [q for q in solve_exactly(row, alpha, digits=50) if q > 0], 1 - alpha
        entropy = -mpmath.fsum(q * mpmath.log(q) for q in p)
        stated = -(1 + e * entropy) / (e**2 * mpmath.fsum(q**alpha for q in p))
        assert abs((tau(alpha + h) - tau(alpha - h)) / (2 * h) / stated - 1) < 1e-15
        assert stated < 0


def test_the_support_for_a_smaller_alpha_lies_inside_the_support_for_a_larger_one():
    x = torch.randn(200, 64, dtype=torch.float64) * torch.tensor([0.3, 1, 3, 10], dtype=torch.float64).repeat(50)[:, None]
    supports = [diffmax_bisect(x, alpha, n_iter=200) > 0 for alpha in ALPHAS[:-2]]
    assert all((small <= large).all() for small, large in itertools.pairwise(supports))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_it_is_entmax_with_alpha_2_minus_alpha(alpha):
    x = torch.randn(20, 30, dtype=torch.float64) * 2
    theirs = entmax_bisect(x, alpha=2 - alpha, dim=-1, n_iter=100)
    # entmax takes plain powers, so it loses digits near alpha = 1 (section 7)
    assert (diffmax_bisect(x, alpha, n_iter=200) - theirs).abs().max() < max(1e-13, 1e-15 / (1 - alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_eq_12_no_other_point_of_the_simplex_does_better(alpha):
    x = torch.randn(8, dtype=torch.float64) * 2

    def objective(q):
        return (q * x).sum(-1) - ((q ** (2 - alpha)).sum(-1) - 1) / ((2 - alpha) * (1 - alpha))

    p = diffmax_bisect(x, alpha, n_iter=200)
    others = torch.distributions.Dirichlet(torch.full((8,), 0.3, dtype=torch.float64)).sample((2000,))
    for share in (1.0, 0.1, 0.001):
        assert (objective((1 - share) * p + share * others) <= objective(p) + 1e-12).all()


def test_the_entropy_of_eq_12_tends_to_shannons():
    q, e = torch.softmax(torch.randn(8, dtype=torch.float64), -1), 1e-6
    assert abs((1 - (q ** (1 + e)).sum()) / ((1 + e) * e) + (q * q.log()).sum()) < 1e-5


@pytest.mark.parametrize("alpha", ALPHAS[:-2])
def test_the_reading_without_the_factor_is_the_operator_on_scaled_scores(alpha):
    x = torch.randn(40, dtype=torch.float64)
    p = diffmax_bisect(x / (1 - alpha), alpha, n_iter=200)
    tau = x.max() - p.max() ** (1 - alpha)
    assert torch.allclose(p, (x - tau).clamp_min(0) ** (1 / (1 - alpha)), rtol=0, atol=1e-11)


def test_the_limit_of_the_reading_without_the_factor_is_the_largest_score():
    x = torch.tensor([0.3, 1.0, 0.8, -2.0], dtype=torch.float64)
    assert diffmax_bisect(x / 1e-3, 1 - 1e-3)[1] > 1 - 1e-12


# --- sections 5 and 6 ---


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 7, 257])
def test_eq_7_brackets_the_root_and_only_candidates_are_positive(alpha, n):
    e = 1 - alpha
    z = scaled(hard_rows(n, e), e)
    *_, delta = iterates(z, e, 30)
    t = delta - 1
    assert (t >= -1).all()
    assert (t <= -(n**-e) + 1e-15).all()
    assert (powers(z, delta, e)[2][z <= -1] == 0).all()


@pytest.mark.parametrize("alpha", [0.0, *ALPHAS])
def test_eq_8_the_slope_is_as_stated_and_supports_the_function_from_below(alpha):
    """N'(t) = -S_1 S^-alpha is a subgradient everywhere, at kinks and where entries leave the support too."""
    e = 1 - alpha
    z = scaled(hard_rows(9, e)[-40:], e)
    # to the upper end of the bracket and beyond, but not to where S itself underflows
    grid = torch.linspace(0, min(0.999, 5 * (1 - 9**-e)), 301, dtype=torch.float64)
    kinks = torch.tensor([0.25, 0.5], dtype=torch.float64)
    z[0, :4] = torch.tensor([0.0, -0.75, -0.5, -0.5], dtype=torch.float64)
    deltas = torch.cat([grid, kinks[kinks < grid[-1]]]).sort().values
    totals, slopes = zip(*(powers(z, d, e)[:2] for d in deltas), strict=True)
    totals, slopes = torch.cat(totals, 1), torch.cat(slopes, 1)
    value = torch.expm1(e * totals.log())
    slope = -slopes * totals**-alpha
    assert (value.diff(dim=1) < 0).all()
    tangent = value[:, :, None] + slope[:, :, None] * (deltas[None, None, :] - deltas[None, :, None])
    assert (value[:, None, :] >= tangent - 1e-12).all()
    assert (slope <= -1 + 1e-12).all()
    assert (slope >= -(9**e) - 1e-12).all()


@pytest.mark.parametrize("alpha", [0.0, *ALPHAS])
@pytest.mark.parametrize("n", [1, 2, 3, 64, 1024])
def test_eq_2_never_overshoots_and_eq_9_holds(alpha, n):
    e = 1 - alpha
    z = scaled(hard_rows(n, e), e)
    deltas = list(iterates(z, e, 80))
    root = deltas[-1]
    norm = n**e
    previous = None
    for j, delta in enumerate(deltas):
        total, slope, _ = powers(z, delta, e)
        value, steepness = torch.expm1(e * total.log()), slope * total**-alpha
        # slack: a few roundings of numbers near 1, each divided by a slope of at least 1
        slack = 1e-14 * norm
        assert (root - delta >= -slack).all()
        assert (root - delta <= value + slack).all()
        assert (value <= (norm - 1) * norm * 4.0**-j + slack).all()
        product = value * steepness
        assert previous is None or (product <= previous / 4 + slack * norm).all()
        previous = product
    assert (powers(z, root, e)[0] - 1).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", ["0.003", "0.1", "0.5", "0.9", "0.9999"])
def test_eq_2_and_9_with_sixty_digits(alpha):
    with mpmath.workdps(60):
        e = 1 - mpmath.mpf(alpha)
        k = 1 / e
        for row in (torch.randn(20).tolist(), [-(2.0**-j) for j in range(20)], [0.0] + [-float(0.999999 / e)] * 19, [0.0] * 20):
            z = [e * (mpmath.mpf(x) - mpmath.mpf(max(row))) for x in row]
            p = solve_exactly(row, mpmath.mpf(alpha), digits=50)
            root = -(max(p) ** e)  # the largest z is 0
            t, n = mpmath.mpf(-1), len(row)
            for j in range(30):
                assert -(mpmath.mpf(10) ** -45) <= root - t <= (n**e - 1) * n**e * mpmath.mpf(4) ** -j + mpmath.mpf(10) ** -45
                y = [v - t for v in z if v > t]
                total, slope = mpmath.fsum(v**k for v in y), mpmath.fsum(v ** (k - 1) for v in y)
                t += (total - total ** mpmath.mpf(alpha)) / slope


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n_iter", [1, 3, 10, 25])
def test_eq_10_and_13_newton_steps_are_at_least_as_accurate_as_bisection(alpha, n_iter):
    for n in (2, 50, 500):
        e = 1 - alpha
        z = scaled(hard_rows(n, e), e)
        *_, root = iterates(z, e, 80)
        low, high = torch.zeros_like(root), torch.full_like(root, 1 - n**-e)
        for _ in range(n_iter):
            middle = (low + high) / 2
            above = powers(z, middle, e)[0] >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        bound = (n**e - 1) * n**-e * 2.0**-n_iter
        assert ((root - low).abs() <= bound + 1e-14).all()
        *_, delta = iterates(z, e, newton_steps(n_iter, n, e, torch.float64))
        assert (root - delta <= bound + 1e-14).all()
        log_sum = powers(z, delta, e)[0].log()
        assert (log_sum <= (1 - n**-e) / e * 2.0**-n_iter + 1e-12).all()
        assert (1 - n**-e) / e <= math.log(n)


def test_newton_steps_is_the_stated_number_up_to_the_digits_of_the_dtype():
    assert newton_steps(20, 1024, 0.5, torch.float32) == 15
    assert newton_steps(50, 1024, 0.5, torch.float32) == 26 // 2 + 5
    assert newton_steps(200, 1024, 0.5, torch.float64) == 54 // 2 + 5


def test_newton_ends_at_the_root_for_sparsemax():
    z = torch.randn(100, 50, dtype=torch.float64) * 3
    z = z - z.amax(-1, keepdim=True)
    *_, last_but_one, last = iterates(z, 1.0, 20)
    assert (last - last_but_one).abs().max() < 1e-15
    assert (powers(z, last, 1.0)[2] - sparsemax(z, dim=-1)).abs().max() < 1e-14


# --- section 8 ---


def finite_difference(value, at, digits=60):
    with mpmath.workdps(digits):
        h = mpmath.mpf(10) ** -20
        return (value(at + h) - value(at - h)) / (2 * h)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_eq_3_4_and_6_are_the_derivatives_of_eq_1(alpha):
    row, g = (torch.randn(7) * 1.5).tolist(), torch.randn(7).tolist()
    with mpmath.workdps(60):
        alpha, scores = mpmath.mpf(alpha), [mpmath.mpf(x) for x in row]
        e = 1 - alpha
        p = solve_exactly(scores, alpha, digits=50)
        s = [q**alpha if q > 0 else mpmath.mpf(0) for q in p]
        w = [q * (mpmath.exp(-e * mpmath.log(q)) - 1 + e * mpmath.log(q)) / e**2 if q > 0 else mpmath.mpf(0) for q in p]
        mean = mpmath.fdot(s, g) / mpmath.fsum(s)

        def loss_of(i):
            return lambda x: mpmath.fdot(g, solve_exactly([*scores[:i], x, *scores[i + 1 :]], alpha, digits=50))

        for i in range(len(row)):
            assert abs(finite_difference(loss_of(i), scores[i]) - s[i] * (g[i] - mean)) < 1e-18
        in_alpha = finite_difference(lambda a: mpmath.fdot(g, solve_exactly(scores, a, digits=50)), alpha)
        assert abs(in_alpha - mpmath.fsum(a * (b - mean) for a, b in zip(w, g, strict=True))) < 1e-15
        assert all(a >= 0 for a in w)


def test_the_limit_of_phi_is_half_the_square():
    with mpmath.workdps(60):
        e = mpmath.mpf(10) ** -12
        for log_p in (-0.1, -1, -20):
            phi = (mpmath.exp(-e * log_p) - 1 + e * log_p) / e**2
            assert abs(phi - mpmath.mpf(log_p) ** 2 / 2) < 1e-7


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_eq_14_is_the_derivative_of_eq_3(alpha):
    g, v = torch.randn(2, 6, dtype=torch.float64)
    x = torch.tensor([1.0, 0.9, 0.6, 0.2, -0.1, -40.0], dtype=torch.float64)

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad((diffmax_bisect(x, alpha, n_iter=200) * g).sum(), x, create_graph=True)[0], x

    p = diffmax_bisect(x, alpha, n_iter=200)
    live = p > 0
    s, r = torch.where(live, p**alpha, 0.0), torch.where(live, alpha * p.where(live, torch.ones(())) ** (2 * alpha - 1), 0.0)
    h = r * (v - (s * v).sum() / s.sum()) * (g - (s * g).sum() / s.sum())
    stated = h - s * h.sum() / s.sum()
    step = 1e-6
    difference = (gradient(x + step * v)[0] - gradient(x - step * v)[0]).detach() / (2 * step)
    assert ((p < 1e-12) | (p > 1e-3)).all(), "the step must not reach the edge of the support"
    assert (difference - stated).abs().max() < 1e-6
    first, at = gradient(x)
    assert (torch.autograd.grad(first, at, v)[0] - stated).abs().max() < 1e-11


def test_the_second_derivative_grows_without_bound_below_one_half_and_is_never_nan():
    largest = []
    for gap in (1e-2, 1e-4, 1e-6):
        x = torch.tensor([0.0, -1 / 0.7 + gap], dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(diffmax_bisect(x, 0.3, n_iter=200)[0], x, create_graph=True)
        largest.append(torch.autograd.grad(first[0], x)[0].abs().max().item())
    assert largest[0] * 2 < largest[1] < largest[2] / 2
    x = torch.tensor([0.0, -1 / 0.7 - 1, -INF], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(diffmax_bisect(x, 0.3)[0], x, create_graph=True)
    assert torch.autograd.grad(first[0], x)[0].isfinite().all()


# --- sections 9 to 11 ---


@pytest.mark.parametrize("alpha", [0.003, 0.5, 0.9999])
def test_the_table_of_edges(alpha):
    rows = [[1.0, -INF, 0.5], [-INF, -INF, -INF], [1.0, math.nan, 0.0], [1.0, INF, 0.0], [0.1, 0.2, 0.3]]
    x = torch.tensor(rows, requires_grad=True)
    p = diffmax_bisect(x, alpha)
    p.backward(torch.tensor([[1.0, 2.0, 3.0]]).expand(5, 3))
    assert p[0, 1] == x.grad[0, 1] == 0
    assert (p[1] == 0).all()
    assert (x.grad[1] == 0).all()
    assert p[2:4].isnan().all()
    assert p[[0, 1, 4]].isfinite().all()
    assert x.grad[[0, 1, 4]].isfinite().all()
    one = torch.tensor([-7.0], requires_grad=True)
    diffmax_bisect(one, alpha).sum().backward()
    assert (diffmax_bisect(one, alpha), one.grad) == (1, 0)
    assert diffmax_bisect(torch.empty(2, 0), alpha).shape == (2, 0)


def test_at_min_e_the_operator_is_softmax_to_the_last_digit():
    assert MIN_E == 2.0**-60
    x = torch.randn(5, 30, dtype=torch.float64) * 5
    log_p = x.log_softmax(-1)
    w = log_p.exp() * log_p**2 / 2
    assert (MIN_E * (w - log_p.exp() * w.sum(-1, keepdim=True)).abs()).max() < torch.finfo(torch.float64).eps / 2
    assert (diffmax_bisect(x, torch.ones((), dtype=torch.float64)) - log_p.exp()).abs().max() < 1e-15


def test_float16_flushes_weights_whose_power_is_not_small_and_bfloat16_does_not():
    assert torch.tensor([2.0**-25, 2.0**-25 * 1.01]).half().tolist() == [0.0, 2.0**-24]
    assert (f"{2.0**-12.5:.1e}", f"{2.0**-2.5:.2f}") == ("1.7e-04", "0.18")
    assert torch.tensor(2.0**-149).bfloat16() == 0
    assert torch.tensor(torch.finfo(torch.float32).tiny).bfloat16() > 0


def test_backward_of_float16_uses_weights_that_float16_flushes():
    x = torch.tensor([0.0, -1.8515625, -0.5], dtype=torch.float16)
    grad = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float16)
    for alpha in (0.3, 0.5):
        scores = torch.linspace(-1 / (1 - alpha), -1.2, 2001).half()
        p = diffmax_bisect(torch.stack([torch.zeros_like(scores), scores, torch.full_like(scores, -0.5)], -1).double(), alpha)
        found = ((p[:, 1] > 0) & (p[:, 1] < 2.0**-25)).nonzero()
        if not len(found):
            continue
        x[1] = scores[found[0, 0]]
        half, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        p = diffmax_bisect(half, alpha)
        p.backward(grad)
        diffmax_bisect(exact, alpha).backward(grad.double())
        assert p[1] == 0
        assert half.grad[1] != 0
        assert (half.grad.double() - exact.grad).abs().max() < 1e-3


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.85, 0.99])
def test_eq_5_is_the_gradient_of_attention(alpha):
    scores = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    values, grad = torch.randn(9, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    weights = diffmax_bisect(scores, a, n_iter=200)
    (weights @ values).backward(grad)
    p, e = weights.detach(), 1 - alpha
    log_p = torch.where(p > 0, p, 1.0).log()
    s = torch.where(p > 0, p**alpha, 0.0)
    w = p * (torch.expm1(-e * log_p) + e * log_p) / e**2
    mean = (grad * (s @ values / s.sum(-1, keepdim=True))).sum(-1, keepdim=True)
    assert (scores.grad - s * (grad @ values.T - mean)).abs().max() < 1e-13
    assert abs(a.grad - (w * (grad @ values.T - mean)).sum()) < 1e-10


# --- the page's measured numbers, and its equation numbers ---


def table(after_alpha):
    """The numbers of the table of docs/theory.md whose columns are alpha and then `after_alpha`, one list per row."""
    lines = iter(THEORY.splitlines())
    for line in lines:
        if line.startswith(f"| \N{GREEK SMALL LETTER ALPHA} | {after_alpha}"):
            break
    else:
        raise AssertionError(f"docs/theory.md has no table of {after_alpha!r}")
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([float(cell) for cell in line.strip("| ").split("|")])
    return rows


def measured_scores():
    unit = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [sigma * unit for sigma in (0.3, 1.0, 3.0, 10.0)]


def test_the_measured_shares_of_zeros():
    for alpha, *printed in table("Eq. 1, "):
        scores = measured_scores()
        weights = [diffmax_bisect(x, alpha) for x in scores] + [diffmax_bisect(x / (1 - alpha), alpha) for x in scores]
        measured = [100 * (p == 0).double().mean().item() for p in weights]
        assert measured == pytest.approx(printed, abs=0.15), f"alpha {alpha}: {[round(m, 1) for m in measured]}"


def test_the_shares_that_decision_0001_quotes_are_those_of_the_table():
    decision = (ROOT / "docs" / "decisions" / "0001-reading-of-the-definition.md").read_text(encoding="utf-8")
    row = next(numbers for alpha, *numbers in table("Eq. 1, ") if alpha == 0.9)
    assert f"{row[1]:.1f} % zeros on N(0, 1) scores, {row[2]:.1f} % on N(0, 9)" in decision
    assert f"{row[5]:.1f} % and {row[6]:.1f} %" in decision


@pytest.mark.slow
def test_the_measured_steps_and_candidates():
    for alpha, *printed in table("steps, "):
        steps, candidates = [], []
        for x in measured_scores():
            z = scaled(x, 1 - alpha)
            unsolved = [(powers(z, delta, 1 - alpha)[0] - 1).abs() >= 1e-6 for delta in iterates(z, 1 - alpha, 15)]
            steps.append(sum(u.double().mean().item() for u in unsolved))
            candidates.append(100 * (z > -1).double().mean().item())
        assert [*steps, *candidates] == pytest.approx(printed, abs=0.15), f"alpha {alpha}: {steps} {candidates}"


def same_magnitude(measured, printed):
    """Rounding errors depend on the machine's vector instructions: equal up to a factor of 3."""
    return all(p / 3 <= m <= 3 * p for m, p in zip(measured, printed, strict=True))


def test_the_measured_digits_near_alpha_1():
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    for alpha, *printed in table("log1p and expm1 |"):
        e = 1 - alpha
        z = scaled(x.double(), e)
        *_, root = iterates(z, e, 30)
        exact = powers(z, root, e)[2]
        z = scaled(x, e)
        *_, delta = iterates(z, e, 10)
        ours = powers(z, delta, e)[2]
        t = -torch.ones(64, 1)
        for _ in range(12):
            base = (z - t).clamp_min(0)
            total = (base ** (1 / e)).sum(-1, keepdim=True)
            t = t + (total - total**alpha) / (base ** (1 / e - 1)).sum(-1, keepdim=True)
        plain = (z - t).clamp_min(0) ** (1 / e)
        measured = [(p / p.sum(-1, keepdim=True) - exact).abs().max().item() for p in (ours, plain)]
        assert same_magnitude(measured, printed), f"alpha {alpha}: {measured}"


def phi_series(v, terms):
    return sum(v**j / math.factorial(j + 2) for j in range(terms))


def test_the_measured_errors_of_w():
    p = torch.logspace(-7, 0, 1501).clamp(max=1)
    log_p = p.log()
    for alpha, *printed in table("series and expm1 |"):
        e = 1 - alpha
        exact = []
        for value in p.tolist():
            x = mpmath.mpf(e) * mpmath.log(value)
            exact.append(float(value * (mpmath.exp(-x) - 1 + x) / mpmath.mpf(e) ** 2))
        v, s = -e * log_p, torch.exp(alpha * log_p)
        recipe = alpha_weight(p, log_p, e)
        earlier = torch.where(v < 0.3, p * log_p**2 * phi_series(v.clamp(max=0.3), 7), (s - p * (1 + v)) / e**2)
        as_written = p * (torch.exp(v) - 1 - v) / e**2
        measured = [(w.double() - torch.tensor(exact)).abs().max().item() for w in (recipe, earlier, as_written)]
        assert same_magnitude(measured, printed), f"alpha {alpha}: {measured}"


@pytest.mark.parametrize(("terms", "eps"), [(11, 2.0**-24), (18, 2.0**-53)])
def test_the_rest_of_the_series_of_phi_is_below_rounding(terms, eps):
    assert phi_series(1.0, 40) - phi_series(1.0, terms) < eps * phi_series(1.0, 40)


CITATION = re.compile(r"\bEqs?\. ?(\d+)((?:(?:, | and | to |/)\d+)*)")
SOURCES = [
    path
    for pattern in (
        "*.md",
        "diffmax-*/**/*.py",
        "diffmax-*/*.md",
        "docs/**/*.md",
        "docs/*.py",
        "tests/*.py",
        "examples/*",
        "benchmarks/**/*.py",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and "_build" not in path.parts
]


def cited(text):
    for match in CITATION.finditer(text):
        yield from map(int, re.findall(r"\d+", match.group()))


def test_the_equations_are_numbered_once_each_without_a_gap():
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", NUMBERED)]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 10


def test_every_cited_equation_exists():
    numbers = {int(n) for n in re.findall(r"\\tag\{(\d+)\}", NUMBERED)}
    wrong = [
        f"{p.relative_to(ROOT)}: Eq. {n}" for p in SOURCES for n in cited(p.read_text(encoding="utf-8")) if n not in numbers
    ]
    assert not wrong
    assert sum(len(list(cited(p.read_text(encoding="utf-8")))) for p in SOURCES if p.suffix == ".py") > 5


def test_citations_are_found_in_every_form():
    assert list(cited("Eq. 3, Eq. 4/6; Eqs. 9 and 10, (Eq. 2 to 5)")) == [3, 4, 6, 9, 10, 2, 5]
