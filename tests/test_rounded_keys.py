"""Keys in 4 bits: what `page_bounds(..., bits=4)` makes of a cache, and decoding that reads single keys by them.

And decoding by boxes of pages, which the same compiled kernel does.
"""

import pytest
import torch

import diffmax
from diffmax import attention_with_kvcache, page_bounds
from diffmax.kernels.cpu import decoding
from diffmax.testing import gates
from diffmax.testing.decoding import checks

inf, nan = torch.inf, torch.nan
backends = pytest.mark.parametrize("backend", ["numba", "cpu"])
both_bounds = pytest.mark.parametrize("bits", [None, 4], ids=["boxes", "4 bits"])


def stands_for(bounds):
    """The keys that the codes stand for, (rows, pages, page_size, H_kv, D), in float64."""
    low, high = (t.double().unsqueeze(-1) for t in (bounds.low, bounds.high))
    halves = torch.cat([bounds.codes & 15, bounds.codes >> 4], -2)[..., : low.shape[-2], :]
    return (low + (high - low) / 15 * halves).movedim(-1, -3)


def agrees(backend, q, k_cache, v_cache, bounds, **options):
    """Whether the call passes the gate with the bounds; its statistics."""
    ((exact, allowed),) = gates(
        lambda q, k, v: attention_with_kvcache(q, k, v, backend="reference", **options), q, k_cache, v_cache
    )
    out, stats = attention_with_kvcache(q, k_cache, v_cache, page_bounds=bounds, return_stats=True, backend=backend, **options)
    assert ((out.double() - exact).abs() <= allowed).all()
    return stats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "page_size"), [(64, 64), (7, 5), (1, 16), (40, 128)])
