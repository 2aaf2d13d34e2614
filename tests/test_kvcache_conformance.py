"""diffmax-core's own decoding through the kit that vendors use."""

import pytest
import torch

import diffmax
from diffmax.plugin import Backend
from diffmax.testing.decoding import checks
from diffmax.testing.decoding.conformance import KVCacheConformance

pytestmark = pytest.mark.sampled(5)


class TestNumba(KVCacheConformance):
    backend = "numba"


class TestCpu(KVCacheConformance):
    backend = "cpu"


class TestReference(KVCacheConformance):
    """The gate is measured on it, so none is asked of it: test_decoding_goes_on and test_kvcache hold it to attention."""

    backend = "reference"
    test_special_alphas = test_decoding = test_statistics = None
    test_dead_pages_are_not_read = test_dead_keys_are_not_read = None  # it reads them all


@pytest.fixture
def _partial():
    """Right, but less than all: no feature beyond the operator's own, one dtype."""
    kernels = {"attention_kvcache": "diffmax.kernels.cpu.decoding:attention_kvcache"}
    features = frozenset({"kv_cache"})
    diffmax.register_backend(
        Backend(
            name="partial", device_types=("cpu",), kernels=kernels, dtypes=(torch.float32,), features=features, automatic=False
        )
    )
    yield
    diffmax.unregister_backend("partial")


@pytest.mark.usefixtures("_partial")
class TestPartial(KVCacheConformance):
    """What is not claimed is refused, and what is provided is tested."""

    backend = "partial"


def test_the_kit_notices_a_bound_that_is_too_low(monkeypatch):
    """A page that is left out although it matters fails the gate."""
    from diffmax.kernels.cpu import decoding

    right = decoding._Head._page_bounds
    monkeypatch.setattr(decoding._Head, "_page_bounds", lambda self: (right(self)[0] - 40.0, right(self)[1]))
    with pytest.raises(AssertionError, match="output: error"):
        checks.decoding_passes_the_gate("cpu", "cpu", checks.CASES["dense"], torch.float32)
