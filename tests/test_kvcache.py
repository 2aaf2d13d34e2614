"""Decoding over a cache: the reference against entmax, the public function's checks, page bounds, compiled code."""

import itertools
import math

import pytest
import torch
from entmax import entmax_bisect
from torch.autograd import forward_ad

import diffmax
from diffmax import attention_with_kvcache, page_bounds
from diffmax.operators.decoding import checks as decoding_checks
from diffmax.operators.decoding.operator import SCHEMA
from diffmax.plugin import KVCacheCall
from diffmax.testing.decoding import checks
from diffmax.testing.decoding.checks import CASES, Case

inf = torch.inf
BACKENDS = ("cpu", "numba", "reference")


def by_entmax(case, given):
    """The output of every query on its own, from entmax's weights."""
    q, options, table = given.q, case.options, given.keywords.get("block_table")
    rows = given.keywords.get("cache_batch_idx", range(len(case.lengths)))
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    alphas = case.alpha if isinstance(case.alpha, tuple) else (case.alpha,) * case.heads
    out = torch.zeros(*q.shape[:3], given.v_cache.shape[3], dtype=q.dtype)
    for b, i, h in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        held = []
        for cache, new in ((given.k_cache, given.k), (given.v_cache, given.v)):
            before = int(given.keywords["cache_seqlens"][b])
            if table is None:
                t = cache[int(rows[b]), :before]
            else:
                pages = -(-before // case.page_size)
                t = cache[table[b, :pages].long()].flatten(0, 1)[:before]
            held.append(torch.cat([t, new[b]]) if new is not None else t)
        g = h // (case.heads // case.kv_heads)
        key, value = held[0][:, g], held[1][:, g]
        scores = key @ q[b, i, h] * options.get("softmax_scale", case.head_dim**-0.5)
        if "softcap" in options:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        away = torch.arange(len(key)) - (len(key) - q.shape[1] + i)
        if case.slopes:
            scores = scores - given.keywords["alibi_slopes"][b, h].to(q.dtype) * away.abs()
        seen = (away >= -left if left >= 0 else away == away) & (away <= right if right >= 0 else away == away)
        seen = seen & (torch.arange(len(key)) >= (case.leftpad or (0,) * q.shape[0])[b])
        scores, value = scores[seen], value[seen]
        if case.sink:
            scores = torch.cat([scores, given.keywords["sink"][h : h + 1].to(q.dtype)])
            value = torch.cat([value, torch.zeros_like(given.v_cache[0, :1, 0])])
        if len(scores):
            alpha = alphas[h]
            p = scores.softmax(0) if alpha == 1 else entmax_bisect(scores, 2 - alpha, n_iter=200)
            out[b, i, h] = p @ value
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def test_the_reference_agrees_with_entmax(case):
    given = checks.inputs(case, torch.float64)
    exact = by_entmax(case, given)
    assert (given.run("reference") - exact).abs().max() <= 2e-12 * max(1.0, float(exact.abs().max()))


def test_one_sequence_equals_attention():
    q, k, v = torch.randn(3, 2, 3, 90, 16).double()
    exact = diffmax.attention(q[:, :, -7:], k, v, is_causal=True, causal_alignment="lower_right", alpha=0.6)
    rows = [t.transpose(1, 2).contiguous() for t in (q[:, :, -7:], k, v)]
    ours = attention_with_kvcache(*rows, causal=True, alpha=0.6, backend="reference")
    assert torch.allclose(ours.transpose(1, 2), exact, atol=1e-13)


def test_bounds_are_the_pages_extremes():
    k_cache = torch.randn(2, 70, 3, 4)
    k_cache[1, 9:] = torch.nan
    bounds = page_bounds(k_cache, torch.tensor([70, 9]), page_size=8)
    assert bounds.low.shape == (2, 9, 3, 4)
    assert torch.equal(bounds.low[0, 8], k_cache[0, 64:].amin(0))
    assert torch.equal(bounds.high[1, 1], k_cache[1, 8])
    assert (bounds.high[1, 2:] == 0).all()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_bounds_of_a_page_that_sequences_share_are_those_of_all_its_keys(order):
    """A prefix in common: the one sequence ends inside of a page that the other fills."""
    k_cache, v_cache = torch.randn(40, 16, 1, 8) * 0.1, torch.randn(40, 16, 1, 8)
    k_cache[5, 12], k_cache[20, 3] = 9.0, 8.0
    table, ends = torch.arange(40).repeat(2, 1).int(), torch.tensor([640, 5 * 16 + 4], dtype=torch.int32)[order]
    bounds = page_bounds(k_cache, ends, table)
    assert torch.equal(bounds.high, k_cache.amax(1))
    assert torch.equal(bounds.low, k_cache.amin(1))
    q, options = torch.ones(2, 1, 1, 8), {"cache_seqlens": ends, "block_table": table, "alpha": 0.5}
    out, stats = attention_with_kvcache(q, k_cache, v_cache, page_bounds=bounds, return_stats=True, **options)
    torch.testing.assert_close(out, attention_with_kvcache(q, k_cache, v_cache, **options))
    assert int(stats.pages_read[order.index(0)]) < 40


def test_a_page_that_was_never_given_is_not_written_to():
    cache, q = torch.randn(6, 4, 1, 8), torch.randn(1, 1, 1, 8)
    before, table = cache.clone(), torch.tensor([[3, -1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="got -1\ngive a sequence its pages before its tokens"):
        attention_with_kvcache(q, cache, cache.clone(), q, q, block_table=table, cache_seqlens=4)
    assert torch.equal(cache, before)
    attention_with_kvcache(q, cache, cache.clone(), q, q, block_table=table, cache_seqlens=3)
    with pytest.raises(ValueError, match="block_table must have pages from 0 to 5"):
        page_bounds(cache, 8, torch.tensor([[3, 99]], dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "length", "heads", "room"), [(0, 1, 2, 9), (2, 0, 2, 9), (2, 1, 0, 9), (2, 1, 2, 0)])
def test_empty_tensors(backend, batch, length, heads, room):
    cache = torch.zeros(batch, room, heads, 4)
    slopes = torch.ones(heads)
    q = torch.randn(batch, length, heads, 4)
    out = attention_with_kvcache(q, cache, cache, cache_seqlens=min(room, 3), alibi_slopes=slopes, backend=backend)
    assert out.shape == q.shape
    assert not out.any()


def test_forward_mode_is_refused_not_lost():
    q, cache = torch.randn(1, 1, 2, 4), torch.randn(1, 9, 2, 4)
    with pytest.raises(NotImplementedError, match="it has no gradient"):
        torch.func.jvp(lambda q: attention_with_kvcache(q, cache, cache), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="it has no gradient"):
        attention_with_kvcache(forward_ad.make_dual(q, q), cache, cache)
    with pytest.raises(RuntimeError, match=r"torch.vmap cannot batch it|Batching rule not implemented"):
        torch.vmap(lambda q: attention_with_kvcache(q, cache, cache))(torch.stack([q, q]))


def test_a_shorter_sequence_needs_no_new_bounds():
    """A draft's tokens are thrown away: bounds that are too wide stay right, and a page that is begun again starts afresh."""
    given = checks.inputs(Case(lengths=(100,), room=128, bounds=16, new=20), torch.float64)
    given.run("cpu")
    for again in (97, 81, 79):
        given.keywords["cache_seqlens"] = torch.tensor([again], dtype=torch.int32)
        exact = given.to("cpu", torch.float64).run("reference", page_bounds=None)
        assert torch.allclose(given.run("cpu"), exact, atol=1e-13)
    wanted = page_bounds(given.k_cache, 99, page_size=16)
    assert torch.equal(given.bounds.low[0, 5:7], wanted.low[0, 5:7])


def test_a_length_may_be_an_int_or_left_out():
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 2, 30, 2, 8)
    by_tensor = attention_with_kvcache(q, *cache, cache_seqlens=torch.tensor([30, 30]))
    assert torch.equal(attention_with_kvcache(q, *cache, cache_seqlens=30), by_tensor)
    assert torch.equal(attention_with_kvcache(q, *cache), by_tensor)


def test_autocast_converts_new_tokens_to_the_caches_dtype():
    q, k, v = torch.randn(3, 1, 1, 2, 8).unbind()
    cache = torch.zeros(2, 1, 30, 2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_with_kvcache(q, *cache, k, v, cache_seqlens=3).dtype == torch.bfloat16


def test_no_gradient_is_refused_not_forgotten():
    q, cache = torch.randn(1, 1, 2, 8, requires_grad=True), torch.randn(2, 1, 30, 2, 8)
    with pytest.raises(NotImplementedError, match="it has no gradient, and an argument requires one"):
        attention_with_kvcache(q, *cache)
    lengths = torch.tensor([3], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="it has no gradient"):
        SCHEMA(q, *cache, False, KVCacheCall(scale=0.3, e=0.5, cache_seqlens=lengths))
    with torch.no_grad():
        assert not attention_with_kvcache(q, *cache).requires_grad
    with torch.inference_mode():
        assert attention_with_kvcache(q, *cache.clone(), q.detach(), q.detach(), cache_seqlens=3).shape == q.shape


def test_an_append_is_seen_by_autograd_as_a_change():
    """What a backward saved of a cache may not be used after the call has written to it."""
    cache = torch.randn(2, 1, 30, 2, 8)
    factor = torch.ones((), requires_grad=True)
    product = (factor * cache[0]).sum()
    new = torch.randn(1, 1, 2, 8)
    attention_with_kvcache(new, cache[0], cache[1], new, new, cache_seqlens=3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_what_does_not_fit_on_an_accelerator_is_dropped():
    """Where lengths are not looked at, tokens behind the cache's end are neither written nor seen."""
    from diffmax.plugin import KVCacheCall
    from diffmax.reference.decoding import append

    k_cache, v_cache, k = torch.zeros(2, 10, 1, 4), torch.zeros(2, 10, 1, 4), torch.ones(2, 4, 1, 4)
    append(k_cache, v_cache, KVCacheCall(scale=1.0, e=0.5, cache_seqlens=torch.tensor([8, 12]), k=k, v=k))
    assert k_cache.sum() == 8
    assert k_cache[0, 8:].eq(1).all()


q4, cache4 = torch.zeros(2, 1, 4, 8), torch.zeros(2, 30, 2, 8)
new4, table4 = torch.zeros(2, 1, 2, 8), torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (([1], cache4, cache4), {}, TypeError, "q must be a torch.Tensor, got list"),
        ((q4.int(), cache4, cache4), {}, TypeError, "q must be float16, .* got int32"),
        ((q4[0], cache4, cache4), {}, ValueError, "q must have 4 dimensions .* got shape"),
        ((q4.double(), cache4, cache4), {}, TypeError, "must have one dtype, got\n"),
        ((q4[..., :7], cache4, cache4), {}, ValueError, "the same head size, at least 1, got 7 and 8"),
        ((q4[:, :, :3], cache4, cache4), {}, ValueError, "a multiple of the key heads, got 3 and 2"),
        ((q4, cache4, cache4[:, :9]), {}, ValueError, "the same batch, tokens and heads"),
        ((q4, cache4, cache4, new4), {}, ValueError, "together or not at all, got k alone"),
        ((q4, cache4, cache4 + 0, new4, new4[:, :, :1]), {}, ValueError, "v must have shape"),
        ((q4, cache4, cache4, new4, new4), {}, ValueError, "must be two tensors where k and v are appended"),
        ((q4, cache4[:1], cache4[:1]), {}, ValueError, "a row for each sequence, got 1 for 2"),
        (
            (q4, cache4, cache4),
            {"cache_seqlens": 31},
            ValueError,
            r"fit into the cache's 30 tokens, got 31\nmake the caches longer",
        ),
        ((q4, cache4, cache4), {"cache_seqlens": -1}, ValueError, "at least 0"),
        ((q4, cache4, cache4 + 0, new4, new4), {"cache_seqlens": 30}, ValueError, "fit with 1 new ones"),
        ((q4, cache4, cache4 + 0, new4, new4), {"cache_seqlens": None}, ValueError, "with k and v, cache_seqlens must say"),
        ((q4, cache4[:1].expand(2, -1, -1, -1), cache4, new4, new4), {"cache_seqlens": 3}, ValueError, "its own memory"),
        ((q4, (cache4 * 1j).conj().imag, cache4), {}, ValueError, "k_cache must not be a negated view"),
        ((q4, cache4, cache4), {"block_table": table4 + 2}, ValueError, "pages from 0 to 1 up to each sequence's end, got 2"),
        ((q4, cache4, cache4), {"block_table": table4 - 1, "cache_seqlens": 31}, ValueError, "got -1"),
        ((q4, cache4, cache4), {"cache_seqlens": 1.0}, TypeError, "an int or an int32 tensor, got float"),
        ((q4, cache4, cache4), {"cache_seqlens": torch.zeros(2)}, TypeError, "must be an int32 tensor, got float32"),
        ((q4, cache4, cache4), {"cache_seqlens": torch.zeros(3).int()}, ValueError, r"must have shape \(2,\), got \(3,\)"),
        ((q4, cache4, cache4), {"cache_batch_idx": torch.tensor([0, 5])}, ValueError, "between 0 and 1, got 0 to 5"),
        ((q4, cache4, cache4), {"cache_batch_idx": torch.tensor([1, 1])}, ValueError, "no row twice"),
        ((q4, cache4, cache4), {"cache_batch_idx": 3}, TypeError, "cache_batch_idx must be an int32 tensor, got int"),
        ((q4, cache4, cache4), {"cache_batch_idx": table4[:, 0], "block_table": table4}, ValueError, "exclude each other"),
        ((q4, cache4, cache4), {"block_table": table4[0]}, ValueError, r"block_table must have shape \(2, pages\)"),
        ((q4, cache4, cache4), {"block_table": 5}, TypeError, "block_table must be an int32 tensor, got int"),
        ((q4, cache4, cache4), {"page_bounds": 5}, TypeError, "what diffmax.page_bounds returns, got int"),
        ((q4, cache4, cache4), {"page_bounds": page_bounds(cache4[:1], 30)}, ValueError, "page_bounds.low must be"),
        ((q4, cache4, cache4), {"page_bounds": page_bounds(cache4, 3), "block_table": table4}, ValueError, "the pages' size"),
        (
            (q4, cache4, cache4),
            {"page_bounds": page_bounds(cache4, 30)._replace(low=torch.zeros(8, 2, 2, 1).movedim(3, 1).mT)},
            ValueError,
            "page_bounds.low must be",
        ),
        (
            (q4, cache4, cache4),
            {"page_bounds": page_bounds(cache4, 30)._replace(high=torch.zeros(8, 2, 1, 2).permute(3, 2, 1, 0))},
            ValueError,
            "page_bounds.high must be contiguous",
        ),
        ((q4, cache4, cache4), {"softcap": -1.0}, ValueError, "softcap must be positive"),
        ((q4, cache4, cache4), {"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes must"),
        ((q4, cache4, cache4), {"sink": torch.zeros(3)}, ValueError, "sink must"),
        ((q4, cache4, cache4), {"alpha": 1.5}, ValueError, "alpha must lie strictly between 0 and 1"),
        ((q4, cache4, cache4), {"window_size": 3}, TypeError, "window_size must be a pair"),
        ((q4, cache4, cache4), {"softmax_scale": "1"}, TypeError, "scale must be a float"),
    ],
)
def test_bad_arguments(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        attention_with_kvcache(*arguments, **keywords)


@pytest.mark.parametrize(("page_size", "error"), [(0, ValueError), (2.5, TypeError)])
def test_bad_page_sizes(page_size, error):
    with pytest.raises(error, match="page_size must be"):
        page_bounds(cache4, 3, page_size=page_size)


def test_a_page_is_no_longer_than_the_cache():
    """A page of 10**12 tokens asked for 16 terabytes."""
    cache = torch.randn(1, 100, 2, 8)
    bounds, whole = (page_bounds(cache, 90, page_size=size, bits=4) for size in (10**12, 100))
    torch.testing.assert_close(bounds[:2] + bounds[3:], whole[:2] + whole[3:], rtol=0, atol=0)
    assert (bounds.page_size, page_bounds(cache[:, :20], 5, page_size=10**12).page_size) == (100, 64)


def test_pages_of_a_cache_have_one_size():
    """Another one was ignored in silence."""
    size = cache4.shape[1]
    with pytest.raises(ValueError, match=f"page_size must be that of the cache's pages, {size}, got {size + 1}\nleave it out"):
        page_bounds(cache4, 3, table4, page_size=size + 1)
    assert page_bounds(cache4, 3, table4, page_size=size).page_size == page_bounds(cache4, 3, table4).page_size == size


@pytest.mark.parametrize("tokens", [100, 128])
@pytest.mark.parametrize("paged", [False, True])
def test_bounds_of_a_cache_whose_heads_come_first_in_memory(tokens, paged):
    apart = torch.randn(2, 4, tokens, 8).transpose(1, 2)
    table = torch.arange(2, dtype=torch.int32).view(1, 2) if paged else None
    lengths = torch.tensor([tokens + 10], dtype=torch.int32) if paged else torch.tensor([10, tokens], dtype=torch.int32)
    found, expected = (diffmax.page_bounds(t, lengths, table) for t in (apart, apart.contiguous()))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("query", [(1, 1, 4, 4), (1, 4, 1, 4)])
def test_heads_before_tokens_are_refused_with_advice(query):
    x = torch.zeros(1, 2, 6, 4)
    with pytest.raises(ValueError, match=r"tokens come before heads in q and in the caches[^\n]*: transpose\(1, 2\)"):
        diffmax.attention_with_kvcache(torch.zeros(query), x, x)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("place", [7, 10**8, -1])
@pytest.mark.parametrize("name", ["block_table", "cache_batch_idx"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_or_row_that_is_not_there_is_refused_where_the_checks_cannot_look(backend, name, place, bits):
    q, (k, v) = torch.randn(1, 1, 2, 16), torch.randn(2, 4, 16, 2, 16).unbind()
    paged = name == "block_table"
    lengths = torch.tensor([20 if paged else 9], dtype=torch.int32)
    good = {"block_table": torch.tensor([[0, 3]], dtype=torch.int32)} if paged else {"page_size": 16}
    bounds = None if bits is None else diffmax.page_bounds(k, lengths if paged else lengths.repeat(4), bits=bits, **good)

    @torch.compile(backend="eager")
    def attend(places):
        more = {name: places} | ({} if bounds is None else {"page_bounds": bounds})
        return diffmax.attention_with_kvcache(q, k, v, cache_seqlens=lengths, backend=backend, **more)

    said = (
        f"pages from 0 to 3 up to each sequence's end, got {place}" if paged else f"lie between 0 and 3, got {place} to {place}"
    )
    with pytest.raises(ValueError, match=said):
        attend(torch.tensor([[0, place] if paged else place], dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("held", [16, 40, -1])
def test_a_length_that_does_not_fit_is_refused_where_the_checks_cannot_look(backend, held):
    q, (k, v), (new_k, new_v) = (
        torch.randn(1, 1, 2, 16),
        torch.randn(2, 1, 16, 2, 16).unbind(),
        torch.randn(2, 1, 1, 2, 16).unbind(),
    )

    @torch.compile(backend="eager")
    def attend(lengths):
        return diffmax.attention_with_kvcache(q, k, v, new_k, new_v, cache_seqlens=lengths, backend=backend)

    before = k.clone()
    with pytest.raises(
        ValueError, match=f"cache_seqlens must be at least 0, and fit with 1 new ones into .* 16 tokens, got {held}"
    ):
        attend(torch.tensor([held], dtype=torch.int32))
    assert torch.equal(k, before)


NEW = {
    "slots, keys and values exchanged": lambda k_cache, v_cache: (v_cache[:, 5:7], k_cache[:, 5:7]),
    "tokens moved by one": lambda k_cache, v_cache: (k_cache[:, 4:6], v_cache[:, 4:6]),
    "values of the key cache": lambda k_cache, v_cache: (torch.randn(1, 2, 2, 8), k_cache[:, 5:7]),
    "others": lambda k_cache, v_cache: torch.randn(2, 1, 2, 2, 8).unbind(),
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_new_tokens_and_queries_may_be_views_of_the_caches(backend, new, bits):
    """The keys were written before values and queries that lay in their slots were read."""
    caches = torch.randn(2, 1, 20, 2, 8)
    apart = caches.clone()
    q, (k, v) = caches[0][:, 5:7], NEW[new](*caches)
    bounds = [page_bounds(of[0], 5, page_size=4, bits=bits) for of in (caches, apart)]
    expected = attention_with_kvcache(
        q.clone(), *apart, k.clone(), v.clone(), cache_seqlens=5, page_bounds=bounds[1], backend=backend
    )
    given = attention_with_kvcache(q, *caches, k, v, cache_seqlens=5, page_bounds=bounds[0], backend=backend)
    torch.testing.assert_close((given, caches), (expected, apart), rtol=0, atol=0)


def appended(k_cache, v_cache, length=5, new=2, **keywords):
    batch = len(keywords["block_table"]) if "block_table" in keywords else k_cache.shape[0]
    heads = k_cache.shape[2]
    q, k, v = (torch.randn(batch, new, heads, size) for size in (k_cache.shape[3], k_cache.shape[3], v_cache.shape[3]))
    attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=length, **keywords)
    return k, v


def test_caches_that_overlap_are_refused_where_tokens_are_appended():
    """A token that was written to one of them changed others."""
    tokens = torch.randn(1, 21, 1, 8)
    with pytest.raises(ValueError, match="k_cache and v_cache must not overlap where k and v are appended"):
        appended(tokens[:, :20], tokens[:, 1:])
    with pytest.raises(ValueError, match="k_cache and v_cache must not overlap"):
        appended(tokens, tokens[..., 4:])
    with pytest.raises(ValueError, match=r"v_cache must have its own memory .*, got one that overlaps itself, of strides"):
        appended(torch.randn(1, 20, 1, 8), torch.randn(100).as_strided((1, 20, 1, 8), (0, 4, 8, 1)))


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 4])
def test_caches_that_share_a_tensor_without_overlap_are_served(dim):
    shape = [2, 12, 3, 8]
    caches = torch.zeros(*shape[:dim], 2, *shape[dim:]).unbind(dim)
    for cache, new in zip(caches, appended(*caches), strict=True):
        assert torch.equal(cache[:, 5:7], new)
        assert cache.count_nonzero() == new.count_nonzero()


@pytest.mark.parametrize("shape", [(4,), (2, 3), (3, 1, 4), (2, 2, 3)])
def test_overlaps_are_found_where_there_are_some(shape):
    """Against the places of all entries, for all strides up to 5."""
    for strides in itertools.product(range(1, 6), repeat=len(shape)):
        places = torch.zeros(shape, dtype=torch.long)
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
            places += (torch.arange(size) * stride).view(-1, *[1] * (len(shape) - 1 - dim))
        places = set(places.flatten().tolist())
        assert decoding_checks.overlaps_itself(shape, strides) == (len(places) < math.prod(shape))
        for offset in (-3, 0, 1, 5, 100):
            shifted = {place + offset for place in places}
            assert decoding_checks.shifted_overlap(offset, shape, shape, strides) == bool(places & shifted)


@pytest.mark.parametrize(
    ("table", "length", "new"), [([[0, 1], [0, 2]], 2, 1), ([[0, 0], [1, 2]], 3, 2), ([[3, 1], [2, 1]], 4, 3)]
)
def test_a_page_that_two_sequences_append_to_is_refused(table, length, new):
    """Of two tokens written to one place, the first was lost."""
    caches = torch.zeros(2, 4, 4, 1, 8).unbind()
    with pytest.raises(ValueError, match="block_table must have each page that new tokens are written to once, got page"):
        appended(*caches, length, new, block_table=torch.tensor(table, dtype=torch.int32))
    assert not any(cache.any() for cache in caches)


def test_pages_that_are_full_may_be_shared():
    caches = torch.zeros(2, 4, 4, 1, 8).unbind()
    k, _ = appended(*caches, 4, 1, block_table=torch.tensor([[0, 1], [0, 2]], dtype=torch.int32))
    assert torch.equal(caches[0][1:3, 0], k[:, 0])
