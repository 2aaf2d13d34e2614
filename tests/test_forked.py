"""Every public call in a forked child, where no thread of OpenMP is left: none may be waited for."""

import json
import os

import pytest

from tests import fresh

# Inputs and what autograd starts from are made before the fork: torch's own operators wait for ever in the child.
CALLS = """
import diffmax, torch
from diffmax.compat import adasplash, entmax, flash_attn
torch.set_num_threads(2)
torch.manual_seed(0)
rows, target = torch.randn(64, 2048, requires_grad=True), torch.arange(64)
soft, weight, alphas = torch.softmax(torch.randn(64, 2048), -1), torch.rand(2048), torch.full((64, 1), 0.6, requires_grad=True)
query, tau = torch.randn(2, 4, 256, 64, requires_grad=True), torch.full((4,), 0.1)
key, value, bias = torch.randn(2, 4, 256, 64), torch.randn(2, 4, 256, 64), torch.randn(2, 4, 256, 256, requires_grad=True)
packed, ends = torch.randn(1024, 4, 64, requires_grad=True), torch.tensor([0, 500, 1024], dtype=torch.int32)
tokens, cache = torch.randn(4, 512, 4, 32, requires_grad=True), torch.randn(4, 2048, 4, 32)
one, bounds, lengths = torch.randn(4, 1, 4, 32), diffmax.page_bounds(cache, 2000), torch.full((4,), 2000, dtype=torch.int32)
per_head, decay = torch.full((4,), 0.6, requires_grad=True), -torch.rand(4, 512, 4)
starts, logged = {}, []

def slope(out, of):
    if out.shape not in starts:
        starts[out.shape] = torch.ones(out.shape)
    return torch.autograd.grad(out, of, starts[out.shape])[0]

def attention(**options):
    return diffmax.attention(query, key, value, **options)

calls = {
    "rows": lambda: slope(diffmax.diffmax_bisect(rows, 0.5), rows),
    "rows along another dimension": lambda: slope(diffmax.diffmax_bisect(rows, 0.5, dim=0), rows),
    "rows, learned alpha": lambda: slope(diffmax.diffmax_bisect(rows, alphas), alphas),
    "rows, logged": lambda: diffmax.diffmax_bisect_monitored(rows, 0.5, step=0, log=lambda metrics, step: logged.append(step)),
    "loss": lambda: slope(diffmax.diffmax_loss(rows, target, 0.5), rows),
    "loss, weights": lambda: slope(diffmax.diffmax_loss(rows, target, alphas, weight=weight, reduction="none"), alphas),
    "loss, probabilities": lambda: slope(diffmax.diffmax_loss(rows, soft, 0.5), rows),
    "entmax": lambda: slope(entmax.entmax15(rows), rows),
    "entmax, alpha above 2": lambda: entmax.entmax_bisect(rows, 3.0),
    "entmax's loss": lambda: slope(entmax.entmax15_loss(rows, target), rows),
    "normmax": lambda: slope(entmax.normmax_bisect(rows, 2), rows),
    "normmax's loss": lambda: slope(entmax.normmax_bisect_loss(rows, target), rows),
    "budget": lambda: slope(entmax.budget_bisect(rows, 4), rows),
    "attention": lambda: slope(attention(alpha=0.5, is_causal=True), query),
    "attention, bias": lambda: slope(attention(alpha=0.5, attn_mask=bias), bias),
    "attention, learned alpha": lambda: slope(attention(alpha=per_head, softcap=5.0, alibi_slopes=tau), per_head),
    "attention, stats": lambda: attention(alpha=0.5, return_stats=True)[1].tau,
    "attention, weights": lambda: attention(alpha=0.5, return_weights="sparse")[0],
    "attention, packed": lambda: slope(
        diffmax.attention_varlen(packed, packed.detach(), packed.detach(), ends, ends, 524, 524, alpha=0.5), packed
    ),
    "adasplash": lambda: adasplash.adasplash(query, key, value),
    "flash_attn": lambda: flash_attn.flash_attn_func(tokens, tokens, tokens, alpha=0.5),
    "flash_attn, stats": lambda: flash_attn.flash_attn_func(tokens, tokens, tokens, alpha=0.5, return_attn_probs=True)[0],
    "flash_attn, packed": lambda: flash_attn.flash_attn_varlen_func(packed, packed, packed, ends, ends, 524, 524, alpha=0.5),
    "flash_attn, decoding": lambda: flash_attn.flash_attn_with_kvcache(one, cache, cache, cache_seqlens=lengths, alpha=0.5),
    "decoding": lambda: diffmax.attention_with_kvcache(one, cache, cache, alpha=0.5),
    "decoding, many queries": lambda: diffmax.attention_with_kvcache(tokens.detach(), cache, cache, alpha=0.5),
    "decoding, page bounds": lambda: diffmax.attention_with_kvcache(
        one, cache, cache, alpha=0.5, cache_seqlens=lengths, page_bounds=bounds
    ),
    "page bounds": lambda: diffmax.page_bounds(cache, 2000).low,
    "page bounds, 4 bits": lambda: diffmax.page_bounds(cache, 2000, bits=4).low,
    "power": lambda: slope(diffmax.power_attention(tokens, tokens.detach(), tokens.detach(), decay), tokens),
    "threshold": lambda: slope(diffmax.threshold_attention(query, key, value, tau), query),
    "lazy": lambda: slope(diffmax.lazy_attention(query, key, value, torch.zeros(4, 256), tau), query),
    "lazy, packed": lambda: slope(
        diffmax.lazy_attention_varlen(packed, packed.detach(), packed.detach(), torch.zeros(4, 64), tau, ends, ends, 524, 524),
        packed,
    ),
    "rectified": lambda: diffmax.threshold_rectified_attention(query, key, value, 0.5),
    "differential": lambda: diffmax.threshold_differential_attention(query, key, key, query, value, 0.5, 0.5),
    "hybrid cache": lambda: diffmax.HybridCache(64).attend(tokens.detach(), tokens.detach(), tokens.detach()),
}
"""
FORK = """
import json, os, signal
faults = {}
for name, call in calls.items():
    expected = call().detach()
    torch.ones(2000, 2000).sin()  # torch's threads run
    child = os.fork()
    if not child:
        signal.alarm(20)
        found = call().detach()
        torch.set_num_threads(1)
        os._exit(0 if torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True) else 1)
    status = os.waitpid(child, 0)[1]
    if status:
        faults[name] = status
print(json.dumps(faults))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes, such as Linux")
def test_every_public_call_ends_in_a_forked_child():
    assert json.loads(fresh.python(CALLS + FORK).stdout) == {}


def test_no_operator_of_the_public_ones_is_left_out():
    import diffmax

    operators = [name for name in diffmax.__all__ if getattr(diffmax, name).__module__.startswith("diffmax.operators")]
    missing = [name for name in operators if f"diffmax.{name}(" not in CALLS]
    assert missing == ["DiffmaxLoss", "PowerState", "threshold_attention_varlen"]  # the loss's module, no call, and as lazy
