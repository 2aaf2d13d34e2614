"""diffmax.compat.entmax: entmax's values, gradients and signatures; its open bugs, each with a test; equations 21 to 25."""

import copy
import inspect
import itertools
import math

import entmax
import mpmath
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy

import diffmax
from diffmax.compat import entmax as ours
from diffmax.testing import gates, solve_exactly
from tests import fresh

pytestmark = pytest.mark.sampled(5)

INSIDE = [1.0, 1.001, 1.25, 1.5, 1.75, 2.0]
OUTSIDE = [0.05, 0.2, 0.5, 0.75, 0.999, 2.001, 2.25, 3.0, 5.0]
MAPS = {
    "sparsemax": ours.sparsemax,
    "entmax15": ours.entmax15,
    "sparsemax_bisect": ours.sparsemax_bisect,
    "entmax_bisect": ours.entmax_bisect,
    "entmax_bisect 1.1": lambda x, dim=-1: ours.entmax_bisect(x, 1.1, dim),
    "entmax_bisect 2.5": lambda x, dim=-1: ours.entmax_bisect(x, 2.5, dim),
    "entmax_bisect 0.5": lambda x, dim=-1: ours.entmax_bisect(x, 0.5, dim),
    "normmax_bisect": ours.normmax_bisect,
    "budget_bisect": lambda x, dim=-1: ours.budget_bisect(x, 1.5, dim),
}
ROW_LOSSES = {
    "sparsemax": ours.sparsemax_loss,
    "sparsemax_bisect": ours.sparsemax_bisect_loss,
    "entmax15": ours.entmax15_loss,
    "entmax_bisect": ours.entmax_bisect_loss,
    "entmax_bisect 1.1": lambda x, y: ours.entmax_bisect_loss(x, y, 1.1),
    "normmax_bisect": ours.normmax_bisect_loss,
    "normmax_bisect 1.2": lambda x, y: ours.normmax_bisect_loss(x, y, 1.2),
}
MODULES = [ours.SparsemaxLoss, ours.SparsemaxBisectLoss, ours.Entmax15Loss, ours.EntmaxBisectLoss, ours.NormmaxBisectLoss]
maps, row_losses = (pytest.mark.parametrize("run", d.values(), ids=d) for d in (MAPS, ROW_LOSSES))
inf, nan = math.inf, math.nan


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


# --- the surface ---


def test_every_public_name_of_entmax_is_here_with_its_signature():
    theirs = {name: value for name, value in vars(entmax).items() if callable(value) and not name.startswith("_")}
    assert set(ours.__all__) == set(theirs)
    for name, value in theirs.items():
        mine, wanted = (inspect.signature(f).parameters.values() for f in (getattr(ours, name), value))
        assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in wanted], name


def test_the_names_are_where_entmax_has_them():
    from diffmax.compat.entmax import activations, losses, root_finding

    for module in (activations, losses, root_finding):
        theirs = getattr(entmax, module.__name__.rpartition(".")[2])
        public = [n for n in dir(theirs) if n in ours.__all__ and getattr(theirs, n).__module__ == theirs.__name__]
        assert public
        assert all(getattr(module, name) is getattr(ours, name) for name in public)


def test_importing_diffmax_does_not_import_it():
    code = "import sys, diffmax; assert not [m for m in sys.modules if m.startswith('diffmax.compat') or m == 'entmax']"
    fresh.python(code)


# --- values and gradients against entmax, and against forty digits ---


