"""Decoding's Triton kernels under Triton's interpreter: `test_triton_kvcache.py` runs this file with TRITON_INTERPRET=1."""

import pytest
import torch

import diffmax
from diffmax.kernels.triton.decoding import finish
from diffmax.kernels.triton.decoding.launch import Decoder
from diffmax.plugin import FEATURES, Backend
from diffmax.testing.decoding import checks
from diffmax.testing.interpreter import harden, quicken

harden()
quicken()

attention_kvcache = Decoder(lambda device: 6, ptx=False).attention_kvcache

diffmax.register_backend(
    Backend(
        name="triton",
        device_types=("cpu",),
        kernels={"attention_kvcache": f"{__name__}:attention_kvcache"},
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        features=frozenset(FEATURES),
        automatic=False,
    )
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # NumPy, standing in for tl.max
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # Triton 3.6's loops
]

# an interpreter takes milliseconds for a tile: the kit's cases that reach every branch, once; the dtypes are one code
REACH = (
    "more queries than keys",
    "empty and full",
    "pages of 5, chunk",
    "long pages, chunk, window",
    "bounds, softcap, slopes, sink",
    "bounds, negative scale",
    "rows of a larger cache",
    "grouped heads",
    "alpha per head",
    "dense",
    "late start",
    "late start, pages, bounds, window, new token",
)


@pytest.mark.parametrize("name", REACH)
def test_decoding(name):
    checks.decoding_passes_the_gate("triton", "cpu", checks.CASES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["bounds", "pages, new token"])
def test_decoding_of_half_precision(name, dtype):
    checks.decoding_passes_the_gate("triton", "cpu", checks.CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dead_pages_are_not_read(dtype):
    checks.pages_that_cannot_matter_are_not_read("triton", "cpu", dtype)


def test_bad_keys_and_queries():
    checks.bad_keys_and_queries("triton", "cpu", torch.float32)


def test_strided_caches():
    checks.strided_caches("triton", "cpu", torch.float32)


@pytest.mark.parametrize("alpha", [0.3, 0.9, 0.98])
def test_rows_that_neither_lists_nor_the_guess_solve(alpha):
    """Tiles in the middle of a split say nothing of the others: the last program solves alone, exactly."""
    given = checks.inputs(checks.Case(lengths=(600,), room=600, sigma=0.3, alpha=alpha), torch.float32)
    given.k_cache[:, :40] *= 0.01
    given.k_cache[:, 40:] *= torch.linspace(0.01, 12, 560).view(1, -1, 1, 1)
    exact, allowed = checks._gate(given)
    out, stats = given.to("cpu", torch.float32).run("triton", return_stats=True)
    assert (out - exact).abs().max() <= allowed
    wanted = given.to("cpu", torch.float32).run("reference", return_stats=True)[1]
    assert torch.allclose(stats.tau, wanted.tau, rtol=1e-5, atol=1e-5)
    assert (stats.support_size - wanted.support_size).abs().max() <= 2


@pytest.mark.parametrize("heads", [2, 8])
def test_scores_without_outliers_are_solved_on_lists(heads, monkeypatch):
    """A bound from a sample let the lists overflow, and one program solved everything again."""

    def unexpected(*_):
        raise AssertionError("the last launch solves a row")

    monkeypatch.setattr(finish, "weights_of", unexpected)
    given = checks.inputs(checks.Case(lengths=(1100,), room=1100, heads=heads, sigma=1.0, alpha=0.5), torch.float32)
    exact, allowed = checks._gate(given)
    assert (given.to("cpu", torch.float32).run("triton") - exact).abs().max() <= allowed


def test_special_alphas():
    """Every ninth of the kit's."""
    checks.special_alphas_pass_the_gate("triton", "cpu", torch.float32, checks.SPECIAL_ALPHAS[2::9])
