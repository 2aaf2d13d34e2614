"""diffmax-core's own power attention through the kit that vendors use."""

import pytest
import torch

import diffmax
from diffmax.plugin import Backend
from diffmax.testing.power import checks
from diffmax.testing.power_conformance import PowerConformance

pytestmark = pytest.mark.sampled(9)


class TestNumba(PowerConformance):
    backend = "numba"


class TestCpu(PowerConformance):
    backend = "cpu"


class TestReference(PowerConformance):
    """The gate is measured on it, so none is asked of it: test_power holds it to full tensor powers and differences."""

    backend = "reference"
    test_results = test_gradients = None


@pytest.fixture
def _partial():
    """Right, but less than all: no feature at all, one dtype, no backward."""
    kernels = {"power_attention": "diffmax.kernels.cpu.power:power_attention"}
    diffmax.register_backend(
        Backend(name="partial", device_types=("cpu",), kernels=kernels, dtypes=(torch.float32,), automatic=False)
    )
    yield
    diffmax.unregister_backend("partial")


@pytest.mark.usefixtures("_partial")
class TestPartial(PowerConformance):
    """What is not claimed is refused, and what is provided is tested."""

    backend = "partial"


def wrong_coefficients(monkeypatch, power):
    monkeypatch.setattr(power, "coefficients", lambda size, degree, like: like.new_ones(power.expanded_dim(size, degree)))


def wrong_decay(monkeypatch, power):
    right = power._Chunk._until_end
    monkeypatch.setattr(power._Chunk, "_until_end", lambda self: right(self) * 1.0001)


def lost_pairs(monkeypatch, power):
    right = power._Rows.weights
    monkeypatch.setattr(power._Rows, "weights", lambda self: right(self) * 0.9999)


@pytest.mark.parametrize("fault", [wrong_coefficients, wrong_decay, lost_pairs])
def test_the_kit_notices_a_fault_in_a_ten_thousandth(monkeypatch, fault):
    from diffmax.kernels.cpu import power

    fault(monkeypatch, power)
    with pytest.raises(AssertionError, match="output: error"):
        checks.results_pass_the_gate("cpu", "cpu", checks.CASES["state in, state out"], torch.float32)


@pytest.mark.parametrize("what", ["query", "key", "value", "log_gates", "sums", "norm"])
def test_the_kit_notices_a_wrong_gradient(monkeypatch, what):
    from diffmax.kernels.cpu import power

    right = power.power_attention_backward

    def wrong(*given):
        found = right(*given)
        return found._replace(**{what: getattr(found, what) * 1.001})

    monkeypatch.setattr(power, "power_attention_backward", wrong)
    diffmax.machine.dispatch.registry.kernels.clear()
    try:
        with pytest.raises(AssertionError, match=f"gradient for {what}"):
            checks.gradients_are_right_on_average("cpu", "cpu", checks.CASES["state in, state out"], torch.float32)
    finally:
        diffmax.machine.dispatch.registry.kernels.clear()