def test_a_key_is_rounded_to_the_nearest_of_16_values_of_its_page(dtype, size, page_size):
    k_cache = torch.randn(2, 150, 3, size).to(dtype)
    bounds = page_bounds(k_cache, 150, page_size=page_size, bits=4)
    assert bounds.codes.dtype == torch.uint8
    assert bounds.codes.shape == (2, -(-150 // page_size), 3, -(-size // 2), page_size)
    keys = stands_for(bounds).flatten(1, 2)[:, :150]
    step = ((bounds.high.double() - bounds.low.double()) / 15).repeat_interleave(page_size, 1)[:, :150]
    assert ((keys - k_cache.double()).abs() <= step / 2 * (1 + 1e-5) + 1e-12).all()
    ends = keys.unflatten(1, (-1, 5))[:, : 150 // 5] if page_size == 5 else None
    if ends is not None:  # the ends of a page are among the values
        assert torch.allclose(ends.amax(2), bounds.high[:, : 150 // 5].double(), rtol=1e-12)
        assert torch.allclose(ends.amin(2), bounds.low[:, : 150 // 5].double(), rtol=1e-12)
    plain = page_bounds(k_cache, 150, page_size=page_size)
    assert plain.codes is None
    assert torch.equal(plain.low, bounds.low)


def test_codes_take_an_eighth_of_float32_keys():
    k_cache = torch.randn(1, 4096, 2, 64)
    assert page_bounds(k_cache, 4096, bits=4).codes.nbytes * 8 == k_cache.nbytes


def test_a_cache_in_pages_and_a_large_one_are_rounded_as_others(monkeypatch):
    k_cache = torch.randn(2, 64, 2, 8)
    one = page_bounds(k_cache, 64, page_size=16, bits=4)
    pages = page_bounds(k_cache.view(8, 16, 2, 8), 64, torch.arange(8).view(2, 4).int(), bits=4)
    assert torch.equal(one.codes.flatten(0, 1), pages.codes)
    monkeypatch.setattr("diffmax.reference.decoding.ROUNDED", 16 * 16 * 3)
    assert torch.equal(page_bounds(k_cache, 64, page_size=16, bits=4).codes, one.codes)


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [
        (8, ValueError, "bits must be 4 or None, got 8"),
        (0, ValueError, "bits must be 4 or None, got 0"),
        ("4", TypeError, "bits must be 4 or None, got '4' of type str"),
        (True, TypeError, "bits must be 4 or None, got True"),
        (4.0, TypeError, "bits must be 4 or None, got 4.0"),
    ],
)
def test_other_bits_are_refused(bits, error, message):
    with pytest.raises(error, match=message):
        page_bounds(torch.randn(1, 8, 1, 4), 8, bits=bits)


def test_codes_that_are_not_of_the_cache_are_refused():
    q, cache = torch.randn(1, 1, 2, 8), torch.randn(1, 40, 2, 8)
    bounds = page_bounds(cache, 40, page_size=16, bits=4)

    def call(**changed):
        return attention_with_kvcache(q, cache, cache, page_bounds=bounds._replace(**changed))

    with pytest.raises(ValueError, match=r"page_bounds.codes must be \(1, 3, 2, 4, 16\) uint8 cpu, got .*float32"):
        call(codes=bounds.codes.float())
    with pytest.raises(ValueError, match=r"page_bounds.codes must be .*got \(1, 3, 2, 4, 8\)"):
        call(codes=bounds.codes[..., :8].contiguous())
    with pytest.raises(ValueError, match=r"page_bounds.codes must be contiguous"):
        call(codes=bounds.codes.mT.contiguous().mT)
    with pytest.raises(TypeError, match=r"page_bounds.codes must be a tensor, got str"):
        call(codes="4")
    with pytest.raises(TypeError, match=r"page_bounds.low must be a tensor, got NoneType"):
        call(low=None)
    with pytest.raises(TypeError, match=r"page_bounds must be what diffmax.page_bounds returns, got tuple"):
        attention_with_kvcache(q, cache, cache, page_bounds=tuple(bounds)[:2])
    three = attention_with_kvcache(q, cache, cache, page_bounds=tuple(bounds)[:3])  # as it was before there were codes
    torch.testing.assert_close(three, call())


def test_a_backend_without_the_feature_is_not_asked():
    q, cache = torch.randn(1, 1, 1, 8), torch.randn(1, 40, 1, 8)
    kernels = {"attention_kvcache": "diffmax.kernels.cpu.decoding:attention_kvcache"}
    given = {"device_types": ("cpu",), "kernels": kernels, "dtypes": (torch.float32,), "features": frozenset({"kv_cache"})}
    diffmax.register_backend(diffmax.plugin.Backend(name="plain", automatic=False, **given))
    try:
        attention_with_kvcache(q, cache, cache, page_bounds=page_bounds(cache, 40), backend="plain")
        with pytest.raises(diffmax.NoBackendError, match="lacks rounded_keys"):
            attention_with_kvcache(q, cache, cache, page_bounds=page_bounds(cache, 40, bits=4), backend="plain")
    finally:
        diffmax.unregister_backend("plain")


@both_bounds
@backends
@pytest.mark.parametrize("paged", [False, True])
def test_codes_stay_right_while_a_sequence_grows_and_is_cut(bits, backend, paged):
    """Chunks and single tokens, over the ends of pages, with drafts that are rejected: as if the bounds were new each time."""
    torch.manual_seed(3)
    size, room = 8, 64
    k_cache, v_cache = torch.full((2, 1, room, 2, 6), nan).unbind()
    table = None
    if paged:
        k_cache, v_cache = (t.view(8, size, 2, 6) for t in (k_cache, v_cache))
        table = torch.tensor([[3, 0, 7, 5, 1, 2, 6, 4]], dtype=torch.int32)
    bounds = page_bounds(k_cache, 0, table, bits=bits, **({} if paged else {"page_size": size}))
    done = 0
    for chunk, rejected in ((7, 0), (1, 0), (1, 1), (9, 3), (1, 0), (1, 0), (20, 11), (1, 0), (16, 0)):
        q, k, v = torch.randn(3, 1, chunk, 2, 6).unbind()
        k = k * (1 + done % 5)  # bounds move
        options = {"cache_seqlens": done, "causal": True, "alpha": 0.4, "block_table": table, "backend": backend}
        copies = k_cache.clone(), v_cache.clone()
        out = attention_with_kvcache(q, k_cache, v_cache, k, v, page_bounds=bounds, **options)
        torch.testing.assert_close(out, attention_with_kvcache(q, *copies, k, v, **options))
        assert torch.equal(copies[0].nan_to_num(), k_cache.nan_to_num())
        done += chunk
        of_pages = table[0].long() if paged else torch.arange(8)
        low, high = (t.view(8, 2, 6)[of_pages] for t in (bounds.low, bounds.high))
        held = k_cache.view(8, size, 2, 6)[of_pages].flatten(0, 1)[:done].double()
        least, most = (t.repeat_interleave(size, 0)[:done] for t in (low, high))
        assert ((least <= held) & (held <= most)).all()
        if bits is not None:
            codes = bounds.codes.view(8, *bounds.codes.shape[-3:])[of_pages]
            keys = stands_for(diffmax.PageBounds(low, high, size, codes)).flatten(0, 1)[:done]
            step = ((high - low).double() / 15).repeat_interleave(size, 0)[:done]
            assert ((keys - held).abs() <= step / 2 * (1 + 1e-5) + 1e-12).all()
        done -= rejected


@both_bounds
@backends
def test_dense_and_sparse_queries_of_a_key_head_stand_side_by_side(bits, backend):
    """Of four that are taken together some need all keys, and some hardly any."""
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 1, 1000, 1, 16).unbind()
    for factors in ([4.0, 0.01, 4.0, 4.0, 4.0, 0.01], [0.01] * 6, [4.0] * 6):
        q = torch.randn(1, 1, 6, 16) * torch.tensor(factors).view(1, 1, 6, 1)
        stats = agrees(backend, q, k_cache, v_cache, page_bounds(k_cache, 1000, bits=bits), alpha=0.5)
        assert int(stats.pages_read) == 16


@both_bounds
@backends
@pytest.mark.parametrize(
    "spoil",
    [
        lambda k: k.mul_(0),
        lambda k: k.copy_(k[:, :1].expand_as(k)),
        lambda k: k[..., 3].fill_(1e6),
        lambda k: k.mul_(1e-40),
        lambda k: k.mul_(1e15),
        lambda k: k[:, 70].mul_(1e8),
    ],
    ids=["zeros", "equal keys", "a large constant dimension", "subnormal", "large", "an outlier"],
)
def test_odd_caches(bits, backend, spoil):
    torch.manual_seed(1)
    k_cache, v_cache = torch.randn(2, 1, 300, 2, 16).unbind()
    spoil(k_cache)
    q = torch.randn(1, 2, 4, 16)
    agrees(backend, q, k_cache, v_cache, page_bounds(k_cache, 300, bits=bits), alpha=0.6)


@both_bounds
@backends
@pytest.mark.parametrize("value", [nan, inf, -inf, 3e38, -3e38])
def test_keys_that_are_not_finite_or_nearly_so_spoil_what_they_spoil_without_codes(bits, backend, value):
    torch.manual_seed(2)
    k_cache, v_cache = torch.randn(2, 1, 300, 2, 16).unbind()
    k_cache[0, 133, 1, 5] = value
    q = torch.randn(1, 2, 4, 16)
    out = attention_with_kvcache(
        q, k_cache, v_cache, page_bounds=page_bounds(k_cache, 300, bits=bits), alpha=0.6, backend=backend
    )
    plain = attention_with_kvcache(q, k_cache, v_cache, alpha=0.6, backend=backend)
    torch.testing.assert_close(out, plain, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_the_kit_notices_rounded_scores_that_are_too_low(monkeypatch):
    """A key that is left out although it has a weight fails the gate."""
    right = decoding._Head._rated
    monkeypatch.setattr(decoding._Head, "_rated", lambda self: (right(self)[0] - 40.0, right(self)[1]))
    with pytest.raises(AssertionError, match="output: error"):
        checks.decoding_passes_the_gate("cpu", "cpu", checks.CASES["rounded keys"], torch.float32)


def test_the_kit_notices_codes_that_are_not_kept(monkeypatch):
    monkeypatch.setattr("diffmax.reference.decoding._round_again", lambda *_: None)
    with pytest.raises(AssertionError, match=r"are not near their codes|output: error"):
        checks.decoding_passes_the_gate("cpu", "cpu", checks.CASES["rounded keys, new token, pages"], torch.float32)


@both_bounds
def test_bits_do_not_depend_on_threads_or_neighbours(bits):
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 4, 2000, 2, 64).unbind()
    q = torch.randn(4, 1, 8, 64) * 2
    bounds = page_bounds(k_cache, 2000, bits=bits)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(attention_with_kvcache(q, k_cache, v_cache, page_bounds=bounds, alpha=0.5, backend="numba"))
    finally:
        torch.set_num_threads(threads)
    codes = None if bits is None else bounds.codes[2:3]
    own = diffmax.PageBounds(*(t[2:3] for t in (bounds.low, bounds.high)), 64, codes)
    alone = attention_with_kvcache(q[2:3], k_cache[2:3], v_cache[2:3], page_bounds=own, alpha=0.5, backend="numba")
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[0][2:3], alone)


def test_a_compiled_step_keeps_codes():
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 1, 80, 2, 16).unbind()
    caches = k_cache.clone(), v_cache.clone()
    q, k, v = torch.randn(1, 1, 4, 16), *torch.randn(2, 1, 1, 2, 16).unbind()
    ours, theirs = (page_bounds(k_cache, 70, bits=4) for _ in range(2))

    def step(q, k_cache, v_cache, k, v, bounds, lengths):
        return attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, page_bounds=bounds, alpha=0.5)

    lengths = torch.tensor([70], dtype=torch.int32)
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k_cache, v_cache, k, v, ours, lengths)
        plain = step(q, *caches, k, v, theirs, lengths)
    torch.testing.assert_close(compiled, plain)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(k_cache, caches[0])


@both_bounds
@pytest.mark.parametrize(("batch", "length", "heads", "room"), [(0, 1, 2, 9), (2, 0, 2, 9), (2, 1, 0, 9), (2, 1, 2, 0)])
@pytest.mark.parametrize("backend", ["cpu", "numba", "reference"])
def test_empty_tensors(bits, backend, batch, length, heads, room):
    cache = torch.zeros(batch, room, heads, 4)
    bounds = page_bounds(cache, min(room, 3), bits=bits)
    q = torch.randn(batch, length, heads, 4)
    out = attention_with_kvcache(q, cache, cache, cache_seqlens=min(room, 3), page_bounds=bounds, backend=backend)
    assert out.shape == q.shape
    assert not out.any()


def large_constant_keys(seed):
    """Scores that are small beside the products that they are sums of: their rounding is as large as they are."""
    torch.manual_seed(seed)
    q = torch.randn(1, 1, 1, 16) * 100
    q[..., 0] = 3.0
    k_cache = torch.randn(16).expand(1, 2000, 1, 16).clone() * 1e4
    k_cache[0, :, 0, 0] = torch.randn(2000)
    return q, k_cache, torch.randn(1, 2000, 1, 4)


@both_bounds
def test_room_is_left_for_the_rounding_of_scores(bits):
    for seed in range(6):
        q, k_cache, v_cache = large_constant_keys(seed)
        options = {"alpha": 0.5, "softmax_scale": 1.0, "backend": "numba"}
        out = attention_with_kvcache(q, k_cache, v_cache, page_bounds=page_bounds(k_cache, 2000, bits=bits), **options)
        torch.testing.assert_close(out, attention_with_kvcache(q, k_cache, v_cache, **options))


def test_rounded_scores_lie_within_their_error_of_the_keys_own(monkeypatch):
    seen = []

    def compared(head):
        rated, error = head._rated()
        own = head._scores_at(torch.arange(head.end - head.first))
        seen.append(float(((rated - own).abs() / error).max()))
        return right(head)

    right = decoding._Head._keys_that_matter
    monkeypatch.setattr(decoding._Head, "_keys_that_matter", compared)
    for seed in range(6):
        q, k_cache, v_cache = large_constant_keys(seed)
        for keys in (k_cache, torch.randn_like(k_cache)):
            bounds = page_bounds(keys, 2000, bits=4)
            attention_with_kvcache(q, keys, v_cache, page_bounds=bounds, alpha=0.5, softcap=40.0, backend="cpu")
            attention_with_kvcache(q, keys, v_cache, page_bounds=bounds, alpha=0.5, alibi_slopes=torch.ones(1), backend="cpu")
    assert 0.3 < max(seen) <= 1


@both_bounds
@backends
@pytest.mark.parametrize("slope", [nan, inf, -inf])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_slopes_that_are_not_finite(bits, backend, slope, tokens):
    torch.manual_seed(0)
    q, k_cache, v_cache = torch.randn(1, 1, 4, 16) * 3, *torch.randn(2, 1, tokens, 2, 16).unbind()
    options = {"alibi_slopes": torch.tensor([0.1, slope, 0.1, 0.2]), "return_softmax_lse": True}
    bounds = page_bounds(k_cache, tokens, page_size=16, bits=bits)
    ours = attention_with_kvcache(q, k_cache, v_cache, page_bounds=bounds, backend=backend, **options)
    for got, wanted in zip(ours, attention_with_kvcache(q, k_cache, v_cache, backend="reference", **options), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


@backends
@pytest.mark.parametrize("bits", [None, 4, "no bounds"])
@pytest.mark.parametrize(("source", "target"), [(5, 3), (3, 5)])
def test_new_tokens_may_be_views_of_the_cache(backend, bits, source, target):
    torch.manual_seed(0)
    caches = torch.randn(2, 1, 16, 1, 4).unbind()
    results = []
    for name in (backend, "reference"):
        k_cache, v_cache = (t.clone() for t in caches)
        new = [t[:, source : source + 4] for t in (k_cache, v_cache)]
        bounds = None if bits == "no bounds" else page_bounds(k_cache, target, bits=bits)
        q = torch.ones(1, 1, 1, 4)
        out = attention_with_kvcache(q, k_cache, v_cache, *new, cache_seqlens=target, page_bounds=bounds, backend=name)
        results.append((out, k_cache, v_cache))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@backends
@both_bounds
@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_new_tokens_may_be_views_of_the_bounds(backend, bits, what):
    torch.manual_seed(0)
    caches = torch.randn(2, 1, 64, 1, 8).unbind()
    results = []
    for name, is_view in ((backend, True), ("reference", False)):
        k_cache, v_cache = (t.clone() for t in caches)
        bounds = page_bounds(k_cache, 20, page_size=2, bits=bits)
        given = {"q": torch.ones(1, 1, 1, 8), **{key: torch.ones(1, 6, 1, 8) for key in "kv"}}
        # where the pages of the new tokens have their bounds
        given[what] = bounds.low[:, 10:11] if what == "q" else bounds.low[:, 8:14]
        if not is_view:
            given[what] = given[what].clone()
        out = attention_with_kvcache(
            given["q"], k_cache, v_cache, given["k"], given["v"], cache_seqlens=20, page_bounds=bounds, backend=name
        )
        results.append((out, k_cache, v_cache, bounds.low, bounds.high))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bounds_that_are_negated_views_and_pages_without_room_are_refused():
    q, cache = torch.randn(1, 1, 1, 8), torch.randn(1, 40, 1, 8)
    bounds = page_bounds(cache, 40, bits=4)
    with pytest.raises(ValueError, match=r"page_bounds.low must hold its own numbers, got a negated view"):
        attention_with_kvcache(q, cache, cache, page_bounds=bounds._replace(low=torch._neg_view(-bounds.low)))
    empty, table = torch.zeros(3, 0, 1, 8), torch.zeros(1, 2, dtype=torch.int32)
    for call in (lambda: page_bounds(empty, 0, table), lambda: attention_with_kvcache(q, empty, empty, block_table=table)):
        with pytest.raises(ValueError, match=r"the pages of a cache must have room for a token, got shape \(3, 0, 1, 8\)"):
            call()


@backends
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("paged", [False, True])
def test_bounds_that_do_not_know_the_last_key_are_refused(backend, bits, paged):
    """A call that appends without them leaves them behind: what they skip then would be wrong."""
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 2, 128, 2, 16).unbind()
    table, lengths = None, torch.tensor([60, 32], dtype=torch.int32)
    if paged:
        k_cache, v_cache = (t.view(8, 32, 2, 16) for t in (k_cache, v_cache))
        table = torch.arange(8, dtype=torch.int32).view(2, 4)
    bounds = page_bounds(k_cache, lengths, table, bits=bits, **({} if paged else {"page_size": 32}))
    q, k, v = torch.randn(3, 2, 1, 2, 16).unbind()
    options = {"block_table": table, "alpha": 0.5, "backend": backend}
    attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, **options)
    before = k_cache.clone()
    with pytest.raises(ValueError, match=r"do not know the last key of sequence [01]\npass them to every call that appends"):
        attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths + 1, page_bounds=bounds, **options)
    assert torch.equal(k_cache, before)
    attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, page_bounds=bounds, **options)  # as they were


