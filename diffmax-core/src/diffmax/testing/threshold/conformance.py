"""The conformance kit for threshold attention: subclass `ThresholdConformance`, name the backend, run pytest."""

from __future__ import annotations

import pytest
import torch

from diffmax.testing.common.conformance import CaseKit, every_case_of, low
from diffmax.testing.rows.conformance import every_dtype
from diffmax.testing.threshold import checks

every_case = every_case_of(checks.CASES)


class ThresholdConformance(CaseKit):
    """Tests of one backend's threshold attention on one device."""

    operators = ("threshold_attention", "threshold_attention_backward")

    @every_dtype
    @every_case
    def test_results(self, case: checks.Case, dtype: torch.dtype) -> None:
        """Output and mass through the gate; what is not claimed is refused."""
        self.passes_or_is_refused(checks.results_pass_the_gate, case, dtype)

    @every_dtype
    @every_case
    def test_gradients(self, case: checks.Case, dtype: torch.dtype) -> None:
        """For queries, keys, values, thresholds, the bias and alpha."""
        needs = case.features()
        if self.claims(dtype, *needs, *(["alpha_gradient"] if "tensor_alpha" in needs else [])):
            checks.gradients_are_right_on_average(self.backend, self.device, case, dtype)

    @every_dtype
    def test_a_dtype_is_taken_or_refused_by_the_call(self, dtype: torch.dtype) -> None:
        """As claimed: the public function answers in the dtype, or raises with the reason."""
        self.passes_or_is_refused(checks.results_pass_the_gate, checks.Case(length=3, many=3), dtype)

    @pytest.mark.parametrize("kind", ["scores", "softmax", "diffmax"])
    def test_gradcheck(self, kind: str) -> None:
        """Finite differences in float64, first and second order."""
        if self.claims(torch.float64, *checks.Case(weights=kind, power=3.0).features()):
            checks.gradients_match_differences(self.backend, self.device, kind)

    @every_dtype
    def test_bad_numbers(self, dtype: torch.dtype) -> None:
        """NaN and inf stay where they belong, and are not lost."""
        if self.claims(dtype):
            checks.bad_numbers_stay_where_they_belong(self.backend, self.device, dtype, self.features)

    @every_dtype
    def test_nothing(self, dtype: torch.dtype) -> None:
        """Zeros, hidden keys, one key, none."""
        if self.claims(dtype):
            checks.nothing_comes_of_nothing(self.backend, self.device, dtype, self.features)

    @every_dtype
    def test_huge_scores(self, dtype: torch.dtype) -> None:
        """Nothing overflows."""
        if self.claims(dtype, backward=False):
            checks.huge_scores(self.backend, self.device, dtype, self.features)

    @every_dtype
    def test_strided(self, dtype: torch.dtype) -> None:
        """Any strides."""
        if self.claims(dtype):
            checks.strided_inputs(self.backend, self.device, dtype)

    @every_dtype
    def test_residuals_are_exchangeable(self, dtype: torch.dtype) -> None:
        """Its forward with the reference's backward, and the other way round."""
        if self.claims(dtype):
            checks.residuals_are_exchangeable(self.backend, self.device, dtype, self.features)

    @every_dtype
    def test_repeatable(self, dtype: torch.dtype) -> None:
        """Bit for bit, where claimed."""
        if self.claims(dtype, "deterministic"):
            checks.is_repeatable(self.backend, self.device, dtype)

    @every_dtype
    def test_opcheck(self, dtype: torch.dtype) -> None:
        """torch's own check of operators."""
        if self.claims(dtype):
            checks.passes_opcheck(self.backend, self.device, dtype, self.features)

    @low
    def test_compiles_in_one_graph(self, dtype: torch.dtype) -> None:
        """torch.compile, forward and backward."""
        if self.claims(dtype):
            checks.compiles_in_one_graph(self.backend, self.device, dtype, self.features)
