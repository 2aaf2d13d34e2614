"""The compiled threshold attention: several blocks of keys, with weights or without, threads, parallel regions."""

from dataclasses import replace

import pytest
import torch

import diffmax
from diffmax.testing.gate import reordered
from diffmax.testing.threshold import checks
from diffmax.testing.threshold.checks import Case

pytest.importorskip("numba", reason="needs Numba: pip install 'diffmax-core[numba]'")

numba_threads = pytest.importorskip("diffmax.kernels.numba.threads", reason="needs Numba: pip install 'diffmax-core[numba]'")
WIDE = Case(batch=1, heads=4, kv_heads=2, length=300, many=300, head_dim=20, value_dim=24)
CASES = {
    "dense": replace(WIDE, level=0.0),
    "few weights": replace(WIDE, level=2.0, power=2.0),
    "few weights, another power": replace(WIDE, level=1.5, power=1.5),
    "softmax": replace(WIDE, weights="softmax", level=0.004, width=170),
    "softmax, few weights": replace(WIDE, weights="softmax", level=0.06, width=500),
    "softmax below zero": replace(WIDE, weights="softmax", level=-0.01, width=3, seen=0.7),
    "diffmax": replace(WIDE, weights="diffmax", level=0.01, width=170),
    "alpha per head": replace(WIDE, weights="diffmax", level=-0.005, alpha=(0.25, 0.5, 0.75, 0.9), width=170),
    "few queries": replace(WIDE, weights="softmax", length=2, level=0.004, width=170),
    "two sides": replace(WIDE, level=0.1, causal=False, window=(150, 20), seen=0.9),
    "packed": replace(WIDE, weights="softmax", level=0.01, packed=True, width=170),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@pytest.mark.sampled(12)
@every_dtype
@every_case
def test_results_of_several_blocks_pass_the_gate(case, dtype):
    checks.results_pass_the_gate("numba", "cpu", case, dtype)


@pytest.mark.sampled(12)
@every_dtype
@every_case
def test_gradients_of_several_blocks_are_right(case, dtype):
    checks.gradients_are_right_on_average("numba", "cpu", case, dtype)


def leaves_of(heads, length, size=16, dtype=torch.float32):
    return [torch.randn(1, heads, length, size, dtype=dtype, requires_grad=True) for _ in range(3)]


def all_of(leaves, threshold, **options):
    """Output, mass and all gradients."""
    out, mass = diffmax.threshold_attention(*leaves, threshold, return_mass=True, **options)
    given = [t for t in (*leaves, threshold, options.get("bias")) if isinstance(t, torch.Tensor) and t.requires_grad]
    weights = torch.linspace(-1, 1, out.shape[3], dtype=out.dtype)
    return [out.detach(), mass.detach(), *torch.autograd.grad(((out * weights).sum(), mass.sum()), given)]


@pytest.mark.parametrize("weights", ["scores", "softmax", "diffmax"])
def test_blocks_without_a_weight_are_left_out_of_what_others_need(weights):
    """Keys 128 to 255 have no weight, the others nearly all have one."""
    q, k, v = leaves_of(2, 400, dtype=torch.float64)
    with torch.no_grad():
        q[..., 0], k[..., 0] = 16.0, 4.0
        k[:, :, 128:256] *= -1.0
    theta = torch.full((2,), 1e-4, dtype=torch.float64, requires_grad=True)
    options = {"weights": weights, "alpha": 0.5 if weights == "diffmax" else None, "is_causal": False}
    dead = torch.softmax(q @ k.mT / 4, 3)[..., 128:256] if weights == "softmax" else q @ k[:, :, 128:256].mT
    assert dead.max() < 1e-4
    for ours, exact in zip(*(all_of((q, k, v), theta, backend=b, **options) for b in ("numba", "reference")), strict=True):
        assert (ours - exact).abs().max() <= 8 * reordered(400, exact)


@pytest.mark.parametrize("weights", ["scores", "softmax", "diffmax"])
def test_equal_scores_at_their_threshold_have_neither_weight_nor_gradient(weights):
    """Of n equal scores softmax is 1 / n, and lazy attention starts with that threshold: forward and backward round alike."""
    q, k, v = leaves_of(2, 300)
    with torch.no_grad():
        k.zero_()
    theta = 0.0 if weights == "scores" else 1 / torch.arange(1.0, 301.0).expand(2, 300)
    found = all_of((q, k, v), theta, weights=weights, alpha=0.5 if weights == "diffmax" else None, backend="numba")
    if weights != "diffmax":  # whose 1 / n is the solver's
        assert not any(t.any() for t in found)
    for out, mass, *grads in [found]:
        active = mass > 0
        assert mass.abs().max() <= 1e-5
        assert not out[~active].any()
        assert not grads[0][~active].any()


def spied(monkeypatch):
    """The calls that open parallel regions."""
    opened, run_on_threads = [], numba_threads.run_on_threads

    def counted(*arguments):
        opened.append(arguments)
        return run_on_threads(*arguments)

    monkeypatch.setattr(numba_threads, "run_on_threads", counted)
    return opened


@pytest.mark.parametrize(("heads", "weights"), [(4, "softmax"), (1, "softmax"), (4, "scores"), (1, "diffmax")])
def test_a_call_opens_one_parallel_region_and_any_number_of_threads_gives_the_same(heads, weights, monkeypatch):
    """Bit for bit; where threads share a head of keys, its gradients are sums in another order."""
    opened = spied(monkeypatch)
    leaves = leaves_of(heads, 500)
    theta = torch.rand(heads, 500).mul(0.01).requires_grad_()
    bias = torch.randn(heads, 200, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(
                all_of(leaves, theta, weights=weights, alpha=0.5 if weights == "diffmax" else None, bias=bias, backend="numba")
            )
    finally:
        torch.set_num_threads(before)
    assert len(opened) == 4  # forward and backward on two threads, twice
    alone, together, again = found
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    shared = {3, 4} if heads == 1 else set()
    for place, (a, b) in enumerate(zip(alone, together, strict=True)):
        if place in shared or place == 6:
            assert (a - b).abs().max() <= 4 * reordered(500, a)
        else:
            assert torch.equal(a, b)


def test_a_small_call_wakes_no_thread(monkeypatch):
    monkeypatch.delattr(numba_threads, "run_on_threads")
    all_of(leaves_of(2, 16), 0.1, backend="numba")


def test_after_warmup_nothing_is_compiled(monkeypatch):
    from numba.core.dispatcher import Dispatcher

    prepared = diffmax.warmup(head_dims=[16], features=["threshold_softmax"])
    assert prepared.keys() == {"numba"}
    assert prepared["numba"] >= 1
    monkeypatch.setattr(Dispatcher, "compile", lambda *_: pytest.fail("compiles"))
    all_of(leaves_of(2, 40), 0.01, weights="softmax")
