"""Attention and decoding past torch's dispatcher: taken where nobody else has a part in the call, with the same results."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffmax
from diffmax.operators.attention import operator as attention_operator
from diffmax.operators.common import fast_path
from diffmax.operators.common.schema import Schema
from diffmax.operators.decoding import operator as decoding_operator

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C.DispatchKeySet, "raw_repr"), reason="torch 2.4 has no DispatchKeySet.raw_repr, so no call is plain"
)


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(function)]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """The names of the operators that go through torch's dispatcher, as they come."""
    names, called = [], Schema.__call__
    monkeypatch.setattr(Schema, "__call__", lambda schema, *given: names.append(schema.name) or called(schema, *given))
    return names


@pytest.fixture
def by_dispatcher(monkeypatch):
    """Makes every later call one that is not plain."""

    def switch():
        for module in (attention_operator, decoding_operator):
            monkeypatch.setattr(module, "is_plain", lambda *arguments: False)

    return switch


def attend(learned, sink, **options):
    query, key, value = torch.randn(3, 2, 2, 40, 8, generator=torch.Generator().manual_seed(0)).mul(2).unbind()
    alpha = torch.tensor([0.3, 0.6]) if learned else 0.5
    tensors = [query, key, value, *([alpha] if learned else []), *([sink] if sink is not None else [])]
    for t in tensors:
        t.requires_grad_(learned)
    out, stats = diffmax.attention(query, key, value, alpha=alpha, sink=sink, return_stats=True, **options)
    gradients = torch.autograd.grad(out.square().sum(), tensors) if learned else ()
    return [out.detach(), *(t.detach() for t in stats), *gradients]


@pytest.mark.parametrize("learned", [False, True], ids=["no gradient", "gradients"])
@pytest.mark.parametrize("sink", [None, nn.Parameter(torch.zeros(2), requires_grad=False)], ids=["no sink", "sink"])
def test_attention_gives_the_same_bits_without_the_dispatcher(learned, sink, dispatched, by_dispatcher):
    short = attend(learned, sink, is_causal=True)
    assert not dispatched
    by_dispatcher()
    long = attend(learned, sink, is_causal=True)
    assert dispatched == ["attention", *(["attention_backward"] if learned else [])]
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


def decode(k_cache, v_cache):
    query, k, v = torch.randn(3, 2, 1, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    lengths = torch.tensor([3, 20], dtype=torch.int32)
    return diffmax.attention_with_kvcache(
        query, k_cache, v_cache, k, v, cache_seqlens=lengths, alpha=0.5, causal=True, return_softmax_lse=True
    )


def test_decoding_gives_the_same_bits_without_the_dispatcher(dispatched, by_dispatcher):
    caches = torch.randn(2, 2, 30, 2, 8).unbind()
    copies = [cache.clone() for cache in caches]
    short = decode(*caches)
    assert not dispatched
    by_dispatcher()
    long = decode(*copies)
    assert dispatched == ["attention_kvcache"]
    assert all(torch.equal(a, b) for a, b in zip((*short, *caches), (*long, *copies), strict=True))


def test_a_cache_that_a_backward_needs_is_known_to_have_changed(dispatched):
    weight = torch.ones((), requires_grad=True)
    k_cache, v_cache = torch.randn(2, 2, 30, 2, 8).unbind()
    product = weight * k_cache
    with torch.no_grad():
        decode(k_cache, v_cache)
    assert not dispatched
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_decoding_has_no_gradient_on_either_way():
    query = torch.randn(2, 1, 2, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="it has no gradient"):
        diffmax.attention_with_kvcache(query, *torch.randn(2, 2, 30, 2, 8).unbind())


def calls():
    decode(*torch.randn(2, 2, 30, 2, 8).unbind())
    attend(False, None)


def test_modes_and_profilers_still_see_the_operators():
    with Seen() as mode:
        calls()
    assert {"diffmax.attention.default", "diffmax.attention_kvcache.default"} <= {*mode.names}
    with torch.profiler.profile() as profile:
        calls()
    assert {"diffmax::attention", "diffmax::attention_kvcache"} <= {event.name for event in profile.events()}


def test_a_call_is_plain_only_if_all_its_tensors_are():
    plain, negated = torch.ones(2), torch.randn(2, dtype=torch.complex64).conj().imag
    assert fast_path.is_plain(plain, None, 0.5, nn.Parameter(plain))
    for other in (negated, torch.ones(2, device="meta"), torch.nested.nested_tensor([plain], layout=torch.jagged)):
        assert not fast_path.is_plain(plain, other)
    assert torch.vmap(lambda t: t * fast_path.is_plain(t))(plain).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_at_once_have_the_bits_of_the_checked_way(dtype, monkeypatch):
    from diffmax.operators.rows import api

    at_once, taken = api._at_once, []
    monkeypatch.setattr(api, "_at_once", lambda *given: taken.append(at_once(*given)) or taken[-1])
    x = torch.randn(3, 5, 7, dtype=dtype)
    calls = [(x, 0.7), (x, 0.5, 0), (x, 0.9, -2, 3), (x[..., ::2], 0.6), (x[:0], 0.6), (x[0, 0], 0.6)]
    short = [diffmax.diffmax_bisect(*given) for given in calls]
    assert all(weights is not None for weights in taken)
    taken.clear()
    diffmax.diffmax_bisect(x.clone().requires_grad_(), 0.7)
    diffmax.diffmax_bisect(x, 0.7, ensure_sum_one=False)
    diffmax.diffmax_bisect(x[0, 0, 0], 0.7)
    diffmax.diffmax_bisect(x, 0.7, backend="reference")
    with torch.profiler.profile():
        diffmax.diffmax_bisect(x, 0.7)
    assert taken == [None] * 5
    monkeypatch.setattr(api, "_at_once", lambda *given: None)
    assert all(map(torch.equal, short, [diffmax.diffmax_bisect(*given) for given in calls]))