@pytest.mark.parametrize("alpha", [a for a in INSIDE + OUTSIDE if a != 1])
@pytest.mark.parametrize("sigma", [0.5, 2, 10])
def test_entmax_bisect_has_entmax_s_values_and_gradients(alpha, sigma):
    x, g = torch.randn(20, 15, dtype=torch.float64) * sigma, torch.randn(20, 15, dtype=torch.float64)
    results = []
    for package in (ours, entmax):
        leaf, a = x.clone().requires_grad_(), float64(alpha).requires_grad_()
        p = package.entmax_bisect(leaf, a, n_iter=100)
        results.append([p.detach(), *torch.autograd.grad(p, (leaf, a), g)])
    near_softmax = 1e-7 if 0.9 < alpha < 1.1 else 1e-11  # entmax divides by (alpha - 1)^2
    edge = 1e-12 if alpha < 2.1 else 2.0 ** (-52 / (alpha - 1))  # u^(1/e) has 1/e of u's digits at the edge of the support
    for (one, other), allowed in zip(zip(*results, strict=True), (edge, max(edge, 1e-9), max(edge, near_softmax)), strict=True):
        assert (one - other).abs().max() <= allowed * max(1, other.abs().max())


@pytest.mark.parametrize("alpha", [1.5, 1.001, 1.25, 1.75, 1.999])
def test_entmax_bisect_passes_the_gate_inside(alpha):
    x = torch.randn(30, 20)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = x.to(dtype)
        exact = [[float(p) for p in solve_exactly(row, 2 - alpha)] for row in rounded.double().tolist()]
        allowed = gates(lambda x: diffmax.reference.bisect(x, alpha - 1, 1, 200, True)[0], rounded)[0].allowed
        error = ours.entmax_bisect(rounded, alpha).double() - torch.tensor(exact, dtype=torch.float64)
        assert error.abs().max() <= allowed


def exact_beyond(row, alpha):
    """[(alpha - 1) x - tau]_+^(1/(alpha - 1)) by bisection of tau with 60 digits, for any alpha > 0 but 1."""
    with mpmath.workdps(60):
        e = mpmath.mpf(alpha) - 1
        u = [e * mpmath.mpf(x) for x in row]
        edge = max(u) if e > 0 else min(u)
        low, high = (edge - 1, edge - mpmath.mpf(len(row)) ** -e) if e > 0 else (edge - mpmath.mpf(len(row)) ** -e, edge - 1)

        def weights(tau):
            return [(v - tau) ** (1 / e) if v > tau else mpmath.mpf(0) for v in u]

        for _ in range(190):
            middle = (low + high) / 2
            too_large = mpmath.fsum(weights(middle)) >= 1
            low, high = (middle, high) if too_large == (e > 0) else (low, middle)
        return torch.tensor([float(p) for p in weights(low if e > 0 else high)], dtype=torch.float64)


@pytest.mark.parametrize("alpha", OUTSIDE)
def test_eq_21_beyond_diffmax_s_range_agrees_with_sixty_digits(alpha):
    rows = torch.randn(6, 9) * torch.tensor([0.1, 0.3, 1, 3, 10, 1000]).unsqueeze(1)
    exact = torch.stack([exact_beyond(row, alpha) for row in rows.double().tolist()])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = rows.to(dtype)
        truth = exact if dtype != torch.bfloat16 else torch.stack([exact_beyond(row, alpha) for row in x.double().tolist()])
        for a in (alpha, float64(alpha)):
            error = (ours.entmax_bisect(x, a, n_iter=100).double() - truth).abs().max()
            # u^(1/e) has 1/e of u's digits at the edge of the support
            edge = torch.finfo(torch.float64).eps ** min(1, 1 / abs(alpha - 1))
            assert error <= torch.finfo(dtype).eps / 2 + 64 * edge


def test_the_ends_are_softmax_and_sparsemax_exactly_and_nearby_values_lead_there():
    x = torch.randn(50, 40, dtype=torch.float64) * 2
    for one in (1, 1.0, float64(1.0)):
        assert (ours.entmax_bisect(x, one) - x.softmax(-1)).abs().max() < 1e-15
    for two in (2, 2.0, float64(2.0)):
        assert (ours.entmax_bisect(x, two) - entmax.sparsemax(x, -1)).abs().max() < 1e-15
    for end, step in itertools.product((1.0, 2.0), (-1e-9, 1e-9)):
        assert (ours.entmax_bisect(x, end + step) - ours.entmax_bisect(x, end)).abs().max() < 1e-7


