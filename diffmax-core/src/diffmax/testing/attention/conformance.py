"""The conformance kit for attention: subclass `AttentionConformance`, name the backend, run pytest.

    from diffmax.testing.attention.conformance import AttentionConformance

    class TestAcmeAttention(AttentionConformance):
        backend = "acme"
        device = "cuda"

What the backend does not claim is not skipped: the test then asks that it is refused with a reason.
"""

from __future__ import annotations

import pytest
import torch

from diffmax import attention
from diffmax.errors import NoBackendError
from diffmax.testing.attention import checks
from diffmax.testing.common.conformance import CaseKit, every_case_of, low
from diffmax.testing.rows.conformance import dtype_id, every_dtype

every_case = every_case_of(checks.CASES)
FLOAT32_CASES = ("head size 256", "long", "dense", "sparse")
FLOAT32_IDS = [name.replace(" ", "-") for name in FLOAT32_CASES]


class AttentionConformance(CaseKit):
    """Tests of one backend's attention on one device."""

    operators = ("attention", "attention_backward")

    @every_dtype
    def test_a_dtype_is_taken_or_refused_by_the_call(self, dtype: torch.dtype) -> None:
        """As claimed: the public function answers in the dtype, or raises with the reason."""
        x = torch.zeros(1, 1, 2, 16, dtype=dtype, device=self.device)
        if dtype in self.description.provided["attention"].dtypes:
            assert attention(x, x, x, backend=self.backend).dtype == dtype
        else:
            with pytest.raises(NoBackendError, match=f"{self.backend}: .*not {dtype_id(dtype)}"):
                attention(x, x, x, backend=self.backend)

    @every_dtype
    @every_case
    def test_forward(self, case: checks.Case, dtype: torch.dtype) -> None:
        """Every feature alone, and the pairs that interact, through the gate."""
        self.passes_or_is_refused(checks.forward_passes_the_gate, case, dtype)

    @pytest.mark.parametrize("case", [checks.CASES[name] for name in FLOAT32_CASES], ids=FLOAT32_IDS)
    def test_float32_products(self, case: checks.Case) -> None:
        """The test to look at first on a device: whether its products of float32 are as exact as the gate asks.

        Matrix cores that cut off what they add, or multiply fewer digits, show here: in long heads, many keys, large scores.
        """
        if self.claims(torch.float32, *case.features()):
            for _ in range(3):
                checks.forward_passes_the_gate(self.backend, self.device, case, torch.float32)

    @every_dtype
    @every_case
    def test_gradients(self, case: checks.Case, dtype: torch.dtype) -> None:
        """For all that has one; what the backend does not provide comes from the next one."""
        self.claims(dtype, "alpha_gradient")
        if self.claims(dtype, *case.features()):
            checks.gradients_are_right_on_average(self.backend, self.device, case, dtype)

    @every_dtype
    @pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85, 0.99])
    def test_nasty_rows(self, alpha: float, dtype: torch.dtype) -> None:
        """Ties, offsets of 1e9, masks, as scores."""
        if self.claims(dtype, backward=False):
            checks.nasty_rows_pass_the_gate(self.backend, self.device, dtype, alpha)

    @every_dtype
    def test_special_alphas(self, dtype: torch.dtype) -> None:
        """At and beside the alphas that have kernels of their own, near 0 and 1, forward and backward."""
        if self.claims(dtype):
            checks.special_alphas_pass_the_gate(self.backend, self.device, dtype)

    @every_dtype
    def test_dropout(self, dtype: torch.dtype) -> None:
        """The weights that the contract names, from torch's generator, the same in the backward."""
        if self.claims(dtype, "dropout"):
            checks.dropout_keeps_what_the_contract_says(self.backend, self.device, dtype)

    @every_dtype
    def test_packed_sequences(self, dtype: torch.dtype) -> None:
        """Each on its own."""
        if self.claims(dtype, "varlen"):
            checks.packed_sequences_are_each_on_their_own(self.backend, self.device, dtype)

    @every_dtype
    def test_strides(self, dtype: torch.dtype) -> None:
        """Views of larger tensors."""
        if self.claims(dtype):
            checks.strides_of_every_kind(self.backend, self.device, dtype)

    @every_dtype
    def test_inputs_stay_as_they_are(self, dtype: torch.dtype) -> None:
        """A kernel writes to nothing that it is given."""
        if self.claims(dtype):
            checks.inputs_stay_as_they_are(self.backend, self.device, dtype)

    @every_dtype
    def test_empty(self, dtype: torch.dtype) -> None:
        """Any size may be 0."""
        if self.claims(dtype):
            checks.empty_calls(self.backend, self.device, dtype)

    @every_dtype
    def test_masked_and_bad_queries(self, dtype: torch.dtype) -> None:
        """Zeros without a gradient; NaN stays in its row."""
        if self.claims(dtype):
            checks.masked_and_bad_queries(self.backend, self.device, dtype)

    @every_dtype
    def test_residuals_are_exchangeable(self, dtype: torch.dtype) -> None:
        """Its forward with the reference's backward, and the other way round."""
        if self.claims(dtype):
            checks.residuals_are_exchangeable(self.backend, self.device, dtype)

    def test_statistics(self) -> None:
        """tau, support sizes, empty tiles."""
        if self.claims(torch.float32, "attention_stats", backward=False):
            checks.statistics_are_right(self.backend, self.device, torch.float32)

    @every_dtype
    def test_one_tensor_for_all(self, dtype: torch.dtype) -> None:
        """attention(x, x, x)."""
        if self.claims(dtype):
            checks.one_tensor_for_all(self.backend, self.device, dtype)

    @every_dtype
    def test_repeatable(self, dtype: torch.dtype) -> None:
        """Bit for bit, where claimed."""
        if self.claims(dtype, "deterministic"):
            checks.is_repeatable(self.backend, self.device, dtype)

    @every_dtype
    def test_opcheck(self, dtype: torch.dtype) -> None:
        """torch's own check of operators."""
        if self.claims(dtype):
            checks.passes_opcheck(self.backend, self.device, dtype)

    @low
    def test_compiles_in_one_graph_with_dynamic_shapes(self, dtype: torch.dtype) -> None:
        """torch.compile, forward and backward."""
        if self.claims(dtype, "tensor_alpha"):
            checks.compiles_in_one_graph(self.backend, self.device, dtype)