def test_codes_that_were_left_behind_are_refused_though_the_bounds_were_not():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 1, 16).unbind()
    k_cache, v_cache = torch.randn(2, 1, 64, 1, 16).unbind()
    bounds = page_bounds(k_cache, 20, bits=4)
    attention_with_kvcache(q, k_cache, v_cache, 9 * k, v, cache_seqlens=20, page_bounds=tuple(bounds)[:3])
    for backend in ("numba", "cpu"):
        with pytest.raises(ValueError, match="do not know the last key of sequence 0"):
            attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=21, page_bounds=bounds, backend=backend)


@both_bounds
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 8, 15, 64])
@pytest.mark.parametrize("size", [1e6, 1e9, 1e15])
def test_scores_that_are_far_larger_than_their_differences_allow(bits, backend, dtype, page_size, size):
    """There the threshold is the largest score, up to rounding: that key must be read in any case."""
    for _ in range(8):
        q, v_cache = torch.randn(1, 1, 1, 7).to(dtype), torch.randn(1, 40, 1, 3).to(dtype)
        k_cache = (torch.randn(1, 40, 1, 7) * size).to(dtype)
        bounds = page_bounds(k_cache, 40, page_size=page_size, bits=bits)
        agrees(backend, q, k_cache, v_cache, bounds, alpha=0.3)