def test_alphas_on_both_sides_of_the_range_in_one_tensor():
    alpha = torch.tensor([0.5, 1.0, 1.3, 2.0, 2.5, 4.0], dtype=torch.float64).view(6, 1).requires_grad_()
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    p = ours.entmax_bisect(x, alpha)
    for i, a in enumerate(alpha.flatten().tolist()):
        assert (p[i] - ours.entmax_bisect(x[i], a)).abs().max() < 1e-14
    assert gradcheck(ours.entmax_bisect, (x, alpha), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.01, 1.2, 1.5, 2.0, 5.0, 10.0, 100.0])
def test_normmax_has_entmax_s_values_and_gradients(alpha):
    x, g = torch.randn(20, 15, dtype=torch.float64), torch.randn(20, 15, dtype=torch.float64)
    results = []
    for package in (ours, entmax):
        leaf = x.clone().requires_grad_()
        p = package.normmax_bisect(leaf, float64(alpha), n_iter=100)
        results.append([p.detach(), torch.autograd.grad(p, leaf, g)[0]])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 1e-10 * max(1, other.abs().max())
    assert (ours.normmax_bisect(x, alpha) - results[0][0]).abs().max() < 1e-13


@pytest.mark.parametrize("alpha", [1.2, 2.0, 5.0, 1000.0])
def test_eq_23_normmax_is_the_maximum_that_defines_it(alpha):
    """Its optimality condition: x - tau is the gradient of the norm on the support, and below it elsewhere."""
    x = torch.randn(30, 10, dtype=torch.float64)
    p = ours.normmax_bisect(x, alpha)
    top = p.amax(1, keepdim=True)
    norm = top * ((p / top) ** alpha).sum(1, keepdim=True) ** (1 / alpha)
    slack = x - (p / norm) ** (alpha - 1)  # tau on the support, less elsewhere
    tau = slack.masked_fill(p == 0, -inf).amax(1, keepdim=True)
    assert (p.sum(1) - 1).abs().max() < 1e-14
    assert (slack - tau)[p > 1e-6].abs().max() < 1e-9
    assert (slack - tau)[p == 0].max() <= 1e-12


@pytest.mark.parametrize("budget", [0, 0.3, 1, 2.5, 3, 8.7, 15])
@pytest.mark.parametrize("sigma", [0.1, 1, 10])
def test_budget_has_entmax_s_values_and_gradients(budget, sigma):
    x, g = torch.randn(20, 15, dtype=torch.float64) * sigma, torch.randn(20, 15, dtype=torch.float64)
    results = []
    for package in (ours, entmax):
        leaf = x.clone().requires_grad_()
        p = package.budget_bisect(leaf, float64(budget), n_iter=100)
        results.append([p.detach(), torch.nan_to_num(torch.autograd.grad(p, leaf, g)[0])])
    assert (results[0][0] - results[1][0]).abs().max() < 1e-13
    assert ((results[0][1] - results[1][1]).abs() < 1e-12).float().mean() > 0.99  # entmax's ends may be 1 - 1e-16
    assert (results[0][0].sum(1) - budget).abs().max() < 1e-13


def test_eq_25_budget_is_exact_in_float32_at_any_offset_and_width():
    x = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0], [1e6, 1e6 + 0.25, 1e6 + 0.5, -1e30, 1e30]])
    assert ours.budget_bisect(x, 2)[0].tolist() == [0, 0.125, 0.375, 0.625, 0.875]
    expected = torch.tensor([1 / 12, 1 / 3, 7 / 12, 0, 1])
    assert (ours.budget_bisect(x, 2)[1] - expected).abs().max() <= torch.finfo(torch.float32).eps


