"""diffmax_bisect: values against independent solvers, properties, edges, and every error message."""

import itertools
import math

import numpy as np
import pytest
import torch
from entmax import entmax_bisect
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import diffmax
from diffmax import diffmax_bisect, reference
from diffmax.kernels.cpu import rows as cpu_rows
from diffmax.testing import NASTY_ROWS, gates, solve_exactly
from diffmax.testing.rows.cases import SPECIAL_ALPHAS

pytestmark = pytest.mark.sampled(11)

ALPHAS = [0.003, 0.01, 0.1, 1 / 3, 0.5, 2 / 3, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999, 0.9999]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
inf, nan = math.inf, math.nan


def exactly(row, alpha):
    return torch.tensor([float(p) for p in solve_exactly(row, alpha)], dtype=torch.float64)


def exact_reference(x, alpha, dim=-1):
    return reference.bisect(x.double(), 1 - alpha, dim % x.ndim, 200, True)[0]


def assert_passes_the_gate(x, alpha, dim=-1):
    dim = dim % x.ndim
    ((exact, allowed),) = gates(lambda x: reference.bisect(x, 1 - alpha, dim + 1, 200, True)[0], x, stacked=True)
    error = (diffmax_bisect(x, alpha, dim).double() - exact).abs().max()
    assert error <= allowed


# --- values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", NASTY_ROWS)
def test_the_float64_reference_and_the_operator_agree_with_forty_digits(name, alpha):
    row = [float(v) for v in torch.tensor(NASTY_ROWS[name])]  # the float32 values, so that both dtypes see the same row
    exact = exactly(row, alpha)
    assert (exact_reference(torch.tensor(row, dtype=torch.float64), alpha) - exact).abs().max() <= 1e-13
    assert (diffmax_bisect(torch.tensor(row, dtype=torch.float64), alpha) - exact).abs().max() <= 1e-13
    assert (diffmax_bisect(torch.tensor(row), alpha).double() - exact).abs().max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu", "numba"])
def test_beside_special_alphas_they_agree_with_forty_digits(backend):
    """Where a kernel decides by alpha in one precision and computes in another; the kit gates all others on the reference."""
    for alpha in SPECIAL_ALPHAS:
        row = torch.randn(17) * 3
        exact = exactly(row.tolist(), alpha)
        for x, allowed in ((row.double(), 1e-13), (row, 1e-6)):
            error = (diffmax_bisect(x, alpha, backend=backend).double() - exact).abs().max()
            assert error <= allowed, (alpha, x.dtype, error)


@pytest.mark.parametrize("sigma", [0.3, 1, 3, 10])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_random_rows_agree_with_forty_digits(alpha, sigma):
    x = torch.randn(2, 33) * sigma
    exact = torch.stack([exactly(row.tolist(), alpha) for row in x])
    assert (diffmax_bisect(x.double(), alpha) - exact).abs().max() <= 1e-13
    error = diffmax_bisect(x, alpha).double() - exact
    assert error.abs().max() <= 1e-6
    assert error.sum(-1).abs().max() <= 33 * 2**-24


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("sigma", [0.3, 1, 3, 10])
def test_agrees_with_the_entmax_package_at_two_minus_alpha(alpha, sigma):
    x = torch.randn(16, 1000, dtype=torch.float64) * sigma
    expected = entmax_bisect(x, 2 - alpha, n_iter=100)
    assert (diffmax_bisect(x, alpha, n_iter=200) - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 1), (64, 2), (63, 63), (5, 7, 129), (3, 4099), pytest.param((2, 131072), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.85, 0.99])
def test_passes_the_gate(alpha, shape, dtype):
    for sigma in (0.3, 1, 3, 10):
        assert_passes_the_gate((torch.randn(shape) * sigma).to(dtype), alpha)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_computes_in_float32_and_rounds_once(dtype):
    x = (torch.randn(40, 300) * 2).to(dtype)
    torch.testing.assert_close(diffmax_bisect(x, 0.8), diffmax_bisect(x.float(), 0.8).to(dtype), rtol=0, atol=0)


