"""benchmarks/bench_pages.py: its bounds are bounds, its orders are permutations, and a grouped cache gives the same output."""

import pytest
import torch

from benchmarks import bench_pages, harness
from diffmax import diffmax_bisect

H, H_KV, N, D, T = 4, 2, 256, 16, 8


def queries_and_keys(seed=0):
    """Queries with a direction in common, and keys of unequal directions, in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (64, N))
    stretch = torch.linspace(0.2, 3, D, dtype=torch.float64)
    return q * stretch + 1, k * stretch.flip(0)


@pytest.mark.parametrize(
    "bound",
    [bench_pages.box, bench_pages.ball, lambda q, pages: bench_pages.rounded(q, pages, 4).amax(2)],
    ids=["box", "ball", "4 bits"],
)
def test_a_bound_is_above_every_score_of_its_page_and_reached_by_pages_of_equal_keys(bound):
    q, k = queries_and_keys()
    pages = k.unflatten(0, (-1, 16))
    scores = torch.einsum("rd,pnd->rpn", q, pages).amax(2)
    limit = bound(q, pages)
    assert (limit >= scores - 1e-9).all()
    assert (limit > scores + 1e-3).any()
    assert (bench_pages.rounded(q, pages, 8) <= torch.einsum("rd,pnd->rpn", q, pages) + 1).all()
    equal = pages[:, :1].expand(-1, 16, -1)
    torch.testing.assert_close(bound(q, equal), torch.einsum("rd,pnd->rpn", q, equal).amax(2))


def test_the_score_basis_keeps_scores_and_whitens_queries():
    q, k = queries_and_keys()
    a, b = bench_pages.score_basis(q)
    torch.testing.assert_close((q @ a) @ (k @ b).T, q @ k.T)
    covariance = (q @ a).T @ (q @ a) / len(q)
    torch.testing.assert_close(covariance, torch.eye(D, dtype=q.dtype), rtol=0, atol=1e-2)


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_groups_are_a_permutation_into_nearer_keys(page_size):
    _, k = queries_and_keys()
    place = bench_pages.grouped(k, page_size)
    assert torch.equal(place.sort().values, torch.arange(N))

    def radius(keys):
        pages = keys.unflatten(0, (-1, page_size))
        return (pages - pages.mean(1, keepdim=True)).norm(dim=-1).mean()

    assert radius(k[place]) < 0.9 * radius(k)


def test_shares_count_a_page_once_for_all_heads_of_a_group():
    q, k = queries_and_keys()
    heads = q[: 2 * T].unflatten(0, (2, T)) / 4
    found = {(order, bound): share for order, _, bound, share in bench_pages.shares(heads, k, q, 0.5, (16,))}
    assert set(found) == {(order, bound) for order in bench_pages.ORDERS for bound in bench_pages.BOUNDS}
    live = (diffmax_bisect(heads @ k.T, 0.5) > 0).any(0)  # of either head: (T, N)
    assert found["in order", "weights"] == live.unflatten(1, (-1, 16)).any(2).double().mean()
    for order in bench_pages.ORDERS:
        assert all(found[order, b] >= found[order, "weights"] > 0 for b in bench_pages.BOUNDS if "keys" not in b)
        by_key = [found[order, f"{bits} bits, single keys"] for bits in (8, 4)]
        assert live.double().mean() <= by_key[0] <= by_key[1] < found[order, "4 bits"]
        both = found[order, "box and ball, score basis"]
        assert both <= min(found[order, "box, score basis"], found[order, "ball, score basis"])


def test_heads_with_alphas_of_their_own_read_what_either_needs():
    q, k = queries_and_keys()
    queries, alphas = q[: 2 * T].unflatten(0, (2, T)) / 4, torch.tensor([0.25, 0.75])
    layer = bench_pages.Layer(torch.cat([queries, queries]), torch.stack([k, k]), torch.stack([k, k]), alphas.repeat(2))
    (_, _, of_first), (of_second_group, keys, alpha) = layer.groups()
    assert torch.equal(of_first, alphas.view(2, 1, 1))
    assert torch.equal(of_second_group, queries)
    found = {(order, bound): share for order, _, bound, share in bench_pages.shares(queries, keys, q, alpha, (16,))}
    live = torch.stack([diffmax_bisect(h @ k.T, a.item()) > 0 for h, a in zip(queries, alphas, strict=True)]).any(0)
    assert found["in order", "weights"] == live.unflatten(1, (-1, 16)).any(2).double().mean()


def test_bytes_of_keys_are_those_of_the_pages_read_and_of_all_bounds():
    assert bench_pages.reading("weights", 16, 64, 0.25) == 0.25
    assert bench_pages.reading("box", 16, 64, 0.25) == 0.25 + 2 / 16
    assert bench_pages.reading("ball, score basis", 16, 64, 0.25) == 0.25 + 65 / 1024
    assert bench_pages.reading("4 bits", 16, 64, 0.25) == 0.25 + 1 / 8 + 2 / 16
    assert bench_pages.reading("8 bits, single keys", 64, 64, 0.1) == 0.1 + 1 / 4 + 2 / 64


def test_a_token_by_a_grouped_cache_is_checked_against_the_cache_in_order():
    torch.manual_seed(0)
    cache = [bench_pages.Layer(torch.randn(H, N + 2, D), torch.randn(H_KV, N, D), torch.randn(H_KV, N, D), 0.5)]
    with harness.threads(1):
        rows = {row["contestant"]: row for row in bench_pages.timed(cache, 0, N, rounds=1)}
    assert all(row["correct"] for row in rows.values()), [row["reason"] for row in rows.values()]
    assert rows["all keys"]["pages_read"] is None
    assert 0 < rows["bounds, grouped, 16"]["pages_read"] <= 1


def test_a_wrong_order_of_the_values_is_not_timed(monkeypatch):
    torch.manual_seed(0)
    cache = [bench_pages.Layer(torch.randn(H, N + 2, D), torch.randn(H_KV, N, D), torch.randn(H_KV, N, D), 0.5)]
    monkeypatch.setattr(bench_pages, "grouped", lambda keys, page_size: torch.zeros(N, dtype=torch.long))
    with harness.threads(1):
        rows = {row["contestant"]: row for row in bench_pages.timed(cache, 0, N, rounds=1)}
    assert "the output errs by" in rows["bounds, grouped, 16"]["reason"]
    assert rows["bounds, in order, 16"]["correct"]