def test_budget_per_row_with_a_gradient_for_the_budget():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    budget = torch.tensor([[0.5], [1.7], [3.2], [5.4]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(ours.budget_bisect, (x, budget), eps=1e-6)
    for i in range(4):
        torch.testing.assert_close(ours.budget_bisect(x, budget)[i], ours.budget_bisect(x[i], budget[i].item()))


# --- what entmax's own suite covers ---


@pytest.mark.sampled(9)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -4])
@maps
def test_gradcheck_along_every_dimension(run, dim):
    x = torch.randn(3, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: run(x, dim=dim), (x,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.75, 1.0001, 1.2, 1.5, 1.75, 1.9999, 2.25])
def test_gradcheck_in_alpha(alpha):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    a = torch.full((4, 1), alpha, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, a: ours.entmax_bisect(x, a, n_iter=100), (x, a), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_alphas_for_every_row_along_any_dimension(dim):
    x = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    alpha = 1.05 + 0.9 * torch.rand([1 if i == dim else n for i, n in enumerate(x.shape)], dtype=torch.float64)
    p = ours.entmax_bisect(x, alpha, dim)
    for row, a, q in zip(*(t.movedim(dim, -1).reshape(-1, t.shape[dim]) for t in (x, alpha, p)), strict=True):
        assert (ours.entmax_bisect(row, a.item()) - q).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@maps
def test_masked_entries_weigh_nothing_and_change_nothing(run, dtype):
    x = torch.randn(5, 9).to(dtype)
    padded = torch.cat([x, torch.full((5, 4), -inf, dtype=dtype)], 1).requires_grad_()
    p = run(padded)
    p.sum().backward()
    torch.testing.assert_close(p[:, :9], run(x), rtol=0, atol=max(2 * torch.finfo(dtype).eps, 1e-13))
    assert (p[:, 9:] == 0).all()
    assert (padded.grad[:, 9:] == 0).all()


@pytest.mark.parametrize("k", [1, 5, 100])
def test_k_changes_nothing_and_is_checked(k):
    x = torch.randn(4, 30)
    assert torch.equal(ours.sparsemax(x, -1, k), ours.sparsemax(x))
    assert torch.equal(ours.Entmax15(dim=0, k=k)(x), ours.entmax15(x, 0))
    for call in (lambda: ours.sparsemax(x, -1, 0), lambda: ours.entmax15_loss(x, torch.zeros(4).long(), -1)):
        with pytest.raises(ValueError, match="k must be at least 1, got"):
            call()
    with pytest.raises(TypeError, match=r"entmax15: k must be an int or None, got 2\.0 of type float"):
        ours.entmax15(x, -1, 2.0)


def a_program_written_for(package):
    x, y = torch.linspace(-2, 3, 24, dtype=torch.float64).view(4, 6).sin() * 3, torch.tensor([0, 5, 2, 2])
    return [
        package.Sparsemax(-1)(x),
        package.Entmax15(0, k=4)(x),
        package.SparsemaxBisect()(x),
        package.EntmaxBisect(1.7, dim=0, n_iter=60)(x),
        package.NormmaxBisect(3.0)(x),
        package.BudgetBisect(3)(x),
        package.SparsemaxLoss(ignore_index=2, reduction="sum")(x, y),
        package.Entmax15Loss()(x, y),
        package.EntmaxBisectLoss(1.3, reduction="none")(x, y),
        package.SparsemaxBisectLoss(30)(x, y),
        package.NormmaxBisectLoss(3)(x, y),
        package.normmax_bisect_loss(x, y, 1.5, 60),
    ]


def test_a_program_written_for_entmax_gives_the_same_numbers():
    for one, other in zip(a_program_written_for(ours), a_program_written_for(entmax), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# --- losses ---


@row_losses
def test_losses_are_entmax_s(run):
    names = {id(f): getattr(entmax, f.__name__, None) for f in ROW_LOSSES.values()}
    theirs = (
        names[id(run)]
        or {
            "entmax_bisect 1.1": lambda x, y: entmax.entmax_bisect_loss(x, y, 1.1, 100),
            "normmax_bisect 1.2": lambda x, y: entmax.normmax_bisect_loss(x, y, 1.2, 100),
        }[next(name for name, f in ROW_LOSSES.items() if f is run)]
    )
    x, y = torch.randn(30, 12, dtype=torch.float64) * 2, torch.randint(12, (30,))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, wanted = run(one, y), theirs(other, y)
    assert (mine - wanted).abs().max() < 1e-12
    assert (mine >= 0).all()
    mine, wanted = (torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in ((mine, one), (wanted, other)))
    assert (mine - wanted).abs().max() < 1e-12


@row_losses
def test_gradcheck_of_the_losses_and_twice_where_it_exists(run):
    x, y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (4,))
    assert gradcheck(lambda x: run(x, y), (x,), eps=1e-7, atol=1e-6)
    if run in (ROW_LOSSES["entmax_bisect 1.1"], ROW_LOSSES["normmax_bisect 1.2"]):
        assert gradgradcheck(lambda x: run(x, y), (x,), atol=1e-5)


@pytest.mark.parametrize("alpha", [1.3, 2.0, 7.0])
def test_eq_24_the_normmax_loss_is_its_definition_and_never_negative(alpha):
    x, y = torch.randn(40, 9, dtype=torch.float64) * 3, torch.randint(9, (40,))
    p = ours.normmax_bisect(x, alpha)
    onehot = torch.zeros_like(p).scatter(1, y.unsqueeze(1), 1.0)
    defined = 1 - (p**alpha).sum(1) ** (1 / alpha) + ((p - onehot) * x).sum(1)
    losses = ours.normmax_bisect_loss(x, y, alpha)
    assert (losses - defined).abs().max() < 1e-12
    assert (losses >= 0).all()
    assert (losses == 0).any()


def test_the_entmax_loss_at_1_is_cross_entropy():
    x, y = torch.randn(40, 9, dtype=torch.float64) * 3, torch.randint(9, (40,))
    for one in (1, 1.0, float64(1.0)):
        torch.testing.assert_close(ours.entmax_bisect_loss(x, y, one), cross_entropy(x, y, reduction="none"))


@pytest.mark.parametrize("Loss", MODULES)
def test_reductions_and_ignored_rows(Loss):
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(6, (12,))
    y[:3] = 4
    counts = y != 4
    rows = Loss(ignore_index=4, reduction="none")(x, y)
    assert (rows[:3] == 0).all()
    assert torch.equal(rows[counts], Loss(reduction="none")(x, y)[counts])
    torch.testing.assert_close(Loss(ignore_index=4, reduction="sum")(x, y), rows.sum())
    torch.testing.assert_close(Loss(ignore_index=4)(x, y), rows.sum() / counts.sum())
    torch.testing.assert_close(Loss(ignore_index=y[0])(x, y), rows.sum() / counts.sum())  # a tensor, as entmax's tests pass
    with pytest.raises(
        ValueError, match=rf"{Loss.__name__}: reduction must be one of 'elementwise_mean', 'mean', 'sum', 'none'"
    ):
        Loss(reduction="average")


# --- entmax's open bugs ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@maps
def test_half_precision_with_large_offsets_is_no_nan(run, dtype):
    """deep-spin/entmax #30: float16 and bfloat16 scores near -1000 gave NaN. #31: they were computed in their own precision."""
    x = (torch.randn(6, 40).to(dtype) - 1000).to(dtype)
    for scores in (x, x.abs()):
        p = run(scores)
        assert p.dtype == dtype
        assert torch.equal(p, run(scores.float()).to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(run(x), run(x.float()).to(dtype))


@maps
def test_rows_of_minus_infinity_are_zeros_with_zero_gradient(run):
    """deep-spin/entmax #16, #17, #19: a fully masked row was an IndexError, an assertion on the GPU, or NaN in training."""
    x = torch.randn(4, 5)
    x[1], x[2, 1:] = -inf, -inf
    x.requires_grad_()
    p = run(x)
    (p * torch.randn(4, 5)).sum().backward()
    assert (p[1] == 0).all()
    assert (x.grad[1] == 0).all()
    assert p[2, 0] == 1
    assert torch.isfinite(p).all()
    assert torch.isfinite(x.grad).all()


@maps
def test_a_row_with_nan_or_infinity_spoils_itself_alone(run):
    """entmax raises on a row with +inf."""
    x = torch.randn(4, 5)
    x[1, 2], x[2, 3] = nan, inf
    x.requires_grad_()
    p = run(x)
    p.square().sum().backward()
    assert p[[1, 2]].isnan().all()
    assert x.grad[[1, 2]].isnan().all()
    assert torch.isfinite(p[[0, 3]]).all()
    assert torch.isfinite(x.grad[[0, 3]]).all()


@pytest.mark.parametrize("dim", [-3, -2, 0, 1])
def test_k_works_along_other_dimensions(dim):
    """entmax15(x, dim=-2, k=2) raised: the helper that moves the dimension was wrong for negative ones."""
    x = torch.randn(3, 6, 4)
    for run in (ours.entmax15, ours.sparsemax):
        torch.testing.assert_close(run(x, dim=dim, k=2), run(x.movedim(dim, -1)).movedim(-1, dim))


def test_one_alpha_per_head_says_how_to_pass_it_and_works_so():
    """deep-spin/entmax #10, #15, #29, #39: an alpha of shape (H,) failed in an expand that named no argument."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([1.1, 1.5, 1.9, 2.0], dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"entmax_bisect: alpha must broadcast against X.*\n.*\n.*pass alpha\.view\(4, 1, 1\)"):
        ours.entmax_bisect(x, alpha)
    for shape in ((4, 1, 1), (1, 4, 1, 1)):
        p = ours.entmax_bisect(x, alpha.view(shape))
        for head in range(4):
            torch.testing.assert_close(p[:, head], ours.entmax_bisect(x[:, head], alpha[head].item()))
    p.square().sum().backward()
    assert alpha.grad.abs().min() > 0


@pytest.mark.parametrize("Loss", MODULES)
def test_the_reduction_mean_is_known(Loss):
    """deep-spin/entmax #8: only "elementwise_mean" was accepted, a name that torch dropped in 2018."""
    x, y = torch.randn(4, 6), torch.randint(6, (4,))
    assert torch.equal(Loss(reduction="mean")(x, y), Loss(reduction="elementwise_mean")(x, y))


def test_alpha_1_is_softmax_and_float32_keeps_its_digits_on_the_way():
    """deep-spin/entmax #24: alpha = 1 gave 1/n, and float32 lost a digit for each factor of 10 nearer to 1."""
    x = torch.randn(64, 256)
    for alpha in (1.01, 1.001, 1.0001, 1.00001):
        exact = ours.entmax_bisect(x.double(), alpha)
        assert (ours.entmax_bisect(x, alpha).double() - exact).abs().max() < 2e-7
    torch.testing.assert_close(ours.entmax_bisect(x, 1), x.softmax(-1))


def test_peaked_scores_and_large_alphas():
    """deep-spin/entmax #32: NaN for scores of 1000 and alpha = 3."""
    x = torch.randn(20, 30) * 1000
    for alpha in (1.5, 3.0, 20.0):
        p = ours.entmax_bisect(x, alpha)
        torch.testing.assert_close(p.sum(1), torch.ones(20))
        assert (p.gather(1, x.argmax(1, keepdim=True)) > 0.4).all()


@maps
def test_dimensions_of_size_one_have_the_right_gradient(run):
    """Reported against a project that uses entmax: a squeeze in sparsemax's backward mixed rows across axes of size 1."""
    x = torch.randn(1, 4, 1, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: run(x, dim=3), (x,), eps=1e-7, atol=1e-5)
    grad = torch.autograd.grad(run(x, dim=3).square().sum(), x)[0]
    flat = x.detach().view(4, 5).requires_grad_()
    torch.testing.assert_close(grad.view(4, 5), torch.autograd.grad(run(flat).square().sum(), flat)[0])
    if run is not MAPS["budget_bisect"]:
        single = run(x, dim=2)
        assert (single == 1).all()


def test_second_derivatives_are_numbers():
    """entmax15 and entmax_bisect returned NaN."""
    for run in (ours.entmax15, lambda x: ours.entmax_bisect(x, 1.5), lambda x: ours.entmax_bisect(x, 1.2), ours.normmax_bisect):
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        assert (run(x) == 0).any() or run(x).min() < 0.01
        first = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)[0]
        assert torch.isfinite(torch.autograd.grad(first.square().sum(), x)[0]).all()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for run in (
        lambda x: ours.entmax_bisect(x, 1.2),
        lambda x: ours.entmax_bisect(x, 0.6),
        lambda x: ours.normmax_bisect(x, 1.3),
    ):
        assert gradgradcheck(run, (x,), atol=1e-4)


def test_a_loss_has_one_alpha_per_row_and_a_gradient_for_it():
    """entmax's loss with an alpha of shape (N, 1) had shape (N, N), and no gradient for alpha."""
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randint(6, (4,))
    alpha = torch.tensor([[1.1], [1.5], [1.7], [1.9]], dtype=torch.float64, requires_grad=True)
    losses = ours.entmax_bisect_loss(x, y, alpha)
    assert losses.shape == (4,)
    for i in range(4):
        torch.testing.assert_close(losses[i : i + 1], ours.entmax_bisect_loss(x[i : i + 1], y[i : i + 1], alpha[i].item()))
    assert gradcheck(lambda a: ours.entmax_bisect_loss(x, y, a), (alpha,))


def test_minus_100_marks_an_ignored_row_in_modules_and_functions():
    """entmax honoured ignore_index only from 0 on: its own default of -100 was an error of indexing."""
    x, y = torch.randn(3, 6, requires_grad=True), torch.tensor([1, -100, 2])
    for Loss in MODULES:
        loss = Loss()(x, y)
        torch.testing.assert_close(loss, Loss()(x[[0, 2]], y[[0, 2]]))
        assert (torch.autograd.grad(loss, x)[0][1] == 0).all()
    for run in ROW_LOSSES.values():
        assert run(x, y)[1] == 0


def test_n_iter_and_ensure_sum_one_are_heeded_by_sparsemax_bisect(monkeypatch):
    """entmax 1.3 ran 50 steps and divided by the sum whatever it was told."""
    from diffmax.compat.entmax import root_finding

    asked = []
    monkeypatch.setattr(root_finding, "normalize", lambda X, *rest: asked.append(rest) or X)
    ours.sparsemax_bisect(X, -1, 7, ensure_sum_one=False)
    ours.SparsemaxBisect(dim=0, n_iter=9)(X)
    ours.SparsemaxBisect()(X)
    assert asked == [(1.0, None, 1, 7, False), (1.0, None, 0, 9, True), (1.0, None, 1, 50, True)]


def test_alpha_may_be_a_parameter_of_the_modules():
    """entmax's modules set their alpha before nn.Module's own __init__, which refuses parameters."""
    alpha = torch.nn.Parameter(torch.full((3, 1, 1), 1.4))
    module = ours.EntmaxBisect(alpha)
    assert [name for name, _ in module.named_parameters()] == ["alpha"]
    module(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert alpha.grad.abs().min() > 0
    held = ours.EntmaxBisectLoss(torch.tensor(1.5))
    assert not held.state_dict()  # entmax's checkpoints have no such entry
    assert copy.deepcopy(held).to(torch.float64).alpha.dtype == torch.float64


@pytest.mark.parametrize("name", ["entmax15", "entmax_bisect", "loss"])
def test_training_code_compiles_in_one_graph(name):
    """entmax's backward broke torch.compile(fullgraph=True)."""
    torch._dynamo.reset()
    y = torch.tensor([0, 3, 2])

    def step(x, alpha):
        if name == "loss":
            return ours.entmax_bisect_loss(x, y, alpha).sum()
        return (ours.entmax15(x) if name == "entmax15" else ours.entmax_bisect(x, alpha)).square().sum() + 0 * alpha.sum()

    x, alpha = torch.randn(3, 5, requires_grad=True), torch.tensor(1.4, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(torch.autograd.grad(f(x, alpha), (x, alpha)) for f in (compiled, step)), strict=True):
        torch.testing.assert_close(one, other)


# --- edges and messages ---


def test_scalars_and_empty_rows():
    for run in MAPS.values():
        assert run(torch.empty(0, 5)).shape == (0, 5)
    for run in (ours.sparsemax, ours.entmax_bisect, ours.normmax_bisect, lambda x: ours.entmax_bisect(x, 3.0)):
        assert run(torch.tensor(2.0)) == 1
    assert ours.budget_bisect(torch.tensor(2.0), 0.5) == 0.5


def test_a_budget_larger_than_what_is_visible_gives_each_its_whole():
    x = torch.tensor([[0.5, -inf, 0.1, -inf], [0.0, 0.1, 0.2, 9.0]])
    p = ours.budget_bisect(x, 3)
    assert p[0].tolist() == [1, 0, 1, 0]
    assert p[1].sum() == 3


X, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ours.entmax_bisect(X, 0.0), ValueError, r"entmax_bisect: alpha must be positive, got 0\n1 is softmax"),
        (lambda: ours.entmax_bisect(X, torch.tensor(-1.0)), ValueError, r"alpha must be positive, got -1"),
        (lambda: ours.entmax_bisect(X, nan), ValueError, r"alpha must be positive, got nan"),
        (lambda: ours.entmax_bisect(X, "1.5"), TypeError, r"alpha must be a number or a tensor, got '1\.5' of type str"),
        (lambda: ours.entmax_bisect(X, 1.5, 2), ValueError, r"entmax_bisect: dim must lie in \[-2, 1\]"),
        (lambda: ours.entmax_bisect(X, 1.5, -1, 0), ValueError, r"entmax_bisect: n_iter must be at least 1, got 0"),
        (lambda: ours.sparsemax(X.long()), TypeError, r"sparsemax: X must be float16.*got int64"),
        (lambda: ours.normmax_bisect(X, 1), ValueError, r"normmax_bisect: alpha must be greater than 1, got 1"),
        (
            lambda: ours.normmax_bisect(X, torch.tensor(2.0, requires_grad=True)),
            ValueError,
            r"normmax_bisect: alpha must not require a gradient.*\npass alpha\.detach",
        ),
        (
            lambda: ours.budget_bisect(X, 5),
            ValueError,
            r"budget_bisect: budget must lie in \[0, 4\], got 5\na row has 4 entries",
        ),
        (lambda: ours.budget_bisect(X, torch.ones(3)), ValueError, r"budget must broadcast.*\n.*\n.*budget\.view\(3, 1\)"),
        (lambda: ours.entmax_bisect_loss(X, Y, 2.5), ValueError, r"alpha must lie in \[1, 2\], got 2\.5\nentmax_bisect takes"),
        (lambda: ours.entmax_bisect_loss(X, Y + 2), ValueError, r"entmax_bisect_loss: class indices must lie in \[0, 3\]"),
        (
            lambda: ours.normmax_bisect_loss(X, torch.full((3, 4), 0.25)),
            TypeError,
            r"normmax_bisect_loss: target must hold class indices as int64, got float32",
        ),
    ],
)
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("index", [1.7, True, "x", None])
def test_an_ignored_index_that_is_no_int_is_refused(index):
    """1.7 and True were taken for 1."""
    for module in (ours.Entmax15Loss, ours.SparsemaxBisectLoss, ours.NormmaxBisectLoss):
        with pytest.raises(TypeError, match=rf"{module.__name__}: ignore_index must be an int, got {index!r} of type"):
            module(ignore_index=index)
