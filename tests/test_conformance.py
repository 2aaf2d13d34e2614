"""diffmax-core's own backends through the kit that vendors use."""

import pytest
import torch

import diffmax
from diffmax.plugin import Backend
from diffmax.testing.rows import checks
from diffmax.testing.rows.conformance import DTYPES, BackendConformance

pytestmark = pytest.mark.sampled(9)


class TestNumba(BackendConformance):
    backend = "numba"


class TestCpu(BackendConformance):
    backend = "cpu"
    # as TestNumba: the call in the fork names no backend, and test_backends looks for every kernel of core
    test_importing_diffmax_imports_no_kernel_and_a_fork_survives_it = None


class TestReference(BackendConformance):
    """The gate is measured on it, so none is asked of it: test_functional and test_gradients hold it to forty digits."""

    backend = "reference"
    test_special_alphas = test_random_rows = test_nasty_rows = test_alpha_tensors = test_gradients = (
        test_residuals_are_exchangeable
    ) = None
    test_importing_diffmax_imports_no_kernel_and_a_fork_survives_it = None
    test_few_iterations_are_as_accurate_as_bisection = None


@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_alphas_give_nan_rows_in_the_reference_too(dtype):
    checks.bad_alphas_on_the_device_give_nan_rows("reference", "cpu", dtype)


FORWARD = {"bisect": "diffmax.kernels.cpu.rows:bisect"}
BOTH = FORWARD | {"bisect_backward": "diffmax.kernels.cpu.rows:bisect_backward"}


@pytest.fixture(
    params=[(FORWARD, ()), (FORWARD, ("tensor_alpha",)), (BOTH, ()), (BOTH, ("tensor_alpha",))],
    ids=["forward", "forward-tensor_alpha", "both", "both-tensor_alpha"],
)
def partial(request):
    """Right, but less than all."""
    kernels, features = request.param
    dtypes = (torch.float16, torch.float32)
    diffmax.register_backend(
        Backend(
            name="partial",
            device_types=("cpu",),
            kernels=kernels,
            dtypes=dtypes,
            features=frozenset(features),
            automatic=False,
        )
    )
    yield
    diffmax.unregister_backend("partial")


@pytest.mark.usefixtures("partial")
class TestPartial(BackendConformance):
    """The kit asked every backend for alpha's gradient, and for no gradient at all one that takes no tensor as alpha."""

    backend = "partial"
    test_special_alphas = test_random_rows = test_nasty_rows = test_opcheck = test_compiles_in_one_graph_with_dynamic_shapes = (
        None  # as above
    )
    test_importing_diffmax_imports_no_kernel_and_a_fork_survives_it = None
