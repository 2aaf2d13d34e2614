"""torch.ops.diffmax.*: registration, tracing, compilation and the rest of torch that meets the operator."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect

pytestmark = pytest.mark.sampled(3)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def alpha_tensor(x, requires_grad=False):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((x.shape[0],) + (1,) * (x.ndim - 1), 0.3, dtype=dtype, requires_grad=requires_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["float alpha", "tensor alpha", "learned alpha", "no gradient", "other dim", "empty"])
def test_opcheck(case, dtype):
    x = torch.randn((2, 0) if case == "empty" else (2, 3, 5)).to(dtype).requires_grad_(case != "no gradient")
    e = alpha_tensor(x, case == "learned alpha") if "alpha" in case and case != "float alpha" else None
    dim = 1 if case == "other dim" else x.ndim - 1
    torch.library.opcheck(torch.ops.diffmax.bisect.default, (x, 0.3, e, dim, 50, True, ""))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs_e", [False, True])
def test_opcheck_of_the_backward(needs_e, dtype):
    x = torch.randn(4, 6).to(dtype)
    e = alpha_tensor(x) if needs_e else None
    p, m, delta = torch.ops.diffmax.bisect(x, 0.3, e, 1, 50, True, "")
    kept = x if dtype == torch.float16 else None
    arguments = (torch.randn(4, 6).to(dtype), p, m, delta, kept, 0.3, e, 1, needs_e, "")
    torch.library.opcheck(torch.ops.diffmax.bisect_backward.default, arguments)


@pytest.mark.parametrize("backend", ["", "cpu", "reference"])
def test_the_operator_runs_the_backend_that_it_is_given(backend):
    x = torch.randn(4, 6, requires_grad=True)
    p, m, delta = torch.ops.diffmax.bisect(x, 0.3, None, 1, 50, True, backend)
    torch.testing.assert_close(p, diffmax_bisect(x, 0.7), rtol=0, atol=5e-7)
    tau = m - (1 - delta) / 0.3
    torch.testing.assert_close((0.3 * (x - tau)).clamp(min=0) ** (1 / 0.3), p, rtol=0, atol=2e-6)
    torch.autograd.grad(p.square().sum(), x)


@pytest.mark.parametrize(  # each pair of values once
    ("compiler", "dynamic", "learned"),
    [("aot_eager", False, True), ("aot_eager", True, False), ("inductor", False, False), ("inductor", True, True)],
)
def test_compiles_in_one_graph_forward_and_backward(compiler, dynamic, learned):
    torch._dynamo.reset()

    def attend(x, alpha):
        return diffmax_bisect(x * 2, alpha, dim=-1).square().sum()

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend=compiler)
    for length in (6, 9):
        x = torch.randn(2, 3, length, requires_grad=True)
        alpha = torch.full((3, 1), 0.6, requires_grad=True) if learned else 0.6
        inputs = (x, alpha) if learned else (x,)
        expected = torch.autograd.grad(attend(x, alpha), inputs)
        result = torch.autograd.grad(compiled(x, alpha), inputs)
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_compiles_the_module_and_half_precision():
    torch._dynamo.reset()
    module = DiffmaxBisectModule(torch.full((3, 1, 1), 0.85), alpha_map=HillMap(0.3))
    x = torch.randn(2, 3, 4, 5).bfloat16()
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).float().square().sum().backward()
    assert torch.isfinite(module.log_beta.grad).all()


def test_bad_input_is_an_error_under_compile_too():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: diffmax_bisect(x, 1.5), backend="eager")
    with pytest.raises(ValueError, match=r"alpha must lie strictly between 0 and 1, got 1\.5"):
        compiled(torch.randn(3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(reentrant):
    x = torch.randn(3, 7, requires_grad=True)
    expected = torch.autograd.grad(diffmax_bisect(x, 0.6).square().sum(), x)[0]
    checkpoint(lambda x: diffmax_bisect(x, 0.6).square().sum(), x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_half_in_computes_in_float32_and_gives_half(dtype):
    x = torch.randn(2, 3, 8, 8)
    alpha = torch.full((3, 1, 1), 0.6, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        scores = x @ x.mT
        assert scores.dtype == dtype
        p = diffmax_bisect(scores, alpha)
        assert p.dtype == dtype
        (p @ x).float().square().sum().backward()
    assert torch.equal(p, diffmax_bisect(scores.float(), alpha).to(dtype))
    assert alpha.grad.dtype == torch.float32
    assert torch.isfinite(alpha.grad).all()
    with torch.autocast("cpu", dtype=dtype):
        assert diffmax_bisect(x.double(), 0.5).dtype == torch.float64
        assert torch.equal(diffmax_bisect(x, 0.5), diffmax_bisect(x.clone(), 0.5))


def test_runs_on_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 5, dtype=torch.bfloat16, requires_grad=True)
        alpha = torch.full((3, 1), 0.5, requires_grad=True)
        p = diffmax_bisect(x, alpha, dim=2)
        assert (p.shape, p.dtype) == ((2, 3, 5), torch.bfloat16)
        p.sum().backward()
        assert x.grad.shape == x.shape
        assert alpha.grad.shape == alpha.shape
    assert diffmax_bisect(torch.empty(4, 5, device="meta"), 0.5).shape == (4, 5)


def test_inference_mode_and_no_grad():
    x = torch.randn(3, 5, requires_grad=True)
    with torch.inference_mode():
        inference = diffmax_bisect(x, 0.5)
    with torch.no_grad():
        plain = diffmax_bisect(x, 0.5)
    assert not plain.requires_grad
    assert torch.equal(inference, plain)


def test_the_same_tensor_may_be_scores_and_alpha():
    x = torch.rand(3, 1, dtype=torch.float64) * 0.8 + 0.1
    x.requires_grad_()
    diffmax_bisect(x, x).sum().backward()
    assert (x.grad == 0).all()  # a row of one entry is 1 whatever the rest


def test_a_model_can_be_copied_and_saved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), DiffmaxBisectModule(0.85, alpha_map=HillMap(0.3)))
    x = torch.randn(2, 5)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 5), DiffmaxBisectModule(0.7, alpha_map=HillMap(0.5)))
    fresh[1].alpha_map = HillMap(0.3)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(fresh(x), expected)


PEAK_MEMORY = """
import resource, sys, torch
from diffmax import diffmax_bisect
x = torch.randn(1, 1 << 24)  # 64 MiB
diffmax_bisect(x[:, :1000], {alpha})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
diffmax_bisect(x, {alpha}, n_iter=50)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (64 << 10))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("alpha", [0.5, 0.95])
def test_memory_does_not_grow_with_the_iterations(alpha):
    """Beyond the output: three buffers and a mask, for a row that is one block; 50 iterations of n would be 50."""
    output = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY.format(alpha=alpha)], capture_output=True, text=True, check=True
    ).stdout
    assert float(output) < 8