@both_bounds
@backends
@pytest.mark.parametrize("tokens", [40, 700])
def test_products_that_overflow_are_capped(bits, backend, tokens):
    q, k_cache, v_cache = torch.full((1, 1, 1, 8), 1e25), 0.1 * torch.randn(1, tokens, 1, 8), torch.randn(1, tokens, 1, 5)
    k_cache[:, :10] = -1e25
    k_cache[:, 10:20] = 1e25
    bounds = page_bounds(k_cache, tokens, page_size=16, bits=bits)
    agrees(backend, q, k_cache, v_cache, bounds, alpha=0.99, softcap=1.0)


@both_bounds
@backends
@pytest.mark.parametrize("size", [1e-45, 1e-44, 1e-42, 1e-39])
def test_bounds_of_the_smallest_keys_are_known(bits, backend, size):
    for _ in range(10):
        q, k_cache, v_cache = torch.randn(1, 1, 2, 9), torch.randn(1, 33, 1, 9) * size, torch.randn(1, 33, 1, 4)
        bounds = page_bounds(k_cache, 33, page_size=8, bits=bits)
        agrees(backend, q, k_cache, v_cache, bounds, alpha=0.5)


@both_bounds
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("length", [4, 5, 40])  # of 4 queries to a key: more than 16 together read all keys
def test_chunks_keep_bounds_however_many_queries_they_hold(bits, paged, length):
    torch.manual_seed(5)
    k_cache, v_cache = torch.randn(2, 2, 256, 2, 16).unbind()
    table, more = None, {"page_size": 32}
    if paged:
        k_cache, v_cache = (t.reshape(16, 32, 2, 16) for t in (k_cache, v_cache))
        table, more = torch.randperm(16).view(2, 8).int(), {}
    lengths, pads = torch.tensor([150, 70], dtype=torch.int32), torch.tensor([3, 0], dtype=torch.int32)
    bounds = page_bounds(k_cache, lengths, table, bits=bits, **more)
    q, (k, v) = torch.randn(2, length, 8, 16), torch.randn(2, 2, length, 2, 16).unbind()
    options = {"cache_seqlens": lengths, "block_table": table, "causal": True, "alpha": 0.6}
    if not paged:
        options["cache_leftpad"] = pads
    copies = k_cache.clone(), v_cache.clone()
    expected = attention_with_kvcache(q, *copies, k, v, backend="reference", **options)
    out, stats = attention_with_kvcache(
        q, k_cache, v_cache, k, v, page_bounds=bounds, backend="numba", return_stats=True, **options
    )
    torch.testing.assert_close(out, expected)
    assert torch.equal(k_cache, copies[0])
    assert torch.equal(v_cache, copies[1])
    anew = page_bounds(k_cache, lengths + length, table, bits=bits, **more)
    for b, end in enumerate((lengths + length).tolist()):
        pages = slice(0, -(-end // 32))
        for ours, theirs in zip(bounds[:2], anew[:2], strict=True):
            of_sequence = (t[table[b].long()] if paged else t[b] for t in (ours, theirs))
            torch.testing.assert_close(*(t[pages] for t in of_sequence), rtol=0, atol=0)
    assert (stats.pages_read <= -(-(lengths + length) // 32).unsqueeze(1)).all()
    again = attention_with_kvcache(
        q[:, :1], k_cache, v_cache, page_bounds=bounds, backend="numba", **options | {"cache_seqlens": lengths + length}
    )
    one = attention_with_kvcache(q[:, :1], *copies, backend="reference", **options | {"cache_seqlens": lengths + length})
    torch.testing.assert_close(again, one)


def test_boxes_skip_pages_in_the_compiled_kernel(monkeypatch):
    monkeypatch.setattr(decoding, "_Head", None)  # the way of torch's operators
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 1, 4096, 2, 64).unbind()
    q = torch.randn(1, 1, 4, 64)
    for head in range(2):
        k_cache[0, 1000 + head, head] = 8 * q[0, 0, 2 * head] / q[0, 0, 2 * head].norm() * 8
    q[0, 0, 1::2] = q[0, 0, ::2]
    stats = agrees("numba", q, k_cache, v_cache, page_bounds(k_cache, 4096), alpha=0.5)
    assert (stats.pages_read <= 4).all()
    stats = agrees("numba", 0.1 * q, k_cache, v_cache, page_bounds(k_cache, 4096), alpha=0.9)
    assert (stats.pages_read == 64).all()
