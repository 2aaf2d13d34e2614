"""Decoding over a cache that is spread over ranks: `attention_with_kvcache_sharded` against the cache on one process."""

import math

import pytest
import torch
import torch.distributed as dist

import diffmax
from diffmax import reference
from diffmax.distributed import attention_with_kvcache_sharded
from diffmax.operators.common import messages
from diffmax.operators.decoding import sharded
from tests import ranks

on_ranks = ranks.on_ranks

HEADS, KV_HEADS, SIZE, VALUE_SIZE = 4, 2, 16, 12
PAGE = 16
OPTIONS = {
    "plain": {"alpha": 0.5},
    "dense": {"alpha": 0.95},
    "alpha per head": {"alpha": torch.tensor([0.0, 0.3, 0.9, 1.0])},
    "sink": {"alpha": 0.5, "sink": torch.tensor([0.5, -1.0, 3.0, 30.0])},
    "softcap": {"alpha": 0.5, "softcap": 2.0},
    "chunk": {"alpha": 0.5, "causal": True, "length": 5},
    "window": {"alpha": 0.5, "causal": True, "window_size": (40, 0), "length": 3},
    "ALiBi": {"alpha": 0.5, "causal": True, "alibi_slopes": torch.tensor([0.5, 0.1, -0.02, 0.0])},
}


def backend():
    """Plain PyTorch: there is nothing to compile on each rank."""
    return "reference"


