"""diffmax-core's own threshold attention through the kit that vendors use."""

import pytest
import torch

import diffmax
from diffmax.testing.threshold import checks
from diffmax.testing.threshold_conformance import ThresholdConformance

pytestmark = pytest.mark.sampled(17)


class TestNumba(ThresholdConformance):
    backend = "numba"


class TestCpu(ThresholdConformance):
    backend = "cpu"


class TestReference(ThresholdConformance):
    """The gate is measured on it, so none is asked of it: test_threshold holds it to its definition and to differences."""

    backend = "reference"
    test_results = test_gradients = None


@pytest.mark.parametrize("what", ["query", "key", "value", "theta", "bias"])
@pytest.mark.slow
def test_the_kit_notices_a_wrong_gradient(monkeypatch, what):
    from diffmax.kernels.cpu import threshold

    right = threshold.threshold_attention_backward
    monkeypatch.setattr(
        threshold,
        "threshold_attention_backward",
        lambda *given: (found := right(*given))._replace(**{what: getattr(found, what) * 1.001}),
    )
    diffmax.machine.dispatch.registry.kernels.clear()
    try:
        with pytest.raises(AssertionError, match="gradient for"):
            checks.gradients_are_right_on_average("cpu", "cpu", checks.CASES["bias"], torch.float32)
    finally:
        diffmax.machine.dispatch.registry.kernels.clear()
