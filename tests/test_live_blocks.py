"""What context parallel attention leaves out: bounds that hold, results that stay, and bytes that are saved."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import diffmax
from benchmarks import count_live_blocks, simulate_ranks
from diffmax.distributed import attention_context_parallel
from diffmax.operators.attention import context_parallel, live_blocks
from diffmax.operators.common import messages
from diffmax.testing.pairs import every_pair
from tests import ranks

LENGTH, DIM = 512, 16


def options(alpha, is_causal=True, softcap=0.0, scale=None):
    return context_parallel.Options("live_blocks", "contiguous", is_causal, scale, True, alpha, None, None, softcap, None, None)


def clustered(noise, dtype=torch.float64, heads=2, kv_heads=1, dim_v=8):
    """Keys in segments of 64 tokens, near a direction each; each query near its own segment's, and near one before it."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    segments = LENGTH // 64
    directions = torch.nn.functional.normalize(normal(1, kv_heads, segments, DIM), dim=3) * 6
    key = directions.repeat_interleave(64, 2) + noise * normal(1, kv_heads, LENGTH, DIM)
    far = torch.tensor([0 if n % 4 == 1 else n for n in range(segments)])
    meant = (directions + directions[:, :, far]).repeat_interleave(64, 2).repeat_interleave(heads // kv_heads, 1)
    query = meant + noise * normal(1, heads, LENGTH, DIM)
    return [t.to(dtype) for t in (query, key, normal(1, kv_heads, LENGTH, dim_v))]


def of_one_process(key, size):
    """The blocks of `size` ranks, without messages."""
    length = key.shape[2] // size
    runs = [[live_blocks.Run(0, length, rank * length)] for rank in range(size)]
    parts = [live_blocks.summary(part, of_rank) for part, of_rank in zip(key.split(length, 2), runs, strict=True)]
    return live_blocks.blocks_of(torch.stack(parts), runs), runs


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.9, 0.99])
def test_the_bound_of_the_threshold_is_below_it_and_near_where_blocks_are_small(alpha):
    e = torch.tensor(1 - alpha, dtype=torch.float64).view(1, 1)
    for spread in (0.0, 0.3, 3.0):
        means = torch.randn(50, 12, dtype=torch.float64) * 3
        scores = means[:, :, None] + spread * torch.randn(50, 12, 7, dtype=torch.float64)
        _, m, delta = torch.ops.diffmax.bisect(scores.flatten(1), 1 - alpha, None, 1, 200, True, "cpu")
        tau = m - (1 - delta) / (1 - alpha)
        bound = live_blocks._lower_bound(scores.mean(2), torch.full((12,), 7.0, dtype=torch.float64), e)
        assert bool((bound <= tau).all())
        if spread == 0:
            assert float((tau - bound).max()) <= 1e-6 / (1 - alpha)
        hidden = live_blocks._lower_bound(torch.full((1, 12), -math.inf), torch.full((12,), 7.0), e.float())
        assert not bool((hidden > -math.inf).any())  # with nothing seen, nothing is excluded


@pytest.mark.parametrize("noise", [0.02, pytest.param(0.2, marks=pytest.mark.slow)])
def test_no_block_with_a_weight_is_ever_left_out(noise):
    size, left_out = 4, 0
    alphas, caps = (0.3, 0.7, torch.tensor([0.2, 0.8])), ((0.0, None), (4.0, 1.0), (0.0, -0.5))
    for dtype, alpha, causal, (softcap, scale) in every_pair((torch.float64, torch.bfloat16), alphas, (True, False), caps):
        query, key, _ = clustered(noise, dtype)
        blocks, runs = of_one_process(key, size)
        given = options(alpha, causal, softcap, scale)
        scores = query.float() @ key.float().transpose(2, 3) * (scale or DIM**-0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if causal:
            scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -math.inf)
        of_rows = alpha.view(2, 1, 1) if isinstance(alpha, torch.Tensor) else alpha
        p = diffmax.diffmax_bisect(scores, of_rows, backend="cpu")
        for rank in range(size):
            own = runs[rank][0]
            rows = slice(own.start, own.start + own.last)
            wanted = live_blocks.wanted_by(query[:, :, rows], blocks, own, given, rank)
            weighs = (p[:, :, rows].unflatten(3, (-1, live_blocks.BLOCK)) > 0).any(4).any(2).any(1, keepdim=True)
            others = blocks.rank != rank
            assert not bool((weighs & others & ~wanted).any()), f"{dtype} {alpha} {causal} {softcap} {scale}"
            assert not bool((wanted & ~others).any())
            left_out += int((~wanted & others & ((blocks.start < own.start) | (not causal))).sum())
    assert left_out > 0


