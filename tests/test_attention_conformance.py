"""diffmax-core's own attention through the kit that vendors use."""

import pytest
import torch

import diffmax
from diffmax.plugin import Backend
from diffmax.testing.attention.conformance import AttentionConformance

pytestmark = pytest.mark.sampled(11)


class TestNumba(AttentionConformance):
    backend = "numba"


class TestCpu(AttentionConformance):
    backend = "cpu"


class TestReference(AttentionConformance):
    """The gate is measured on it, so none is asked of it: test_attention holds it to entmax and differences."""

    backend = "reference"
    test_special_alphas = test_forward = test_gradients = test_nasty_rows = test_residuals_are_exchangeable = (
        test_statistics
    ) = None
    test_float32_products = None


@pytest.fixture
def _partial():
    """Right, but less than all: no feature, one dtype, no backward."""
    kernels = {"attention": "diffmax.kernels.cpu.attention:attention"}
    diffmax.register_backend(
        Backend(name="partial", device_types=("cpu",), kernels=kernels, dtypes=(torch.float32,), automatic=False)
    )
    yield
    diffmax.unregister_backend("partial")


@pytest.mark.usefixtures("_partial")
class TestPartial(AttentionConformance):
    """What is not claimed is refused, and what is provided is tested; the backward comes from the next backend."""

    backend = "partial"
