"""The conformance kit for threshold attention: subclass `ThresholdConformance`, name the backend, run pytest."""

from __future__ import annotations

import torch

from diffmax.testing.common.conformance import CaseKit, every_case_of
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
        """For queries, keys, values, thresholds and the bias."""
        if self.claims(dtype, *case.features()):
            checks.gradients_are_right_on_average(self.backend, self.device, case, dtype)

    @every_dtype
    def test_opcheck(self, dtype: torch.dtype) -> None:
        """torch's own check of operators."""
        if self.claims(dtype):
            checks.passes_opcheck(self.backend, self.device, dtype)