def cache_of(tokens, dtype, batch=3, length=1, seed=0):
    """Queries, keys and values of whole sequences."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = 2 * draw(batch, length, HEADS, SIZE)
    return q, draw(batch, tokens, KV_HEADS, SIZE), draw(batch, tokens, KV_HEADS, VALUE_SIZE)


def shares(lengths, how):
    """Which tokens of each sequence this rank holds."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if how == "by pages":
        return [[t for t in range(n) if t // PAGE % size == rank] for n in lengths]
    if how == "uneven":
        return [list(range(*{0: (0, n - n // 3), 1: (n - n // 3, n)}.get(rank, (0, 0)))) for n in lengths]
    if how == "one rank":
        return [list(range(n)) if rank == size - 1 else [] for n in lengths]
    return [list(range(n * rank // size, n * (rank + 1) // size)) for n in lengths]


def own_cache(whole, lengths, how, paged=False):
    """This rank's tokens, as a cache with room for more, NaN where there is none, and what tells their places."""
    mine = shares(lengths, how)
    own = torch.tensor([len(tokens) for tokens in mine], dtype=torch.int32)
    room = PAGE * (2 + max(len(tokens) for tokens in mine) // PAGE)
    caches = []
    for t in whole:
        cache = t.new_full((len(lengths), room, *t.shape[2:]), math.nan)
        for row, source, tokens in zip(cache, t, mine, strict=True):
            row[: len(tokens)] = source[tokens]
        caches.append(cache)
    given = {"cache_seqlens": own}
    if paged:
        table = torch.randperm(len(lengths) * room // PAGE, generator=torch.Generator().manual_seed(dist.get_rank()))
        table = table.view(len(lengths), -1).int()
        pages = [torch.empty_like(cache).view(-1, PAGE, *cache.shape[2:]) for cache in caches]
        for page, cache in zip(pages, caches, strict=True):
            page[table.flatten().long()] = cache.view(-1, PAGE, *cache.shape[2:])
        caches, given["block_table"] = pages, table
    return caches, given


def check(name, dtype, how, lengths=(100, 1, 77), paged=False, bounds=False, sigma=1.0):
    options = dict(OPTIONS[name])
    length = options.pop("length", 1)
    q, k_cache, v_cache = cache_of(max(lengths), dtype, len(lengths), length)
    q = q * sigma
    told = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32), "return_softmax_lse": True, **options}
    expected, tau = diffmax.attention_with_kvcache(q.double(), k_cache.double(), v_cache.double(), backend=backend(), **told)
    caches, given = own_cache((k_cache, v_cache), lengths, how, paged)
    if bounds:
        bits = 4 if paged else None
        given["page_bounds"] = diffmax.page_bounds(caches[0], given["cache_seqlens"], given.get("block_table"), PAGE, bits)
    out, found = attention_with_kvcache_sharded(q, *caches, return_softmax_lse=True, **given, **options)
    assert out.dtype == dtype
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=allowed, rtol=allowed)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(found.double(), tau, atol=allowed, rtol=allowed)


@on_ranks(2, 4)
def test_results_are_those_of_the_whole_cache():
    for name in OPTIONS:
        for dtype in (torch.float64, torch.float32):
            check(name, dtype, "even")
            check(name, dtype, "uneven", paged=True)
        check(name, torch.bfloat16, "one rank", bounds=True)
        check(name, torch.float64, "even", paged=True, bounds=True, sigma=4.0)


@on_ranks(2, 4)
def test_where_no_position_counts_any_rank_may_hold_any_page():
    for name in ("plain", "dense", "sink", "softcap"):
        check(name, torch.float64, "by pages", paged=True, bounds=True)


@on_ranks(2, 4)
def test_rows_of_many_candidates_exchange_sums():
    before = sharded.GATHERED
    sharded.GATHERED = 8
    try:
        for name in OPTIONS:
            check(name, torch.float64, "even", bounds=True)
    finally:
        sharded.GATHERED = before


@on_ranks(2, 4)
def test_new_tokens_are_written_by_their_owner_and_seen_by_all():
    lengths, size, rank = (30, 0, 45), dist.get_world_size(), dist.get_rank()
    for owner in (size - 1, 0):
        q, k_cache, v_cache = cache_of(max(lengths) + 2, torch.float64, len(lengths), 2)
        new = [torch.stack([t[b, n : n + 2] for b, n in enumerate(lengths)]) for t in (k_cache, v_cache)]
        causal = owner == size - 1
        told = {"alpha": 0.5, "causal": causal}
        whole = [t.clone() for t in (k_cache, v_cache)]
        expected = diffmax.attention_with_kvcache(
            q, *whole, *new, cache_seqlens=torch.tensor(lengths, dtype=torch.int32), backend=backend(), **told
        )
        caches, given = own_cache((k_cache, v_cache), lengths, "even", paged=True)
        bounds = diffmax.page_bounds(caches[0], **given)
        before = [t.clone() for t in caches]
        out = attention_with_kvcache_sharded(q, *caches, *new, owner=owner, page_bounds=bounds, **given, **told)
        torch.testing.assert_close(out, expected)
        assert (rank == owner) == any(
            not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, caches, strict=True)
        )
        given["cache_seqlens"] = given["cache_seqlens"] + 2 * (rank == owner)
        again = attention_with_kvcache_sharded(q, *caches, page_bounds=bounds, **given, **told)
        torch.testing.assert_close(again, expected)


@on_ranks(2)
def test_bad_and_masked_rows_are_those_of_the_whole_cache():
    q, k_cache, v_cache = cache_of(64, torch.float64, 4)
    k_cache[1, 3], k_cache[2, 60, :, 0], q[2, ..., 0] = math.nan, math.inf, 1.0
    lengths = (64, 64, 64, 0)
    told = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32), "alpha": 0.5, "return_softmax_lse": True}
    expected, tau = diffmax.attention_with_kvcache(q, k_cache, v_cache, backend=backend(), **told)
    caches, given = own_cache((k_cache, v_cache), lengths, "even")
    for gathered in (sharded.GATHERED, 1):
        before, sharded.GATHERED = sharded.GATHERED, gathered
        out, found = attention_with_kvcache_sharded(q, *caches, **given, alpha=0.5, return_softmax_lse=True)
        sharded.GATHERED = before
        torch.testing.assert_close(out, expected, equal_nan=True)
        torch.testing.assert_close(found, tau, equal_nan=True)


@on_ranks(2, 4)
def test_what_is_sent_is_what_the_documentation_says():
    """Eq. 51, in bytes that a rank hands over."""
    size, sent = dist.get_world_size(), []
    real = {name: getattr(messages, name) for name in ("all_reduce", "all_gather")}

    def recording(name):
        def run(t, *more):
            sent.append((name, t.numel() * t.element_size()))
            return real[name](t, *more)

        return run

    lengths = (200, 160)
    q, k_cache, v_cache = cache_of(max(lengths), torch.float32, len(lengths))
    caches, given = own_cache((k_cache, v_cache), lengths, "even")
    try:
        for name in real:
            setattr(messages, name, recording(name))
        attention_with_kvcache_sharded(q, *caches, **given, alpha=0.5)
    finally:
        for name, function in real.items():
            setattr(messages, name, function)
    rows = len(lengths) * HEADS
    names = [name for name, _ in sent]
    assert names == ["all_reduce", "all_gather", "all_reduce", "all_reduce", "all_gather", "all_reduce"]
    agreement, of_lengths, bounds, count, candidates, output = (n for _, n in sent)
    assert (agreement, of_lengths, count) == (8 * (40 + size), 8 * len(lengths), 8)
    assert (bounds, output) == (4 * rows, 4 * rows * VALUE_SIZE)
    assert candidates % (4 * rows) == 0
    assert candidates // (4 * rows) < 40  # of the 50 to 100 scores of a rank


@on_ranks(2)
def test_a_rank_whose_pages_lie_below_the_bound_reads_no_more_than_it_takes_to_say_so():
    """Three keys score far above the others: rank 0 has them."""
    q, k_cache, v_cache = cache_of(2048, torch.float32, 1)
    k_cache[:, 20:23] = 8 * (q[:, :, ::2] + q[:, :, 1::2])  # for both heads that read a key
    caches, given = own_cache((k_cache, v_cache), (2048,), "even", paged=True)
    bounds = diffmax.page_bounds(caches[0], **given)
    out = attention_with_kvcache_sharded(q, *caches, **given, alpha=0.5, page_bounds=bounds)
    expected = diffmax.attention_with_kvcache(q, k_cache, v_cache, alpha=0.5, backend=backend())
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    read = []
    real = sharded._Part._read

    def counting(part, pages):
        read.append(len(pages))
        real(part, pages)

    sharded._Part._read = counting
    try:
        attention_with_kvcache_sharded(q, *caches, **given, alpha=0.5, page_bounds=bounds)
    finally:
        sharded._Part._read = real
    assert read[0] == sharded.FIRST_PAGES
    assert sum(read) < 0.5 * 1024 // PAGE
    if dist.get_rank() == 1:
        assert sum(read) == sharded.FIRST_PAGES


@on_ranks(2)
def test_arguments_that_do_not_fit_or_differ_raise_on_every_rank():
    rank = dist.get_rank()
    q, k_cache, v_cache = cache_of(32, torch.float32)
    new = [t[:, :2] for t in (k_cache, v_cache)]
    wide = q.expand(-1, 2, -1, -1)
    for error, words, arguments, options in (
        (ValueError, "owner must be a rank", (q, k_cache, v_cache), {"owner": 2}),
        (ValueError, "k and v go together", (q, k_cache, v_cache, new[0]), {}),
        (ValueError, "alpha must be the same on every rank", (q, k_cache, v_cache), {"alpha": 0.5 + rank / 10}),
        (ValueError, "softcap must be the same", (q, k_cache, v_cache), {"softcap": float(rank)}),
        (ValueError, "rank 1: .*multiple of|must be a multiple of", (q if rank == 0 else q[:, :, :3], k_cache, v_cache), {}),
        (ValueError, "pass owner=1", (wide, k_cache, v_cache, *new), {"owner": 0, "cache_seqlens": 20, "causal": True}),
        (
            ValueError,
            "new tokens must be the same",
            (q, k_cache, v_cache, new[0], new[1][:, : 1 + rank]),
            {"owner": 1, "cache_seqlens": 20},
        ),
        (
            TypeError if rank == 0 else ValueError,
            "k must be a tensor",
            (q, k_cache, v_cache, new[0] if rank else [1], new[1]),
            {"cache_seqlens": 20},
        ),
    ):
        with pytest.raises(error, match=words):
            attention_with_kvcache_sharded(*arguments, **options)
    room, before = k_cache.clone(), k_cache.clone()
    with pytest.raises(ValueError, match="pass owner=1"):
        attention_with_kvcache_sharded(wide, room, v_cache, *new, owner=0, cache_seqlens=20, causal=True)
    assert torch.equal(room, before)  # a call that is refused writes nothing
    with pytest.raises(NotImplementedError, match="gradient"):
        attention_with_kvcache_sharded(q.clone().requires_grad_(), k_cache, v_cache)
    with pytest.raises((NotImplementedError, ValueError)[rank], match="it has no gradient"):  # the other rank hears of it
        attention_with_kvcache_sharded(q.clone().requires_grad_(rank == 0), k_cache, v_cache)


@on_ranks(2)
def test_no_queries_no_sequences_and_an_empty_cache():
    for batch, length, tokens in ((0, 1, 32), (2, 0, 32), (2, 1, 0), (2, 3, 1)):
        q, k_cache, v_cache = cache_of(tokens, torch.float32, batch, length)
        caches = (k_cache[:, : tokens // 2], v_cache[:, : tokens // 2])
        if dist.get_rank() == 0:
            caches = (k_cache[:, tokens // 2 :], v_cache[:, tokens // 2 :])
        for gathered in (sharded.GATHERED, -1):
            before, sharded.GATHERED = sharded.GATHERED, gathered
            out, tau = attention_with_kvcache_sharded(q, *caches, alpha=0.5, return_softmax_lse=True)
            sharded.GATHERED = before
            expected = diffmax.attention_with_kvcache(q, k_cache, v_cache, alpha=0.5, backend=backend())
            torch.testing.assert_close(out, expected)
            assert tau.shape == (batch, HEADS, length)


def test_without_a_process_group_it_says_what_to_do():
    q, k_cache, v_cache = cache_of(32, torch.float32)
    with pytest.raises(RuntimeError, match="init_process_group first; attention_with_kvcache needs no group"):
        attention_with_kvcache_sharded(q, k_cache, v_cache)


@pytest.mark.parametrize(("alpha", "candidates"), [(0.5, 10), (0.75, 76), (0.9, 1790)])
def test_candidates_are_as_few_as_the_documentation_says(alpha, candidates):
    most = []
    for _ in range(5):
        scores = (2 * torch.randn(8, 64)) @ torch.randn(64, 8192) / 8
        taus = []
        for part in scores.chunk(4, 1):
            _, m, delta = reference.bisect(part, 1 - alpha, 1, 200, True)
            taus.append(m - (1 - delta) / (1 - alpha))
        floor = torch.stack(taus).amax(0)
        most.append(max(int((part > floor).sum(1).max()) for part in scores.chunk(4, 1)))
    assert sum(most) / len(most) == pytest.approx(candidates, rel=0.3)
