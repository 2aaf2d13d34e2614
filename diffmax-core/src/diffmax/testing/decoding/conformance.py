"""The conformance kit for decoding: subclass `KVCacheConformance`, name the backend, run pytest.

    from diffmax.testing.decoding.conformance import KVCacheConformance

    class TestAcmeDecoding(KVCacheConformance):
        backend = "acme"
        device = "cuda"

What the backend does not claim is not skipped: the test then asks that it is refused with a reason.
"""

from __future__ import annotations

import pytest
import torch

from diffmax.errors import NoBackendError
from diffmax.testing.decoding import checks
from diffmax.testing.rows.conformance import DTYPES, Kit, dtype_id, every_dtype

every_case = pytest.mark.parametrize("case", checks.CASES.values(), ids=[name.replace(" ", "-") for name in checks.CASES])
low = pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize < 8], ids=dtype_id)


class KVCacheConformance(Kit):
    """Tests of one backend's decoding on one device."""

    operators = ("attention_kvcache",)

    @every_dtype
    def test_a_dtype_is_taken_or_refused_by_the_call(self, dtype: torch.dtype) -> None:
        """As claimed: the public function answers in the dtype, or raises with the reason."""
        x = torch.zeros(1, 1, 1, 16, dtype=dtype, device=self.device)
        if dtype in self.description.provided["attention_kvcache"].dtypes:
            assert checks.attend(x, x, x, backend=self.backend).dtype == dtype
        else:
            with pytest.raises(NoBackendError, match=f"{self.backend}: .*not {dtype_id(dtype)}"):
                checks.attend(x, x, x, backend=self.backend)

    @every_dtype
    @every_case
    def test_decoding(self, case: checks.Case, dtype: torch.dtype) -> None:
        """Every feature alone, and the pairs that interact, through the gate; caches and bounds after the call."""
        if self.claims(dtype, *case.features()):
            checks.decoding_passes_the_gate(self.backend, self.device, case, dtype)
        else:
            with pytest.raises(NoBackendError, match=f"{self.backend}: .*(lacks|not {dtype_id(dtype)})"):
                checks.decoding_passes_the_gate(self.backend, self.device, case, dtype)

    @every_dtype
    def test_special_alphas(self, dtype: torch.dtype) -> None:
        """At and beside the alphas that have kernels of their own, near 0 and 1."""
        if self.claims(dtype, "kv_cache"):
            checks.special_alphas_pass_the_gate(self.backend, self.device, dtype)

    @every_dtype
    def test_decoding_goes_on(self, dtype: torch.dtype) -> None:
        """Token after token equals attention over all."""
        if self.claims(dtype, "kv_cache", "causal", "paged"):
            checks.decoding_goes_on(self.backend, self.device, dtype)

    @every_dtype
    def test_dead_pages_are_not_read(self, dtype: torch.dtype) -> None:
        """Counted, and poisoned."""
        if self.claims(dtype, "kv_cache", "gqa", "attention_stats"):
            checks.pages_that_cannot_matter_are_not_read(self.backend, self.device, dtype)

    @every_dtype
    def test_dead_keys_are_not_read(self, dtype: torch.dtype) -> None:
        """Poisoned, where keys in 4 bits tell."""
        if self.claims(dtype, "kv_cache", "rounded_keys", "gqa", "attention_stats"):
            checks.keys_that_cannot_matter_are_not_read(self.backend, self.device, dtype)

    @every_dtype
    def test_rounded_keys(self, dtype: torch.dtype) -> None:
        """Keys in 4 bits: token after token, NaN, the same bits, strides, torch's opcheck."""
        if self.claims(dtype, "kv_cache", "rounded_keys"):
            checks.bad_keys_and_queries(self.backend, self.device, dtype, rounded=True)
            checks.strided_caches(self.backend, self.device, dtype, rounded=True)
            checks.passes_opcheck(self.backend, self.device, dtype, rounded=True)
        if self.claims(dtype, "kv_cache", "rounded_keys", "causal", "paged"):
            checks.decoding_goes_on(self.backend, self.device, dtype, rounded=True)
        if self.claims(dtype, "kv_cache", "rounded_keys", "deterministic"):
            checks.is_repeatable(self.backend, self.device, dtype, rounded=True)

    @pytest.mark.parametrize("name", checks.STATISTICS_OF)
    def test_statistics(self, name: str) -> None:
        """tau and support sizes."""
        case = checks.CASES[name]
        if self.claims(torch.float32, "attention_stats", *case.features()):
            checks.statistics_are_right(self.backend, self.device, case, torch.float32)

    @every_dtype
    def test_bad_keys_and_queries(self, dtype: torch.dtype) -> None:
        """NaN stays where it belongs."""
        if self.claims(dtype, "kv_cache"):
            checks.bad_keys_and_queries(self.backend, self.device, dtype)

    @every_dtype
    def test_repeatable(self, dtype: torch.dtype) -> None:
        """Bit for bit, where claimed."""
        if self.claims(dtype, "kv_cache", "deterministic"):
            checks.is_repeatable(self.backend, self.device, dtype)

    @every_dtype
    def test_strided_caches(self, dtype: torch.dtype) -> None:
        """Any strides."""
        if self.claims(dtype, "kv_cache"):
            checks.strided_caches(self.backend, self.device, dtype)

    @every_dtype
    def test_opcheck(self, dtype: torch.dtype) -> None:
        """torch's own check of operators."""
        if self.claims(dtype, "kv_cache"):
            checks.passes_opcheck(self.backend, self.device, dtype)

    @low
    def test_compiles_in_one_graph(self, dtype: torch.dtype) -> None:
        """torch.compile, caches changed in place."""
        if self.claims(dtype, "kv_cache"):
            checks.compiles_in_one_graph(self.backend, self.device, dtype)
