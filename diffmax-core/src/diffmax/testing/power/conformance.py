"""The conformance kit for power attention: subclass `PowerConformance`, name the backend, run pytest.

    from diffmax.testing.power.conformance import PowerConformance

    class TestAcmePower(PowerConformance):
        backend = "acme"
        device = "cuda"

A vendor may ship this operator alone. What the backend does not claim is not skipped: the test then asks that it is refused
with a reason.
"""

from __future__ import annotations

import pytest
import torch

from diffmax.errors import NoBackendError
from diffmax.testing.common.conformance import CaseKit, every_case_of, low
from diffmax.testing.power import checks
from diffmax.testing.rows.conformance import dtype_id, every_dtype

every_case = every_case_of(checks.CASES)


class PowerConformance(CaseKit):
    """Tests of one backend's power attention on one device."""

    operators = ("power_attention", "power_attention_backward")

    @every_dtype
    def test_a_dtype_is_taken_or_refused_by_the_call(self, dtype: torch.dtype) -> None:
        """As claimed: the public function answers in the dtype, or raises with the reason."""
        given = checks.Case(many=3).inputs(dtype).moved(self.device)
        if dtype in self.description.provided["power_attention"].dtypes:
            assert checks.attend(given, checks.Case(many=3), self.backend)[0].dtype == dtype
        else:
            with pytest.raises(NoBackendError, match=f"{self.backend}: .*not {dtype_id(dtype)}"):
                checks.attend(given, checks.Case(many=3), self.backend)

    @every_dtype
    @every_case
    def test_results(self, case: checks.Case, dtype: torch.dtype) -> None:
        """Every feature alone, and those that interact, through the gate; the final state too."""
        self.passes_or_is_refused(checks.results_pass_the_gate, case, dtype)

    @every_dtype
    @every_case
    def test_gradients(self, case: checks.Case, dtype: torch.dtype) -> None:
        """For queries, keys, values, gates and states."""
        if self.claims(dtype, *case.features()):
            checks.gradients_are_right_on_average(self.backend, self.device, case, dtype)

    @every_dtype
    def test_zero_keys_and_gates(self, dtype: torch.dtype) -> None:
        """Nothing comes of nothing."""
        if self.claims(dtype):
            checks.zero_keys_and_gates(self.backend, self.device, dtype, self.features)

    @every_dtype
    def test_bad_numbers(self, dtype: torch.dtype) -> None:
        """NaN stays where it belongs."""
        if self.claims(dtype, backward=False):
            checks.bad_numbers_stay_where_they_belong(self.backend, self.device, dtype)

    @every_dtype
    def test_residuals_are_exchangeable(self, dtype: torch.dtype) -> None:
        """Its forward with the reference's backward, and the other way round."""
        if self.claims(dtype):
            checks.residuals_are_exchangeable(self.backend, self.device, dtype)

    @every_dtype
    def test_chunks(self, dtype: torch.dtype) -> None:
        """Of any size."""
        if self.claims(dtype, "gates", backward=False):
            checks.chunks_change_rounding_alone(self.backend, self.device, dtype)

    @every_dtype
    def test_decoding_goes_on(self, dtype: torch.dtype) -> None:
        """Token after token."""
        if self.claims(dtype, "gates", "state", "gqa", backward=False):
            checks.decoding_goes_on(self.backend, self.device, dtype)

    @every_dtype
    def test_strided_and_empty(self, dtype: torch.dtype) -> None:
        """Any strides, any size."""
        if self.claims(dtype):
            checks.strided_inputs(self.backend, self.device, dtype)
            checks.empty_calls(self.backend, self.device, dtype, self.features)

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
            checks.compiles_in_one_graph(self.backend, self.device, dtype)