def test_half_precision_survives_an_offset_of_minus_1000():
    """entmax issue 30: NaN in float16 and bfloat16 for scores near -1000."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(4, 64).to(dtype) - 1000
        p = diffmax_bisect(x, 0.5)
        assert p.dtype == dtype
        assert (p.float().sum(-1) - 1).abs().max() < 64 * torch.finfo(dtype).eps


def test_rows_mixed_from_dense_and_sparse_ones_agree_with_each_row_alone():
    """Blocks choose between listing candidates and going over every entry: one dense row must not change its neighbours."""
    x = torch.cat([torch.randn(200, 512) * sigma for sigma in (0.1, 1, 10, 100)])
    x = x[torch.randperm(len(x))]
    for alpha in (0.1, 0.5, 0.85):
        whole = diffmax_bisect(x, alpha)
        alone = torch.cat([diffmax_bisect(row[None], alpha) for row in x])
        torch.testing.assert_close(whole, alone, rtol=0, atol=5e-7)


def test_alpha_near_one_tends_to_softmax():
    x = torch.randn(50, 100, dtype=torch.float64) * 3
    previous = 1.0
    for alpha in (0.9, 0.99, 0.999, 0.9999, 1 - 1e-9):
        distance = (diffmax_bisect(x, alpha, n_iter=200) - x.softmax(-1)).abs().max().item()
        assert distance < previous / 5
        previous = distance
    assert previous < 1e-8


def test_alpha_near_zero_tends_to_sparsemax():
    x = torch.tensor([[1.0, 0.5, -0.2, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(diffmax_bisect(x, 1e-12), torch.tensor([[0.75, 0.25, 0, 0]], dtype=torch.float64))


def test_few_iterations_are_at_least_as_accurate_as_that_many_bisection_steps():
    x = torch.randn(200, 64, dtype=torch.float64) * torch.logspace(-1, 1, 200, dtype=torch.float64)[:, None]
    for alpha in (0.05, 0.5, 0.9):
        exact = diffmax_bisect(x, alpha, n_iter=200)
        for n_iter in range(1, 30):
            ours = (diffmax_bisect(x, alpha, n_iter=n_iter) - exact).abs().sum(-1)
            bisection = (entmax_bisect(x, 2 - alpha, n_iter=n_iter) - exact).abs().sum(-1)
            assert ours.max() <= bisection.max() + 1e-12


def test_without_ensure_sum_one_the_sum_is_one_to_the_tolerance_of_the_solver():
    x = torch.randn(100, 500)
    p = diffmax_bisect(x, 0.7, ensure_sum_one=False)
    assert (p.sum(-1) - 1).abs().max() < 5e-6
    torch.testing.assert_close(p / p.sum(-1, keepdim=True), diffmax_bisect(x, 0.7))


# --- properties -----------------------------------------------------------------------------------------------------------

rows = st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=48)
alphas = st.floats(0.003, 0.9999)


@given(rows, alphas)
def test_is_a_probability_vector_that_keeps_the_order(row, alpha):
    x = torch.tensor(row)
    p = diffmax_bisect(x, alpha)
    assert (p >= 0).all()
    assert abs(p.double().sum().item() - 1) <= len(row) * 2**-23
    order = x.argsort()
    assert (p[order].diff() >= -1e-7).all()
    assert (p[x <= x.max() - 1 / (1 - alpha) * (1 + 1e-6)] == 0).all()


@given(rows, alphas, st.randoms(use_true_random=False))
def test_commutes_with_permutations(row, alpha, random):
    order = list(range(len(row)))
    random.shuffle(order)
    x = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(diffmax_bisect(x[order], alpha), diffmax_bisect(x, alpha)[order], rtol=0, atol=1e-13)


@given(rows, alphas, st.integers(-1000, 1000))
def test_is_invariant_to_a_shift(row, alpha, shift):
    x = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(diffmax_bisect(x + shift, alpha), diffmax_bisect(x, alpha), rtol=0, atol=1e-10)


@given(rows, alphas, alphas)
def test_the_support_grows_with_alpha(row, one, other):
    x = torch.tensor(row, dtype=torch.float64)
    small, large = (diffmax_bisect(x, alpha, n_iter=200) for alpha in sorted((one, other)))
    assert ((small > 1e-12) <= (large > 0)).all()


@given(rows, alphas, st.integers(1, 40))
def test_padding_with_minus_infinity_changes_nothing(row, alpha, padding):
    x = torch.tensor(row)
    padded = torch.cat([x, torch.full((padding,), -inf)])
    p = diffmax_bisect(padded, alpha)
    torch.testing.assert_close(p[: len(row)], diffmax_bisect(x, alpha), rtol=0, atol=5e-7)
    assert (p[len(row) :] == 0).all()


# --- edges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 300])
def test_a_fully_masked_row_is_all_zero(n):
    x = torch.randn(6, n)
    x[2] = -inf
    p = diffmax_bisect(x, 0.7)
    assert (p[2] == 0).all()
    torch.testing.assert_close(p[[0, 1, 3, 4, 5]].sum(-1), torch.ones(5))
    assert (diffmax_bisect(torch.full((4, n), -inf), 0.7) == 0).all()


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("scale", [1, 100])
def test_nan_or_infinity_spoils_its_own_row_only(bad, scale):
    x = torch.randn(6, 200) * scale  # scale 100: the block lists its candidates
    clean = diffmax_bisect(x, 0.7)
    x[3, 17] = bad
    p = diffmax_bisect(x, 0.7)
    assert p[3].isnan().all()
    keep = [0, 1, 2, 4, 5]
    torch.testing.assert_close(p[keep], clean[keep], rtol=0, atol=5e-7)


def test_one_entry_has_weight_one_whatever_it_is():
    x = torch.tensor([[3.0], [-1e30], [0.0], [1e30]])
    assert (diffmax_bisect(x, 0.3) == 1).all()


def test_a_scalar_has_weight_one():
    assert diffmax_bisect(torch.tensor(3.0), 0.3) == torch.tensor(1.0)
    assert diffmax_bisect(torch.tensor(3.0), 0.3, dim=0).shape == ()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("dim", [0, -1])
def test_empty_input_gives_empty_output(shape, dim):
    x = torch.randn(shape, requires_grad=True)
    p = diffmax_bisect(x, 0.5, dim)
    assert p.shape == shape
    p.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("dim", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_any_dim(dim):
    x = torch.randn(3, 4, 5, 6)
    expected = diffmax_bisect(x.movedim(dim, -1).contiguous(), 0.6).movedim(-1, dim)
    p = diffmax_bisect(x, 0.6, dim)
    torch.testing.assert_close(p, expected, rtol=0, atol=5e-7)
    assert p.is_contiguous()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::3],
        lambda x: x[::2].flip(1),
        lambda x: x[:1].expand(5, -1),
        lambda x: x.as_strided((10, 20), (7, 3)),
    ],
    ids=["transposed", "stepped", "flipped", "expanded", "overlapping"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(view, dtype):
    x = view(torch.randn(40, 60).to(dtype))
    torch.testing.assert_close(diffmax_bisect(x, 0.6), diffmax_bisect(x.contiguous(), 0.6), rtol=0, atol=0)


def test_the_input_is_left_alone():
    x = torch.randn(30, 40)
    before = x.clone()
    diffmax_bisect(x, 0.5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dim", [0, -1])
def test_the_result_may_be_changed_in_place(dim):
    x = torch.randn(1, 5, requires_grad=True)
    diffmax_bisect(x, 0.5, dim).detach_()
    p = diffmax_bisect(x, 0.5, dim)
    with torch.no_grad():
        p.mul_(2)
    assert not p._is_view()


def test_is_deterministic():
    x = torch.randn(300, 2000)
    assert torch.equal(diffmax_bisect(x, 0.6), diffmax_bisect(x, 0.6))


# --- alpha ----------------------------------------------------------------------------------------------------------------


def test_alpha_per_head_equals_each_head_alone():
    x = torch.randn(2, 3, 5, 7)
    alpha = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    p = diffmax_bisect(x, alpha)
    for head, a in enumerate([0.2, 0.5, 0.9]):
        torch.testing.assert_close(p[:, head], diffmax_bisect(x[:, head], a), rtol=0, atol=1e-6)


def test_alpha_per_row_and_other_dim():
    x = torch.randn(6, 9)
    alpha = torch.rand(1, 9) * 0.9 + 0.05
    expected = torch.stack([diffmax_bisect(x[:, j], alpha[0, j].item()) for j in range(9)], dim=1)
    torch.testing.assert_close(diffmax_bisect(x, alpha, dim=0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_tensors_of_any_float_dtype(dtype):
    x = torch.randn(4, 6)
    alpha = torch.tensor(0.75, dtype=dtype)  # exact in every dtype
    torch.testing.assert_close(diffmax_bisect(x, alpha), diffmax_bisect(x, 0.75), rtol=0, atol=1e-6)
    assert diffmax_bisect(x, alpha).dtype == x.dtype


def test_alpha_may_be_a_function_or_a_numpy_number():
    x = torch.randn(4, 6)
    expected = diffmax_bisect(x, 0.5)
    assert torch.equal(diffmax_bisect(x, lambda: 0.5), expected)
    torch.testing.assert_close(diffmax_bisect(x, lambda: torch.tensor(0.5)), expected)
    assert torch.equal(diffmax_bisect(x, np.float32(0.5)), expected)


def test_one_alpha_in_a_tensor_is_the_float_it_holds():
    x = torch.randn(3, 4, 40, requires_grad=True)
    query = torch.randn(1, 4, 30, 8)
    single = torch.tensor(0.7)
    assert torch.equal(diffmax_bisect(x, single), diffmax_bisect(x, float(single)))
    assert "tensor_alpha" not in str(diffmax.explain("diffmax_bisect", x, single))
    for alpha in (single, single.view(1)):
        heads = diffmax.attention(query, query, query, alpha=alpha)
        assert torch.equal(heads, diffmax.attention(query, query, query, alpha=float(alpha)))
    learned = torch.tensor(0.7, requires_grad=True)
    assert "tensor_alpha" in str(diffmax.explain("diffmax_bisect", x, learned))
    assert torch.autograd.grad(diffmax_bisect(x, learned).square().sum(), learned)[0] != 0


def test_alphas_of_no_rows_under_a_profiler():
    x, alpha = torch.randn(0, 5), torch.zeros(0, 1)
    with torch.profiler.profile():
        assert diffmax_bisect(x, alpha).shape == (0, 5)
    assert diffmax_bisect(x, alpha).shape == (0, 5)


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch_also_with_an_alpha_of_its_own(alpha, learned, dtype):
    x = torch.randn(3, 4, 24, 24, dtype=dtype)
    for of_batch in (torch.full((3, 1, 1, 1), alpha, dtype=dtype), torch.full((4, 1, 1), alpha, dtype=dtype)):
        of_batch.requires_grad_(learned)
        whole, axis = diffmax_bisect(x, of_batch), 4 - of_batch.ndim
        assert torch.equal(diffmax_bisect(x.narrow(axis, 0, 1), of_batch[:1]), whole.narrow(axis, 0, 1))


def test_alphas_in_tensors_without_values():
    """They lie outside of the mode, which gives no values of theirs."""
    single, of_heads = torch.tensor(0.7), torch.tensor([0.7, 0.8])
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, query = torch.empty(3, 5), torch.empty(1, 2, 6, 8)
        assert diffmax_bisect(x, single).shape == (3, 5)
        assert diffmax.diffmax_loss(x, torch.zeros(3, dtype=torch.long), single).shape == ()
        for alpha in (single, of_heads):
            assert diffmax.attention(query, query, query, alpha=alpha).shape == query.shape
        assert diffmax.attention_with_kvcache(query, query, query, alpha=single).shape == query.shape


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_an_alpha_that_is_traced_or_mapped_stays_a_tensor():
    x, first, second = torch.randn(5, 40), torch.tensor(0.4), torch.tensor(0.8)
    expected = diffmax_bisect(x, 0.8)
    assert not torch.allclose(diffmax_bisect(x, first), expected)
    query = torch.randn(1, 1, 5, 8)
    for mode, early in itertools.product(("real", "fake", "symbolic"), (False, True)):
        how = {"tracing_mode": mode, "pre_dispatch": early}
        traced = make_fx(lambda x, alpha: diffmax_bisect(x, alpha), **how)(x, first)
        assert torch.allclose(traced(x, second), expected, atol=1e-6)
        traced = make_fx(lambda query, alpha: diffmax.attention(query, query, query, alpha=alpha), **how)(query, first)
        assert torch.allclose(traced(query, second), diffmax.attention(query, query, query, alpha=0.8), atol=1e-6)
    assert torch.allclose(torch.jit.trace(diffmax_bisect, (x, first))(x, second), expected, atol=1e-6)
    both = torch.func.vmap(diffmax_bisect, (None, 0))(x, torch.stack([first, second]))
    assert torch.allclose(both[1], expected, atol=1e-6)
    tangent = torch.func.jvp(lambda alpha: diffmax_bisect(x, alpha), (second,), (torch.tensor(1.0),))[1]
    assert tangent.abs().max() > 1e-3


def test_a_tensor_alpha_of_one_is_softmax_and_of_zero_is_sparsemax():
    x = torch.randn(2, 50, dtype=torch.float64)
    p = diffmax_bisect(x, torch.tensor([[1.0], [0.0]], dtype=torch.float64), n_iter=200)
    torch.testing.assert_close(p[0], x[0].softmax(-1), rtol=0, atol=1e-14)
    torch.testing.assert_close(p[1], diffmax_bisect(x[1], 1e-15, n_iter=200), rtol=0, atol=1e-12)
    p32 = diffmax_bisect(x.float(), torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(p32.double(), p, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kernel", [reference.bisect, cpu_rows.bisect], ids=["reference", "cpu"])
def test_a_kernel_gives_nan_in_the_rows_of_a_bad_alpha(kernel):
    """Where alpha lives on an accelerator, nobody looks at its values before the kernel."""
    e = torch.tensor([[0.5], [-0.1], [1.2], [nan], [0.0]])
    p, _, _ = kernel(torch.randn(5, 300), e, 1, 50, True)
    assert p[[1, 2, 3]].isnan().all()
    assert torch.isfinite(p[[0, 4]]).all()


# --- bad input ------------------------------------------------------------------------------------------------------------

X4 = torch.zeros(2, 3, 5, 7)

BAD_INPUT = {
    "a list": (([1.0, 2.0],), TypeError, r"X must be a torch\.Tensor, got list"),
    "an integer dtype": ((torch.arange(3),), TypeError, r"X must be float16, bfloat16, float32 or float64, got int64\nconvert"),
    "a complex dtype": ((torch.zeros(3, dtype=torch.complex64),), TypeError, "got complex64"),
    "a float8 dtype": ((torch.zeros(3).to(torch.float8_e4m3fn),), TypeError, "got float8_e4m3fn"),
    "alpha = 0": ((X4, 0), ValueError, r"alpha must lie strictly between 0 and 1, got 0\nfor a dimension, write dim"),
    "alpha = 0.0": ((X4, 0.0), ValueError, r"got 0\.0\nthe limit alpha -> 0 is sparsemax"),
    "dim in alpha's place": ((X4, -1), ValueError, r"got -1\nfor a dimension, write dim: the second argument is alpha"),
    "alpha = 1": ((X4, 1.0), ValueError, r"got 1\.0\nthe limit alpha -> 1 is torch\.softmax"),
    "entmax's alpha": ((X4, 1.5), ValueError, r"got 1\.5\nif that is entmax's alpha, pass 2 - 1\.5 = 0\.5 here"),
    "a negative alpha": ((X4, -0.5), ValueError, r"between 0 and 1, got -0\.5$"),
    "alpha = NaN": ((X4, nan), ValueError, "between 0 and 1, got nan"),
    "alpha = True": ((X4, True), TypeError, r"alpha must be a float or a tensor, or a function .* got True of type bool"),
    "alpha a string": ((X4, "0.5"), TypeError, "got '0.5' of type str"),
    "a function that returns None": ((X4, lambda: None), TypeError, "got None of type NoneType"),
    "an integer alpha tensor": ((X4, torch.tensor(1)), TypeError, "alpha must be of a floating dtype, got int64"),
    "alpha of shape (H,)": (
        (X4, torch.full((3,), 0.5)),
        ValueError,
        r"got shape \(3,\)\n  X \(2, 3, 5, 7\)   dim 3   alpha must broadcast to \(2, 3, 5, 1\)\n"
        r"for one alpha per index of axis 1, pass alpha\.view\(3, 1, 1\)",
    ),
    "alpha as long as the rows": ((X4, torch.full((7,), 0.5)), ValueError, r"got shape \(7,\)\n  X \(2, 3, 5, 7\)   dim 3"),
    "alpha with too many dimensions": ((X4[0, 0], torch.full((1, 1, 1), 0.5)), ValueError, r"got shape \(1, 1, 1\)"),
    "alpha on another device": ((X4, torch.empty(3, 1, 1, device="meta")), ValueError, "on one device, got meta and cpu"),
    "alpha tensor out of range": (
        (X4, torch.tensor([0.5, 0.7, 1.5]).view(3, 1, 1)),
        ValueError,
        r"between 0 and 1, got values from 0\.5 to 1\.5\na learned alpha stays inside with alpha_map",
    ),
    "entmax's alpha in a tensor": (
        (X4, torch.tensor(1.5)),
        ValueError,
        r"between 0 and 1, got 1\.5\nif that is entmax's alpha, pass 2 - alpha here; a learned alpha stays inside",
    ),
    "alpha tensor with NaN": ((X4, torch.tensor(nan)), ValueError, "between 0 and 1, got nan"),
    "dim too large": ((X4, 0.5, 4), ValueError, r"dim must lie in \[-4, 3\] for X of shape \(2, 3, 5, 7\), got 4"),
    "dim too small": ((X4, 0.5, -5), ValueError, "got -5"),
    "dim of a scalar": ((torch.tensor(1.0), 0.5, 1), ValueError, r"\[-1, 0\] for X of shape \(\), got 1"),
    "dim a float": ((X4, 0.5, 1.0), TypeError, r"dim must be an int, got 1\.0 of type float"),
    "n_iter = 0": ((X4, 0.5, -1, 0), ValueError, "n_iter must be at least 1, got 0"),
    "n_iter a float": ((X4, 0.5, -1, 2.5), TypeError, r"n_iter must be an int, got 2\.5 of type float"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_says_what_is_wrong(case):
    arguments, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=f"(?s)^diffmax_bisect: .*{message}"):
        diffmax_bisect(*arguments)