def test_what_is_not_a_number_is_asked_for():
    query, key, _ = clustered(0.02)
    key[0, 0, 40] = math.nan
    blocks, runs = of_one_process(key, 4)
    for alpha in (0.5, torch.tensor([math.nan, 0.5])):
        wanted = live_blocks.wanted_by(query[:, :, 384:], blocks, runs[3][0], options(alpha), 3)
        assert bool(wanted[0, 0, 1])
        assert not isinstance(alpha, torch.Tensor) or bool(wanted[0, 0, :12].all())


def on_ranks(*sizes):
    """As `ranks.on_ranks`, on plain PyTorch: there is nothing to compile on each rank."""

    def decorate(body):
        test = ranks.on_ranks(*sizes)(body)
        test.body = diffmax.use_backend("cpu")(body)
        return test

    return decorate


@on_ranks(4)
def test_results_and_gradients_stay_and_bytes_are_as_eq_49_has_them():
    size, rank = 4, dist.get_rank()
    sent, gathered, exchange, gather = [], [], messages.all_to_all, messages.all_gather
    messages.all_to_all = lambda t, group, sends, receives: (
        sent.append(((sum(sends) - sends[rank]) * t.element_size(), t.dtype)),
        exchange(t, group, sends, receives),
    )[1]
    messages.all_gather = lambda t, group: (gathered.append(t.numel() * t.element_size() * (size - 1)), gather(t, group))[1]
    bytes_of = {}
    try:
        for noise in (0.02, 1.0):
            for layout in ("contiguous", "zigzag"):
                for causal in (True, False):
                    tensors = clustered(noise)
                    cut = (lambda t: t.chunk(size, 2)[rank]) if layout == "contiguous" else None
                    cut = cut or (lambda t: torch.cat([t.chunk(2 * size, 2)[n] for n in (rank, 2 * size - 1 - rank)], 2))
                    whole = [t.clone().requires_grad_() for t in tensors]
                    own = [cut(t).clone().requires_grad_() for t in tensors]
                    grad = torch.randn(1, 2, LENGTH, 8, dtype=torch.float64)
                    expected = diffmax.attention(*whole, is_causal=causal, enable_gqa=True, alpha=0.5)
                    sent.clear()
                    gathered.clear()
                    given = {"layout": layout, "is_causal": causal, "enable_gqa": True, "alpha": 0.5}
                    out = attention_context_parallel(*own, method="live_blocks", **given)
                    forward, sent[:] = list(sent), []
                    truth = torch.autograd.grad(expected, whole, grad)
                    found = torch.autograd.grad(out, own, cut(grad))
                    for ours, theirs in zip((out, *found), (cut(expected), *map(cut, truth)), strict=True):
                        assert float((ours - theirs).detach().abs().max()) <= 1e-12 * max(
                            1.0, float(theirs.detach().abs().max())
                        )
                    blocks = LENGTH // size // live_blocks.BLOCK
                    assert gathered == [(size - 1) * blocks * (DIM + 1) * 8]
                    (requests, kind), (live, _) = forward
                    assert (requests, kind) == ((size - 1) * blocks, torch.uint8)
                    total, back = (torch.tensor([live, 0]), torch.tensor([0, sum(n for n, _ in sent)]))
                    counts = messages.all_reduce(total + back, "sum", dist.group.WORLD.group_name).tolist()
                    assert counts[0] == counts[1]  # the gradients of what was sent
                    everything = size * (size - 1) * (LENGTH // size) * (DIM + 8) * 8
                    bytes_of[noise, layout, causal] = counts[0] / everything
    finally:
        messages.all_to_all, messages.all_gather = exchange, gather
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([\d.]+) \| (contiguous|zigzag) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    documented = {(float(noise), layout): [float(causal), float(both)] for noise, layout, causal, both in table}
    measured = {
        (noise, layout): [bytes_of[noise, layout, True], bytes_of[noise, layout, False]] for noise, layout, _ in bytes_of
    }
    assert len(documented) == 4
    assert measured == {what: pytest.approx(shares, abs=0.0051) for what, shares in documented.items()}


@on_ranks(2)
def test_auto_takes_what_sends_less():
    chosen, real = [], context_parallel._cheapest
    context_parallel._cheapest = lambda *given: chosen.append(real(*given)) or chosen[-1]
    try:
        for heads, kv_heads, way, options in (
            (4, 4, "ulysses", {}),
            (8, 2, "all_gather", {}),
            (3, 3, "all_gather", {}),
            (8, 2, "ulysses", {"window_size": (5, 5)}),
        ):
            q, k = torch.randn(1, heads, 8, 4), torch.randn(1, kv_heads, 8, 4)
            out = attention_context_parallel(q, k, k, method="auto", enable_gqa=True, alpha=0.5, **options)
            same = attention_context_parallel(q, k, k, method=way, enable_gqa=True, alpha=0.5, **options)
            assert torch.equal(out, same)
            assert chosen[-1] == way
            q.requires_grad_()
            attention_context_parallel(q, k, k, method="auto", enable_gqa=True, alpha=0.5, **options)
        # with a backward in float32, all_gather sends n H_kv against (H + H_kv): 2 * 2 < 10 still
        assert chosen == ["ulysses", "ulysses", "all_gather", "all_gather", "all_gather", "all_gather", "ulysses", "ulysses"]
    finally:
        context_parallel._cheapest = real
    with pytest.raises(ValueError, match="got 3 query heads and 3 key heads for 2 ranks"):
        attention_context_parallel(*torch.randn(3, 1, 3, 8, 4), method="auto", window_size=(5, 5))


def test_the_simulation_of_many_ranks_is_what_is_kept_and_documented():
    kept = json.loads(simulate_ranks.RESULT.read_text(encoding="utf-8"))
    assert kept["simulated"] is True
    for row, wanted in zip(simulate_ranks.simulate(kept["settings"]["tokens"]), kept["rows"], strict=True):
        # Python 3.12 rounds sums otherwise
        assert row == {name: pytest.approx(n, rel=1e-3) if isinstance(n, float) else n for name, n in wanted.items()}
    lines = simulate_ranks.table(kept["rows"])
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| [\d.]+ \| [\d.]+ \| \d+ \| (?:ulysses|all_gather|live_blocks) \| .*\|$", page, re.MULTILINE)
    assert len(shown) == 14
    assert not set(shown) - set(lines)
    least, most = simulate_ranks.shares([0.5, 0.5], 16, 16 * 64)
    assert least == most == 0.5 * 47 / 64  # one tile of queries a rank
    for size in simulate_ranks.RANKS:  # Eq. 43
        ratio = simulate_ranks.bytes_sent("all_gather", size, 1 << 20) / simulate_ranks.bytes_sent("ulysses", size, 1 << 20)
        assert ratio == pytest.approx(size * 8 / 40)
        overhead = simulate_ranks.bytes_sent("live_blocks", size, 1 << 20) / simulate_ranks.bytes_sent(
            "all_gather", size, 1 << 20
        )
        assert overhead == pytest.approx(1 + 517 / 32 / 512)  # the bounds and the requests


def test_the_table_of_trained_models_is_the_counts():
    kept = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*/*-count_live_blocks.json"))
    assert kept
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    rows = json.loads(kept[-1].read_text(encoding="utf-8"))["rows"]
    for line in count_live_blocks.table(rows):
        assert line in page
    assert all(row["exact"] <= row["asked"] <= row["seen"] for row in rows)


def test_the_share_asked_for_is_that_of_the_bounds():
    """Clustered keys, of which some are left out, on inputs for which both shares are counted."""
    query, key, value = clustered(0.02)
    for row in count_live_blocks.count({"causal LM": (query, key, value), "encoder": (query, key, value)}):
        assert row["exact"] <= row["asked"] <= row["seen"] <= 1
        assert row["layout"] == "zigzag" or row["alpha"] > 0.5 or row["asked"] < row["seen"], row
