"""The conformance kit: subclass `BackendConformance`, name the backend, run pytest.

    from diffmax.testing.rows.conformance import BackendConformance

    class TestAcme(BackendConformance):
        backend = "acme"
        device = "cuda"

It needs `pip install "diffmax-core[testing]"` and no file of diffmax's repository. A report that can be published is written by
`pytest -p diffmax.testing.report --diffmax-report acme.json`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
import torch

from diffmax import diffmax_bisect, reference
from diffmax.errors import NoBackendError
from diffmax.machine import dispatch
from diffmax.plugin import OPERATOR_FEATURES, Backend
from diffmax.testing.pairs import every_pair
from diffmax.testing.rows import cases, checks

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_id(dtype: torch.dtype) -> str:
    """A dtype as test names have it."""
    return str(dtype).removeprefix("torch.")


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def _pairs_of(shapes: Sequence[tuple[int, ...]]) -> dict[tuple[float, torch.dtype], list[tuple[tuple[int, ...], float]]]:
    """Shapes and spreads of the scores for each alpha and dtype: each meets each of the others, not their product."""
    chosen: dict[tuple[float, torch.dtype], list[tuple[tuple[int, ...], float]]] = {}
    for alpha, dtype, shape, sigma in every_pair(cases.ALPHAS, DTYPES, shapes, cases.SIGMAS):
        chosen.setdefault((alpha, dtype), []).append((shape, sigma))
    return chosen


FORWARD_PAIRS = _pairs_of(cases.SHAPES)
GRADIENT_PAIRS = _pairs_of(cases.GRADIENT_SHAPES)


class Kit:
    """What the conformance classes share.

    Attributes:
        backend: Name, as `diffmax.backends()` lists it.
        device: torch device to run on.
        expected_failures: Test name, with or without its parameters, to the reason why it fails today. Such a test must fail:
            when it passes, the kit says so.
        operators: What the kit tests, a forward and perhaps its backward. Set by each kit.
    """

    backend: ClassVar[str]
    operators: ClassVar[tuple[str, ...]]
    device: ClassVar[str] = "cpu"
    expected_failures: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture(autouse=True)
    def _conformance(self, request: pytest.FixtureRequest) -> None:
        torch.manual_seed(request.config.getoption("--diffmax-seed", 0))
        for name in (request.node.name, request.node.originalname):
            if name in self.expected_failures:
                request.applymarker(pytest.mark.xfail(reason=self.expected_failures[name], strict=True))

    @property
    def description(self) -> Backend:
        """What the backend registered."""
        known = {backend.name: backend for backend in dispatch.registry.backends()}
        assert self.backend in known, f"no backend is named {self.backend!r}, loaded: {', '.join(known)}"
        return known[self.backend]

    def claims(self, dtype: torch.dtype, *features: str, backward: bool = True) -> bool:
        """Whether the backend claims dtype and features for the kit's operators; if not, check that it refuses such a call.

        A backward that it does not provide comes from another backend, and is not asked.
        """
        forward = self.operators[0]
        assert forward in self.description.provided, f"{self.backend} provides no {forward}: this kit is not for it"
        asked = [operator for operator in self.operators[: 1 + backward] if operator in self.description.provided]
        verdicts = [self._claims(operator, dtype, {*features} & OPERATOR_FEATURES[operator]) for operator in asked]
        self.asked = [*getattr(self, "asked", ()), all(verdicts)]  # a report tells what was refused from what was computed
        return all(verdicts)

    def _claims(self, operator: str, dtype: torch.dtype, features: set[str]) -> bool:
        kernel = self.description.provided[operator]
        lacking = sorted(features - kernel.features)
        if dtype in kernel.dtypes and not lacking:
            return True
        words = f"lacks {lacking[0]}" if lacking else f"not {dtype_id(dtype)}"
        self._is_refused(operator, dtype, features, words)
        return False

    def _is_refused(self, operator: str, dtype: torch.dtype, features: set[str], words: str, size: int = 16) -> None:
        """The choice of a backend for such a call, with this one named, ends in an error that says `words`."""
        sizes = (size, size) if operator.startswith("attention") else (0, 0)
        spec = dispatch.describe(operator, torch.device(self.device).type, dtype, frozenset(features), *sizes)
        with pytest.raises(NoBackendError, match=f"{self.backend}: .*{re.escape(words)}"):
            dispatch.choose(spec, self.backend)

    def test_is_available_and_says_so(self) -> None:
        """The probe says yes on this machine, and the kernels can be imported."""
        assert dispatch.registry.probe(self.description) == ("", "")
        for kernel in self.description.provided.values():
            for target in filter(None, (kernel.function, kernel.warmup)):
                assert callable(dispatch.import_function(target))

    def test_what_it_does_not_claim_is_refused_with_a_reason(self) -> None:
        """Features and dtypes that its kernels lack, larger heads, and device types that it does not serve."""
        for operator in self.operators:
            kernel = self.description.provided.get(operator)
            if kernel is None:
                continue
            for feature in sorted(OPERATOR_FEATURES[operator] - kernel.features):
                self._is_refused(operator, kernel.dtypes[0], {feature}, f"lacks {feature}")
            for dtype in (*DTYPES, torch.int64):
                if dtype not in kernel.dtypes:
                    self._is_refused(operator, dtype, set(), f"not {dtype_id(dtype)}")
            if kernel.max_head_dim is not None:
                size = kernel.max_head_dim + 1
                words = f"heads of at most {kernel.max_head_dim} entries, not {size}"
                self._is_refused(operator, kernel.dtypes[0], set(), words, size)
            spec = dispatch.describe(operator, "some-other-device", kernel.dtypes[0])
            assert self.description.reasons_against(spec) or "*" in self.description.device_types

    def test_expected_failures_name_tests_of_this_kit(self) -> None:
        """A misspelt name would hide nothing and say nothing."""
        unknown = [name for name in self.expected_failures if not hasattr(self, name.partition("[")[0])]
        assert not unknown


class BackendConformance(Kit):
    """Tests of one backend's row operator on one device; `diffmax.testing.attention.conformance` has those of its attention.

    A dtype that the backend does not claim is not skipped: the test then asks that it is refused with a reason.
    """

    operators = ("bisect", "bisect_backward")

    # what it says of itself

    @every_dtype
    def test_a_dtype_is_taken_or_refused_by_the_call(self, dtype: torch.dtype) -> None:
        """As claimed: the public function answers in the dtype, or raises with the reason."""
        x = torch.zeros(3, dtype=dtype, device=self.device)
        if dtype in self.description.provided["bisect"].dtypes:
            assert diffmax_bisect(x, 0.5, backend=self.backend).dtype == dtype
        else:
            with pytest.raises(NoBackendError, match=f"{self.backend}: .*not {dtype_id(dtype)}"):
                diffmax_bisect(x, 0.5, backend=self.backend)

    def test_importing_diffmax_imports_no_kernel_and_a_fork_survives_it(self) -> None:
        """In a fresh process: the kernels' modules are not loaded, and a forked child can compute."""
        modules = {kernel.function.partition(":")[0] for kernel in self.description.provided.values()}
        modules = {name for name in modules if not name.startswith("diffmax.reference")}  # core's own formulas
        code = (
            "import os, sys, torch, diffmax\n"
            f"loaded = {sorted(modules)!r} and [m for m in {sorted(modules)!r} if m in sys.modules]\n"
            "assert not loaded, f'imported with diffmax: {loaded}'\n"
            "child = os.fork() if hasattr(os, 'fork') else 0\n"
            "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
            "torch.set_num_threads(1)\n"
            "assert diffmax.diffmax_bisect(torch.tensor([3.0, 0.0]), 0.5)[1] < 0.2\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    # forward

    @every_dtype
    @pytest.mark.parametrize("alpha", cases.ALPHAS)
    def test_random_rows(self, alpha: float, dtype: torch.dtype) -> None:
        """Rows of every length, dense to sparse, through the gate."""
        if self.claims(dtype, backward=False):
            for shape, sigma in FORWARD_PAIRS[alpha, dtype]:
                checks.forward_passes_the_gate(self.backend, self.device, checks.random_scores(shape, dtype, sigma), alpha)

    @every_dtype
    @pytest.mark.parametrize("alpha", cases.ALPHAS)
    def test_nasty_rows(self, alpha: float, dtype: torch.dtype) -> None:
        """Ties, offsets of 1e9, masks."""
        if self.claims(dtype, backward=False):
            checks.nasty_rows_pass_the_gate(self.backend, self.device, dtype, alpha)

    @every_dtype
    def test_special_alphas(self, dtype: torch.dtype) -> None:
        """At and beside the alphas that have kernels of their own, near 0 and 1, forward and backward."""
        if self.claims(dtype):
            checks.special_alphas_pass_the_gate(self.backend, self.device, dtype)

    @every_dtype
    def test_few_iterations_are_as_accurate_as_bisection(self, dtype: torch.dtype) -> None:
        """n_iter bisection steps leave an error of at most 2^-n_iter in t; Newton's steps must not leave more."""
        if self.claims(dtype, backward=False):
            x = checks.random_scores((50, 60), dtype).to(self.device)
            exact = reference.bisect(x.cpu().double(), 0.5, 1, 200, True)[2]
            for n_iter in (1, 4, 8, 16):
                delta = torch.ops.diffmax.bisect(x, 0.5, None, 1, n_iter, True, self.backend)[2].cpu().double()
                assert (delta - exact).abs().max() <= 2.0**-n_iter + 1e-5

    @every_dtype
    def test_masks_and_bad_rows(self, dtype: torch.dtype) -> None:
        """-inf, fully masked rows, NaN, +inf."""
        if self.claims(dtype):
            checks.masks_and_bad_rows(self.backend, self.device, dtype)

    @every_dtype
    def test_empty_and_single(self, dtype: torch.dtype) -> None:
        """No entries, one entry."""
        if self.claims(dtype):
            checks.empty_and_single(self.backend, self.device, dtype)

    @every_dtype
    def test_strides_and_dims(self, dtype: torch.dtype) -> None:
        """Views along every dim."""
        if self.claims(dtype):
            checks.strides_and_dims(self.backend, self.device, dtype)

    @every_dtype
    def test_symmetries(self, dtype: torch.dtype) -> None:
        """Order, permutation, shift, padding, support."""
        if self.claims(dtype, backward=False):
            checks.is_a_simplex_point_with_the_symmetries(self.backend, self.device, dtype)

    @every_dtype
    def test_alpha_tensors(self, dtype: torch.dtype) -> None:
        """Alpha per head and per row, where claimed."""
        if self.claims(dtype, "tensor_alpha", backward=False):
            checks.alpha_tensors(self.backend, self.device, dtype)
            checks.bad_alphas_on_the_device_give_nan_rows(self.backend, self.device, dtype)

    # backward

    @every_dtype
    @pytest.mark.parametrize("alpha", cases.ALPHAS)
    def test_gradients(self, alpha: float, dtype: torch.dtype) -> None:
        """For x and, where claimed, alpha, through the gate; what the backend does not provide comes from the next one."""
        self.claims(dtype, "alpha_gradient")
        if self.claims(dtype):
            for shape, sigma in GRADIENT_PAIRS[alpha, dtype]:
                x = checks.random_scores(shape, dtype, sigma)
                checks.backward_passes_the_gate(self.backend, self.device, x, alpha)
                checks.gradients_are_right_on_average(self.backend, self.device, x, alpha)

    @every_dtype
    def test_gradients_of_alpha_tensors(self, dtype: torch.dtype) -> None:
        """Alpha per head and per row, where claimed."""
        if self.claims(dtype, "tensor_alpha"):
            checks.gradients_of_alpha_tensors(self.backend, self.device, dtype)

    def test_gradcheck(self) -> None:
        """Finite differences in float64."""
        if self.claims(torch.float64):
            x = torch.randn(2, 7, dtype=torch.float64, device=self.device, requires_grad=True)
            assert torch.autograd.gradcheck(lambda x: diffmax_bisect(x, 0.7, backend=self.backend), (x,))

    @every_dtype
    def test_residuals_are_exchangeable(self, dtype: torch.dtype) -> None:
        """Its forward with the reference's backward, and the other way round."""
        if self.claims(dtype):
            checks.residuals_are_exchangeable(self.backend, self.device, dtype)

    def test_second_derivative(self) -> None:
        """Right, and never silently zero."""
        if self.claims(torch.float32):
            checks.second_derivative_is_right(self.backend, self.device, torch.float32)

    # conduct

    @every_dtype
    def test_repeatable(self, dtype: torch.dtype) -> None:
        """Bit for bit, where claimed."""
        if self.claims(dtype, "deterministic"):
            checks.is_repeatable(self.backend, self.device, dtype)

    @every_dtype
    def test_writes_all_that_it_allocates(self, dtype: torch.dtype) -> None:
        """Fresh memory holds NaN."""
        if self.claims(dtype):
            checks.writes_all_that_it_allocates(self.backend, self.device, dtype)

    @every_dtype
    def test_opcheck(self, dtype: torch.dtype) -> None:
        """torch's own check of operators."""
        if self.claims(dtype):
            checks.passes_opcheck(self.backend, self.device, dtype)

    @every_dtype
    def test_compiles_in_one_graph_with_dynamic_shapes(self, dtype: torch.dtype) -> None:
        """torch.compile, forward and backward."""
        if self.claims(dtype):
            checks.compiles_in_one_graph(self.backend, self.device, dtype)
