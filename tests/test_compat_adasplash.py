"""diffmax.compat.adasplash: AdaSplash's signatures, entmax's numbers, none of the limits."""

import inspect
import math

import entmax
import pytest
import torch

from diffmax.compat import adasplash as compat

SIGNATURES = {  # of adasplash 0.2.2
    "adasplash": "q, k, v, alpha=1.5, is_causal=True, varlen=None, niter=None",
    "adasplash2": "q, k, v, niter=1, varlen=None",
    "adasplash_v1": "q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10",
    "adasplash_v2": "q, k, v, niter=1, varlen=None",
    "adasplash_no_block_mask": "q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10",
    "triton_entmax": "x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False",
    "triton_entmax_v1": "x, alpha=1.5, n_iter=10, fast_math=True",
    "triton_entmax_v2": "x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False",
    "triton_sparsemax": "x, **kwargs",
    "triton_entmax15": "x, **kwargs",
}


def exact(q, k, v, alpha, is_causal, lengths=None):
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT / math.sqrt(q.shape[3])
    seen = torch.ones(scores.shape, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    if lengths is not None:
        seen = seen & (torch.arange(k.shape[2]) < lengths.view(-1, 1, 1, 1))
    p = entmax.entmax_bisect(scores.masked_fill(~seen, -1e6), alpha, n_iter=100)
    out = p @ v.repeat_interleave(group, 1)
    return out if lengths is None else out * (torch.arange(q.shape[2]).view(-1, 1) < lengths.view(-1, 1, 1, 1))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_adasplashs(name):
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    assert ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters) == SIGNATURES[name]
    assert set(compat.__all__) == {*SIGNATURES, "LazyAttention", "lazy_attention_triton"}


@pytest.mark.parametrize("alpha", [1.05, 1.333, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("varlen", [None, torch.tensor([50, 7])])
def test_agrees_with_entmax_forward_and_backward(alpha, is_causal, varlen):
    q, k, v = (torch.randn(2, heads, 50, 24, dtype=torch.float64).mul(2).requires_grad_() for heads in (4, 2, 2))
    ours, theirs = compat.adasplash(q, k, v, alpha, is_causal, varlen), exact(q, k, v, alpha, is_causal, varlen)
    assert (ours - theirs).abs().max() < 1e-10
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), grad) for o in (ours, theirs)), strict=True):
        assert (a - b).abs().max() < 1e-8


def test_the_variants_are_the_dispatcher_with_their_defaults():
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    assert torch.equal(compat.adasplash_v2(q, k, v), compat.adasplash(q, k, v))
    assert torch.equal(compat.adasplash_v1(q, k, v, 1.7), compat.adasplash(q, k, v, 1.7, is_causal=False))
    assert torch.equal(compat.adasplash_no_block_mask(q, k, v), compat.adasplash_v1(q, k, v))


def test_alpha_per_head_has_a_gradient():
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    alpha = torch.tensor([1.2, 1.8], requires_grad=True)
    compat.adasplash(q, k, v, alpha).square().sum().backward()
    assert (alpha.grad != 0).all()


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_rows_agree_with_entmax(alpha):
    x = torch.randn(5, 300, dtype=torch.float64) * 5
    exact_rows = entmax.entmax_bisect(x, alpha, n_iter=100)
    for function in (compat.triton_entmax, compat.triton_entmax_v1, compat.triton_entmax_v2):
        assert (function(x, alpha) - exact_rows).abs().max() < 1e-12
    assert torch.equal(compat.triton_sparsemax(x, n_iter=3), compat.triton_entmax(x, 2.0))
    assert torch.equal(compat.triton_entmax15(x), compat.triton_entmax(x, 1.5))


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, r"alpha must lie in \(1, 2\], got 0.5", {"alpha": 0.5}),
        (TypeError, "alpha must be a float or a tensor, got 'x'", {"alpha": "x"}),
        (ValueError, r"varlen must be int32 or int64 of shape \(1,\).*got \(2,\) int64", {"varlen": torch.tensor([1, 2])}),
        (ValueError, r"varlen must be int32 or int64 of shape \(1,\).*got list", {"varlen": [3]}),
        (ValueError, r"varlen must lie between 0 and the sequences' length, 4, got \[5\]", {"varlen": torch.tensor([5])}),
        (ValueError, r"alpha must lie in \[1, 2\], got values from 0.5 to 0.5", {"alpha": torch.tensor(0.5)}),
    ],
)
def test_says_what_is_wrong(error, words, arguments):
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(error, match=words):
        compat.adasplash(x, x, x, **arguments)


def test_says_what_is_wrong_in_its_own_name():
    with pytest.raises(TypeError, match=r"adasplash: query must be a torch.Tensor, got list"):
        compat.adasplash([1.0], torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(TypeError, match="triton_entmax: X must be float16"):
        compat.triton_entmax(torch.ones(3, dtype=torch.int64))


def test_padding_may_hold_anything():
    x = torch.randn(2, 1, 9, 4)
    varlen = torch.tensor([9, 5])
    expected = compat.adasplash(x, x, x, varlen=varlen)
    x[1, :, 5:] = torch.nan
    x.requires_grad_()
    out = compat.adasplash(x, x, x, varlen=varlen)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1, :, 5:].any()
