"""The shared Triton kernels under Triton's interpreter: `test_triton_rows.py` runs this file with TRITON_INTERPRET=1."""

import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import diffmax
from diffmax import reference
from diffmax.kernels.triton.common import numerics
from diffmax.testing.interpreter import harden, quicken
from diffmax.testing.rows import cases, checks

harden()
quicken()

# an interpreter takes milliseconds for a program: fewer and smaller tensors than the kit's own
cases.ALPHAS = (0.01, 0.5, 0.85, 0.999)
cases.SIGMAS = (3.0,)
cases.SHAPES = ((5, 1), (4, 2), (2, 63), (2, 3, 129), (2, 1000), (40, 17))

sys.path.insert(0, str(Path(__file__).parent))
import triton_backend
from triton_backend import OPERATORS

from diffmax.testing.rows.conformance import BackendConformance

triton_backend.register()

pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # NumPy, standing in for tl.max
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton 3.6's loops
]


class TestRows(BackendConformance):
    backend = "triton"
    test_repeatable = None  # the interpreter runs programs one after the other: it cannot but repeat
    test_importing_diffmax_imports_no_kernel_and_a_fork_survives_it = None  # tests/test_vendors.py, and core's own kernels

    def test_special_alphas(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            checks.special_alphas_pass_the_gate(self.backend, self.device, dtype)

    @pytest.mark.slow
    def test_strides_and_dims(self):
        checks.strides_and_dims(self.backend, self.device, torch.float32)


class Long(BackendConformance):
    """What does not depend on how long rows are cut is left to TestRows."""

    test_importing_diffmax_imports_no_kernel_and_a_fork_survives_it = None
    test_strides_and_dims = test_repeatable = test_symmetries = test_opcheck = test_gradients = None
    test_compiles_in_one_graph_with_dynamic_shapes = test_few_iterations_are_as_accurate_as_bisection = None

    def test_special_alphas(self):
        checks.special_alphas_pass_the_gate(self.backend, self.device, torch.float32, checks.SPECIAL_ALPHAS[2::9])

    @pytest.mark.parametrize("alpha", [0.3, 0.5, 0.85])
    def test_gradients_of_several_tiles(self, alpha):
        for dtype in self.description.dtypes:
            x = checks.random_scores((3, 700), dtype, 3.0)
            checks.backward_passes_the_gate(self.backend, self.device, x, alpha)
            checks.gradients_are_right_on_average(self.backend, self.device, x, alpha)


class TestStream(Long):
    backend = "triton-stream"


class TestSplit(Long):
    backend = "triton-split"


del Long


def test_rows_of_few_live_tiles():
    """Tiles that are masked or far below the rest are not loaded again, and their weights are 0."""
    x = torch.full((2, 1500), -torch.inf)
    x[0, 700:760], x[1] = torch.randn(60), -50.0
    x[1, 1490:] = torch.randn(10)
    for backend in ("triton-stream", "triton-split"):
        checks.forward_passes_the_gate(backend, "cpu", x, 0.7)


@pytest.mark.parametrize("backend", ["triton-stream", "triton-split"])
def test_a_row_that_needs_many_iterations(backend):
    """Powers near the cut, for which a fixed number of launches is too few: one program goes on alone."""
    x = -torch.logspace(-6, 1, 900).unsqueeze(0)
    for alpha in (0.01, 0.3, 0.99):
        checks.forward_passes_the_gate(backend, "cpu", x, alpha)


@pytest.mark.parametrize("backend", OPERATORS)
def test_alpha_that_is_one_half_in_float32_only(backend):
    """k > 2 was asked of k in float64, and the kernel had k = 2 in float32: 0 * log2(0), and all rows were NaN."""
    for dtype in set(triton_backend.DTYPES[backend]) - {torch.float64}:
        for alpha in (0.5 + 1e-12, 0.5 + 1e-9, 0.50000001, 0.5 + 4e-8, 0.5 - 1e-8):
            checks.forward_passes_the_gate(backend, "cpu", checks.random_scores((2, 70), dtype, 3.0), alpha)


@pytest.mark.parametrize("backend", OPERATORS)
def test_multiplied_weights_are_as_exact_as_others(backend):
    """For k = 10 in float32 the last step was added to the threshold, whose rounding k multiplies: off by 5 ulp."""
    for seed in range(12 if backend == "triton" else 2):
        torch.manual_seed(seed)
        checks.forward_passes_the_gate(backend, "cpu", checks.random_scores((8, 33), torch.float32, 3.0), 0.9)


def test_a_row_of_nan_stores_a_threshold_of_nan():
    """A maximum of NaN and a number is NaN in the interpreter and the number on devices: what is stored depended on it."""
    x = torch.randn(3, 40)
    x[0, 3], x[1, 4] = torch.nan, torch.inf
    for operator in OPERATORS.values():
        for e in (0.5, 0.15, 0.1):
            delta = operator.bisect(x, e, 1, 50, True)[2]
            assert delta[:2].isnan().all()
            assert delta[2].isfinite()


def test_many_ties_at_the_edge_of_the_support():
    """Thousands of weights that the last linear step would cut off: the sum stays 1."""
    x = torch.cat([torch.zeros(1), torch.full((3000,), -1.999)]).unsqueeze(0)
    checks.forward_passes_the_gate("triton", "cpu", x, 0.5)
    checks.forward_passes_the_gate("triton", "cpu", x - torch.rand(1, 3001) * 1e-3, 0.55)


def test_without_a_division_by_the_sum():
    """ensure_sum_one=False gives the weights at the threshold that was found: their sum is 1 to the solver's tolerance."""
    x = torch.randn(5, 90)
    for e in (0.9, 0.5, 0.15):
        p = OPERATORS["triton"].bisect(x, e, 1, 50, False)[0]
        assert torch.allclose(p.sum(1), torch.ones(5), atol=1e-5)
    bad = torch.tensor([[torch.nan, 1.0], [-torch.inf, -torch.inf]])
    p = OPERATORS["triton"].bisect(bad, 0.5, 1, 50, False)[0]
    assert p[0].isnan().all()
    assert (p[1] == 0).all()


@pytest.mark.parametrize("e", [0.0, 1e-8, 1e-6, 1e-4])
def test_softmax_and_its_neighbours_without_a_division_by_the_sum(e):
    """delta is of the size of e there, far below the rounding of the mean that the start is taken from."""
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(6, 40, dtype=dtype)
        for given in (e, torch.full((6, 1), e, dtype=dtype)):
            for operator in OPERATORS.values():
                p, _, delta = operator.bisect(x, given, 1, 50, False)
                exact = reference.bisect(x.double(), e, 1, 200, True)
                assert torch.allclose(p.sum(1), torch.ones(6, dtype=dtype), atol=1e-5)
                assert torch.allclose(p.double(), exact[0], atol=1e-5)
                assert torch.allclose(delta.double(), exact[2], atol=1e-5 * max(e, 1e-9))


class HardwareLogarithm:
    """Stands in for `lg2.approx`: off by the 2^-22 that the instruction may be off, in the worse direction for each entry."""

    def __init__(self, sign):
        self.sign = sign

    def __call__(self, argument):
        return tl.log2(argument) + self.sign * 2.0**-22


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_gate_holds_with_the_logarithm_of_the_hardware(dtype, sign, monkeypatch):
    """The interpreter's log2 is exact; the hardware's error is put in its place where the kernels rely on it."""
    monkeypatch.setattr(numerics, "hardware_log2", HardwareLogarithm(sign))
    for alpha in (0.3, 0.85, 0.97):
        for sigma in (1.0, 6.0):
            checks.forward_passes_the_gate("triton", "cpu", checks.random_scores((3, 300), dtype, sigma), alpha)


@pytest.mark.parametrize("shape", [(2, 3, 4, 37), (2, 37, 5), (37, 3, 5, 2)])
def test_any_layout_of_outer_dimensions(shape):
    """Per-head alpha, adjacent rows, and more outer dimensions than can be merged: a copy is made, the result the same."""
    for order in ([*range(len(shape))], [*reversed(range(len(shape)))], [1, 0, *range(2, len(shape))]):
        x = torch.randn(shape).permute(order)
        dim = order.index(shape.index(37))
        alpha = torch.rand([1 if axis != (dim + 1) % x.ndim else size for axis, size in enumerate(x.shape)]) * 0.8 + 0.1
        checks.forward_passes_the_gate("triton", "cpu", x, alpha, dim)


@pytest.mark.parametrize("backend", ["triton-stream", "triton-split"])
def test_streaming_in_float64(backend):
    x, grad = torch.randn(2, 600).double() * 3, torch.randn(2, 600).double()
    for e in (0.7, 0.5, 0.15):
        exact = reference.bisect(x, e, 1, 200, True)
        p, m, delta = OPERATORS[backend].bisect(x, e, 1, 50, True)
        assert (p - exact[0]).abs().max() <= 1e-13
        for ours, truth in zip(
            OPERATORS[backend].bisect_backward(grad, p, m, delta, None, e, 1, True),
            reference.bisect_backward(grad, p, m, delta, None, e, 1, True),
            strict=True,
        ):
            assert (ours - truth).abs().max() <= 1e-13 * max(1.0, float(truth.abs().max()))


def test_strided_rows_that_are_streamed():
    x = torch.randn(700, 3).T
    checks.forward_passes_the_gate("triton-stream", "cpu", x, 0.6)
    checks.forward_passes_the_gate("triton-split", "cpu", x, 0.6)


def test_warmup_prepares_by_calling():
    assert diffmax.warmup([20, 300], (torch.float32,), (0.5, None), backend="triton") == {"triton": 4}


def test_the_guard_sees_what_the_interpreter_does_not():
    @triton.jit
    def beyond(x_ptr, BLOCK: tl.constexpr):
        cols = tl.arange(0, BLOCK)
        tl.store(x_ptr + cols, tl.load(x_ptr + cols) * 2.0)

    @triton.jit
    def sum_of_bits(x_ptr, BLOCK: tl.constexpr):
        x = tl.load(x_ptr + tl.arange(0, BLOCK))
        tl.store(x_ptr + tl.arange(0, BLOCK), x + x)

    with pytest.raises(Exception, match=r"out-of-bounds load: 4 of 8 lanes"):
        beyond[(1,)](torch.zeros(4), BLOCK=8)
    with pytest.raises(Exception, match=r"programs .* both store to one address"):
        beyond[(2,)](torch.zeros(8), BLOCK=8)
    with pytest.raises(Exception, match=r"arithmetic on bfloat16"):
        sum_of_bits[(1,)](torch.zeros(8, dtype=torch.bfloat16), BLOCK=8)
