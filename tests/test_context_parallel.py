"""Attention over a sequence that is sharded over ranks: `attention_context_parallel` against the sequence on one process."""

import importlib.util
import itertools
import json
import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import diffmax
from diffmax.distributed import attention_context_parallel, attention_varlen_context_parallel
from diffmax.operators.common import messages
from diffmax.testing import gates
from tests import ranks

METHODS, LAYOUTS = ("ulysses", "all_gather"), ("contiguous", "zigzag")
EVERY = (*METHODS, "live_blocks")
LENGTH, DIM, DIM_V = 48, 8, 6


def on_ranks(*sizes, marks=()):
    """As `ranks.on_ranks`, on plain PyTorch: there is nothing to compile on each rank."""

    def decorate(body):
        test = ranks.on_ranks(*sizes, marks=marks)(body)
        test.body = diffmax.use_backend("cpu")(body)
        return test

    return decorate


def part(t, layout):
    """This rank's tokens of (B, H, L, D); a layout may also be how many the ranks have."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if not isinstance(layout, str):
        return t.split(layout, 2)[rank]
    if layout == "contiguous":
        return t.chunk(size, 2)[rank]
    runs = t.chunk(2 * size, 2)
    return torch.cat([runs[rank], runs[2 * size - 1 - rank]], 2)


def sequence(heads=4, kv_heads=4, dtype=torch.float64, length=LENGTH):
    return (
        torch.randn(2, heads, length, DIM).mul(2).to(dtype),
        torch.randn(2, kv_heads, length, DIM).mul(2).to(dtype),
        torch.randn(2, kv_heads, length, DIM_V).to(dtype),
    )


def with_gradients(function, tensors, grad, layout=None):
    """The result and the gradients, with `layout` those of this rank's part of the first three tensors."""
    mine = (lambda t: part(t, layout).contiguous()) if layout else (lambda t: t)
    leaves = [(mine(t) if place < 3 else t).detach().clone().requires_grad_() for place, t in enumerate(tensors)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, mine(grad))]


def same(method, layout, tensors, **options):
    """In float64: the same as on one process, to rounding."""
    alpha_and_sink = tensors[3:]

    def whole(q, k, v, *more):
        return diffmax.attention(q, k, v, enable_gqa=True, **dict(zip(("alpha", "sink"), more, strict=False)), **options)

    def own(q, k, v, *more):
        learned = dict(zip(("alpha", "sink"), more, strict=False))
        how = layout if isinstance(layout, str) else "contiguous"
        return attention_context_parallel(q, k, v, method=method, layout=how, enable_gqa=True, **learned, **options)

    grad = torch.randn(*tensors[0].shape[:3], DIM_V, dtype=tensors[0].dtype)
    expected, found = with_gradients(whole, tensors, grad), with_gradients(own, tensors, grad, layout)
    names = ("out", "query", "key", "value", "alpha", "sink")
    for place, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        truth = part(truth, layout) if place < 4 else truth
        assert ours.shape == truth.shape
        error = float((ours - truth).abs().max()) if truth.numel() else 0.0
        assert error <= 1e-13 * max([1.0, *truth.abs().flatten().tolist()]), (
            f"{method} {layout} {options} {names[place]}: {error:.3g}"
        )
    assert len(found) == 4 + len(alpha_and_sink)


@on_ranks(2, 4)
def test_results_and_gradients_are_those_of_the_whole_sequence():
    for method in METHODS:
        for layout in LAYOUTS:
            for causal in (False, True):
                same(method, layout, sequence(), is_causal=causal, alpha=0.5)
            for window in ((10, 0), (0, 0), (17, 30), (100, 100)):
                same(method, layout, sequence(), is_causal=True, alpha=0.7, window_size=window)
            same(method, layout, sequence(), is_causal=True, softcap=2.0, scale=0.3)
    for window in ((10, 3), (-1, 5), (0, 40)):
        same("ulysses", "zigzag", sequence(), window_size=window)
    tensors = sequence()
    batch, heads = tensors[0].shape[:2]
    for slopes in (torch.rand(heads), torch.rand(batch, heads) - 0.3):
        for layout in LAYOUTS:
            for method in METHODS:
                same(method, layout, tensors, is_causal=True, alpha=0.7, alibi_slopes=slopes)
            same("ulysses", layout, tensors, alpha=0.7, alibi_slopes=slopes)
            same("auto", layout, tensors, alpha=0.7, alibi_slopes=slopes)
    for layout in LAYOUTS:
        for causal in (False, True):
            same("live_blocks", layout, sequence(), is_causal=causal, alpha=0.5)
            same("live_blocks", layout, sequence(), is_causal=causal, softcap=2.0, scale=-0.3)


@on_ranks(2, 4)
def test_alpha_and_the_sink_per_head_learn_on_every_rank():
    alpha, sink = torch.linspace(0.3, 0.9, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    for method in EVERY:
        for layout in LAYOUTS:
            for causal in (False, True):
                same(method, layout, (*sequence(8, 4), alpha, sink), is_causal=causal)
                same(method, layout, (*sequence(8, 8), torch.tensor(0.6, dtype=torch.float64)), is_causal=causal)


def same_packed(method, layout, starts, heads=4, kv_heads=4, learned=(), **options):
    """As `same`, of packed sequences that start at `starts`."""
    tensors = [t[:1] for t in sequence(heads, kv_heads, length=starts[-1])] + list(learned)
    ends, longest = torch.tensor(starts, dtype=torch.int32), max(b - a for a, b in pairwise(starts))

    def packed(function):
        def by_heads(q, k, v, *more):
            given = {"enable_gqa": True, **options, **dict(zip(("alpha", "sink"), more, strict=False))}
            return function(*(t[0].transpose(0, 1) for t in (q, k, v)), **given).transpose(0, 1).unsqueeze(0)

        return by_heads

    @packed
    def whole(q, k, v, **given):
        return diffmax.attention_varlen(q, k, v, ends, ends, longest, longest, **given)

    @packed
    def own(q, k, v, **given):
        how = layout if isinstance(layout, str) else "contiguous"
        return attention_varlen_context_parallel(q, k, v, ends, method=method, layout=how, **given)

    grad = torch.randn(1, heads, starts[-1], DIM_V, dtype=torch.float64)
    expected, found = with_gradients(whole, tensors, grad), with_gradients(own, tensors, grad, layout)
    for place, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        truth = part(truth, layout) if place < 4 else truth
        error = float((ours - truth).abs().max()) if truth.numel() else 0.0
        assert ours.shape == truth.shape
        assert error <= 1e-13 * max([1.0, *truth.abs().flatten().tolist()]), (method, layout, starts, options, place, error)


# starts: of sequences across ranks, within one, of none, of one token, and one of all
PACKINGS = ([0, 5, 29, 30, 48], [0, 0, 24, 24, 48, 48], [0, 48], [0, 1, 2, 47, 48], [0, 6, 12, 18, 24, 30, 36, 42, 48])


@on_ranks(2, 4, marks=[pytest.mark.slow])
def test_packed_sequences_may_begin_and_end_on_any_rank():
    size = dist.get_world_size()
    alpha, sink = torch.linspace(0.5, 0.9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for starts in PACKINGS:
        for layout in (*LAYOUTS, [17, *[0] * (size - 2), 31]):
            for method in METHODS:
                for causal in (False, True):
                    same_packed(method, layout, starts, is_causal=causal, learned=(alpha, sink))
                same_packed(method, layout, starts, is_causal=True, alpha=0.7, window_size=(7, 0))
                same_packed(method, layout, starts, is_causal=True, alpha=0.7, alibi_slopes=torch.rand(4), softcap=3.0)
            same_packed("ulysses", layout, starts, alpha=0.6, window_size=(5, 2))
    same_packed("all_gather", "zigzag", PACKINGS[0], heads=6, kv_heads=3, is_causal=True, alpha=0.5, scale=0.4)
    same_packed("auto", "contiguous", PACKINGS[0], heads=6, kv_heads=1, is_causal=True, alpha=0.5)
    same_packed("ulysses", "zigzag", PACKINGS[0], heads=8, kv_heads=4, alpha=0.5)
    empty, none = torch.randn(0, 4, 8), torch.zeros(3, dtype=torch.int32)
    for method in METHODS:
        assert attention_varlen_context_parallel(empty, empty, empty, none, method=method).shape == (0, 4, 8)


@on_ranks(2)
def test_packed_sequences_that_do_not_fit_raise_on_every_rank():
    q, rank = torch.randn(8, 4, 8), dist.get_rank()
    starts = torch.tensor([0, 5, 16], dtype=torch.int32)
    for given, message in (
        (torch.tensor([0, 5, 15]), r"cu_seqlens must end at the number of tokens of all ranks, 16, got 15"),
        (torch.tensor([0, 9, 5, 16]), r"cu_seqlens must have two entries or more, and ascend from 0, got \[0, 9, 5, 16\]"),
        (torch.tensor([1, 16]), "ascend from 0, got"),
        (torch.tensor([0]), "two entries or more"),
        (starts[: 3 - rank] if rank else starts, "(?s)cu_seqlens must be the same on every rank.*rank 1"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_varlen_context_parallel(q, q, q, given, is_causal=True)
    for given in (None, [0, 16], starts.float(), starts.view(1, 3)):
        with pytest.raises(TypeError, match="cu_seqlens must be an int32 tensor of one dimension"):
            attention_varlen_context_parallel(q, q, q, given)
    with pytest.raises(ValueError, match=r"(?s)ascend from 0, got \[1, 16\]|every rank's arguments must be valid.*rank 1"):
        attention_varlen_context_parallel(q, q, q, starts if rank == 0 else torch.tensor([1, 16]))
    with pytest.raises(ValueError, match='must be "auto", "ulysses" or "all_gather", got "live_blocks"'):
        attention_varlen_context_parallel(q, q, q, starts, method="live_blocks")
    with pytest.raises(ValueError, match="takes a window or ALiBi with is_causal=True, got window_size"):
        attention_varlen_context_parallel(q, q, q, starts, method="all_gather", window_size=(3, 3))
    with pytest.raises(ValueError, match=r"must have 3 dimensions \(T, H, D\)"):
        attention_varlen_context_parallel(q[None], q[None], q[None], starts)
    with pytest.raises(ValueError, match="one number per head, shape"):
        attention_varlen_context_parallel(q, q, q, starts, is_causal=True, alibi_slopes=torch.rand(2, 4))
    mine = q[:, : 4 - 2 * rank]
    with pytest.raises(ValueError, match=r"(?s)query's shape.*\('tokens', 4, 8\) on rank 0; \('tokens', 2, 8\) on rank 1"):
        attention_varlen_context_parallel(mine, mine, mine, starts)
    call = (attention_context_parallel, *[q[None]] * 3) if rank else (attention_varlen_context_parallel, q, q, q, starts)
    with pytest.raises(ValueError, match="the function must be the same on every rank"):
        call[0](*call[1:])


@on_ranks(2, 4)
def test_ranks_may_have_different_numbers_of_tokens_and_none():
    size = dist.get_world_size()
    # below 1/2 the slope of a weight near 0 is unbounded: rounding alone may be more than is allowed here
    alpha, sink = torch.linspace(0.5, 0.9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for lengths in ([17, *[31 // (size - 1)] * (size - 2), 48 - 17 - 31 // (size - 1) * (size - 2)], [48, *[0] * (size - 1)]):
        for tokens in (lengths, lengths[::-1]):
            for method in EVERY:
                for causal in (False, True):
                    same(method, tokens, (*sequence(), alpha, sink), is_causal=causal)
                if method in METHODS:
                    same(method, tokens, sequence(), is_causal=True, window_size=(20, 0))
    rank, q = dist.get_rank(), torch.randn(1, 4, 8, 8)
    mine = q[:, :, : 8 - 2 * rank]
    with pytest.raises(
        ValueError, match=r"as many tokens in the zigzag layout, got 8 on rank 0, 6 on rank 1.*\npad them, or pass"
    ):
        attention_context_parallel(mine, mine, mine, layout="zigzag")


@on_ranks(2, 4)
def test_gathering_takes_any_number_of_heads():
    for heads, kv_heads in ((3, 1), (3, 3), (6, 2), (1, 1)):
        for layout in LAYOUTS:
            for method in EVERY[1:]:
                same(method, layout, sequence(heads, kv_heads), is_causal=True)
                same(method, layout, sequence(heads, kv_heads))


@on_ranks(2, 4)
def test_narrow_dtypes_pass_the_gate():
    """Forward and backward together, by the mean error, as decision 0011 has it."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = (*sequence(4, 4, dtype), torch.full((4,), 0.6), torch.randn(4))
        grad = torch.randn(2, 4, LENGTH, DIM_V).to(dtype)

        def whole(*given):
            *leaves, grad = (t.detach().requires_grad_() for t in given)
            q, k, v, alpha, sink = leaves
            out = diffmax.attention(q, k, v, is_causal=True, alpha=alpha, sink=sink, backend="reference")
            return (out.detach(), *torch.autograd.grad(out, leaves, grad.detach()))

        wanted = gates(whole, *tensors, grad, average=True)
        for method in EVERY:
            for layout in LAYOUTS:

                def own(q, k, v, alpha, sink, method=method, layout=layout):
                    given = {"alpha": alpha, "sink": sink, "is_causal": True}
                    return attention_context_parallel(q, k, v, method=method, layout=layout, **given)

                for place, ours in enumerate(with_gradients(own, tensors, grad, layout)):
                    exact, allowed = wanted[place]
                    truth = part(exact, layout) if place < 4 else exact
                    error = (ours.double() - truth).abs().sum()
                    if place < 4:  # the gate is for the mean over all tokens
                        error = messages.all_reduce(error, "sum", dist.group.WORLD.group_name)
                    error = float(error / exact.numel())
                    assert error <= allowed, f"{dtype} {method} {layout} {place}: {error:.3g}, allowed {allowed:.3g}"


@on_ranks(2)
def test_second_derivatives_are_those_of_the_whole_sequence():
    q, k, v = sequence(4, 2)
    results = []
    for method, layout in ((None, None), *((m, y) for m in EVERY for y in LAYOUTS)):
        leaves = [(part(t, layout) if layout else t).detach().clone().requires_grad_() for t in (q, k, v)]
        alpha = torch.full((4,), 0.7, dtype=torch.float64, requires_grad=True)
        options = {"is_causal": True, "alpha": alpha, "enable_gqa": True}
        if layout:
            out = attention_context_parallel(*leaves, method=method, layout=layout, **options)
        else:
            out = diffmax.attention(*leaves, **options)
        first = torch.autograd.grad(out.square().sum(), (*leaves, alpha), create_graph=True)
        # of the sum over ranks: alpha's first gradient is one value on every rank, and counts once
        total = sum(t.square().sum() for t in first[:3])
        second = torch.autograd.grad(total, leaves)
        results.append([*first, *second])
    for (_, layout), own in zip([(m, y) for m in EVERY for y in LAYOUTS], results[1:], strict=True):
        for ours, truth in zip(own, results[0], strict=True):
            truth = part(truth, layout) if truth.ndim == 4 else truth
            assert float((ours - truth).abs().max()) <= 1e-11 * max(1.0, float(truth.abs().max()))


@on_ranks(2)
def test_autocast_converts_its_other_narrow_dtype_as_torch_does():
    """torch joins no tensors of it under autocast, and messages are joined tensors: they are converted before."""
    for dtype, other in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        q, k, v = sequence(dtype=dtype)
        expected = diffmax.attention(*(t.to(other) for t in (q, k, v)))
        with torch.autocast("cpu", other):
            for method in EVERY:
                out = attention_context_parallel(*(part(t, "contiguous") for t in (q, k, v)), method=method)
                torch.testing.assert_close(out, part(expected, "contiguous"))


@on_ranks(2)
def test_second_derivatives_take_part_on_a_rank_without_tokens():
    """Packed sequences gave gradients without a graph there: that rank left, and the others waited for it."""
    q, k, v = (t[0].transpose(0, 1) for t in sequence(4, 2))
    starts = torch.tensor([0, 20, 20, len(q)], dtype=torch.int32)
    for mine, method, causal in itertools.product((0, len(q)), ("ulysses", "all_gather"), (False, True)):
        ends = (0, mine) if dist.get_rank() == 0 else (mine, len(q))
        results = []
        for own in (slice(*ends), None):
            leaves = [(t if own is None else t[own]).detach().clone().requires_grad_() for t in (q, k, v)]
            alpha = torch.full((4,), 0.7, dtype=torch.float64, requires_grad=True)
            options = {"is_causal": causal, "alpha": alpha, "enable_gqa": True}
            if own is None:
                out = diffmax.attention_varlen(*leaves, starts, starts, len(q), len(q), **options)
            else:
                out = attention_varlen_context_parallel(*leaves, starts, method=method, **options)
            first = torch.autograd.grad(out.square().sum(), (*leaves, alpha), create_graph=True)
            second = torch.autograd.grad(sum(t.square().sum() for t in first[:3]), (*leaves, alpha))
            results.append([t if own is not None or t.ndim == 1 else t[slice(*ends)] for t in (*first, *second)])
        for ours, truth in zip(*results, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@on_ranks(2, 4)
def test_what_is_sent_is_what_the_documentation_says():
    """Eq. 41 and 42, in bytes that a rank sends, and the number of messages."""
    size, sent = dist.get_world_size(), []
    shares = {  # of the numbers that a rank hands over, how many leave it, by ring where that matters
        "all_to_all": (size - 1) / size,
        "all_gather": size - 1,
        "reduce_scatter": (size - 1) / size,
        "all_reduce": None,
    }
    real = {name: getattr(messages, name) for name in shares}

    def recording(name):
        def record(t, *more):
            sent.append((name, t.numel(), t.element_size()))
            return real[name](t, *more)

        return record

    batch, heads, kv_heads, length = 2, 8, 4, LENGTH // size
    per_token = {  # the numbers of a token in Eq. 41 and 42
        "ulysses": (heads * DIM + kv_heads * (DIM + DIM_V) + heads * DIM_V) * (size - 1) / size,
        "all_gather": kv_heads * (DIM + DIM_V) * (size - 1),
    }
    expected_messages = {
        "ulysses": (["all_to_all"] * 2, ["all_to_all", "all_reduce", "all_to_all"]),
        "all_gather": (["all_gather"], ["all_reduce", "reduce_scatter"]),
    }
    try:
        for name in shares:
            setattr(messages, name, recording(name))
        for dtype, width, summed in ((torch.float32, 4, 4), (torch.bfloat16, 2, 4)):
            for method in METHODS:
                for layout in LAYOUTS:
                    leaves = [part(t, layout).clone().requires_grad_() for t in sequence(heads, kv_heads, dtype)]
                    alpha = torch.full((heads,), 0.6, requires_grad=True)
                    options = {"method": method, "layout": layout, "is_causal": True, "alpha": alpha, "enable_gqa": True}
                    sent.clear()
                    out = attention_context_parallel(*leaves, **options)
                    agreement, *forward = list(sent)
                    sent.clear()
                    out.float().square().sum().backward()
                    backward = list(sent)
                    assert agreement == ("all_reduce", 40 + size, 8)
                    names = [[name for name, *_ in way] for way in (forward, backward)]
                    assert [sorted(way) for way in names] == [sorted(way) for way in expected_messages[method]]
                    assert [n for name, n, _ in backward if name == "all_reduce"] == [heads]
                    for way, each in ((forward, width), (backward, summed if method == "all_gather" else width)):
                        counted = sum(n * w * shares[name] for name, n, w in way if shares[name] is not None)
                        assert counted == batch * length * per_token[method] * each
    finally:
        for name, function in real.items():
            setattr(messages, name, function)


@on_ranks(4)
def test_the_work_of_the_zigzag_layout_is_the_same_on_every_rank():
    """Pairs of a query and a key that it is given; of contiguous parts the last rank has four times the first's."""
    from diffmax.operators.attention import context_parallel

    pairs, real = [], context_parallel.attention
    context_parallel.attention = lambda q, k, *more, **named: (
        pairs.append(q.shape[2] * k.shape[2]),
        real(q, k, *more, **named),
    )[1]
    try:
        for layout in LAYOUTS:
            pairs.clear()
            attention_context_parallel(
                *(part(t, layout) for t in sequence()), method="all_gather", layout=layout, is_causal=True
            )
            work = [None] * 4
            dist.all_gather_object(work, sum(pairs))
            length = LENGTH // 4
            if layout == "zigzag":
                assert work == [(length // 2) ** 2 * 9] * 4
            else:
                assert work == [length**2 * n for n in (1, 2, 3, 4)]
    finally:
        context_parallel.attention = real


@on_ranks(4)
def test_a_group_may_be_a_part_of_the_ranks_and_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    q, k, v = (t[mesh.get_local_rank("data")][None] for t in sequence())
    expected = diffmax.attention(q, k, v, is_causal=True).chunk(2, 2)[mesh.get_local_rank("context")]
    mine = [t.chunk(2, 2)[mesh.get_local_rank("context")] for t in (q, k, v)]
    for group in (mesh["context"], mesh.get_group("context")):
        for method in EVERY:
            out = attention_context_parallel(*mine, group=group, method=method, is_causal=True)
            assert float((out - expected).abs().max()) <= 1e-13
    with pytest.raises(ValueError, match="DeviceMesh of one dimension, got 2"):
        attention_context_parallel(*mine, group=mesh)


@on_ranks(2)
def test_arguments_that_do_not_fit_raise_on_every_rank():
    q, k, v = (part(t, "contiguous") for t in sequence(4, 2))
    ours = {"enable_gqa": True}
    for given, options, error, match in (
        ((q, k, v), {}, ValueError, "pass enable_gqa=True"),
        (
            (q[:, :3], k[:, :1], v[:, :1]),
            ours,
            ValueError,
            r"got 3 query heads and 1 key heads for 2 ranks\npass method=\"all_g",
        ),
        ((q, k[:, :1], v[:, :1]), ours, ValueError, "got 4 query heads and 1 key heads for 2 ranks"),
        (
            (q, k, v),
            {**ours, "method": "ring"},
            ValueError,
            "method must be one of auto, ulysses, all_gather, live_blocks, got 'ring'",
        ),
        ((q, k, v), {**ours, "layout": "striped"}, ValueError, "layout must be one of contiguous, zigzag, got 'striped'"),
        ((q[:, :, :9], k[:, :, :9], v[:, :, :9]), {**ours, "layout": "zigzag"}, ValueError, "got 9 tokens\npad to an even one"),
        ((q[:, :, :9], k, v), ours, ValueError, "must have the same length on a rank, got 9 and 24"),
        (
            (q, k, v),
            {**ours, "method": "all_gather", "window_size": (5, 5)},
            ValueError,
            r'takes a window or ALiBi with is_causal=True, got window_size=\(5, 5\)\npass method="ulysses"',
        ),
        (
            (q, k, v),
            {**ours, "method": "all_gather", "alibi_slopes": torch.ones(q.shape[1])},
            ValueError,
            r'takes a window or ALiBi with is_causal=True, got alibi_slopes\npass method="ulysses"',
        ),
        (
            (q, k, v),
            {**ours, "method": "live_blocks", "is_causal": True, "alibi_slopes": torch.ones(q.shape[1])},
            ValueError,
            r'takes no ALiBi, got alibi_slopes\npass method="all_gather"',
        ),
        (
            (q, k, v),
            {**ours, "method": "live_blocks", "is_causal": True, "window_size": (5, 0)},
            ValueError,
            r'takes no window, got window_size=\(5, 0\)\npass method="all_gather"',
        ),
        ((q, k, v), {**ours, "alpha": 1.5}, ValueError, "alpha"),
        ((q, k, v), {**ours, "sink": torch.zeros(3)}, ValueError, "sink must have one number per head"),
        ((q.int(), k, v), ours, TypeError, "query"),
    ):
        with pytest.raises(error, match=match):
            attention_context_parallel(*given, **options)


@on_ranks(2)
def test_calls_that_differ_raise_on_every_rank_and_name_rank_and_fact():
    rank = dist.get_rank()
    q, k, v = (part(t, "contiguous") for t in sequence())
    deeper = [t[..., : 6 - rank] for t in (q, k, v)]
    shapes = r"\(2, 4, 'tokens', 6\) on rank 0; \(2, 4, 'tokens', 5\) on rank 1"
    with pytest.raises(ValueError, match=rf"query's shape and .*got different ones\n  query's shape: {shapes}\n  key's shape"):
        attention_context_parallel(*deeper)
    for name, values in (("alpha", (0.5, 0.6)), ("is_causal", (True, False)), ("layout", LAYOUTS), ("method", METHODS)):
        with pytest.raises(
            ValueError, match=rf"{name} must be the same .*\n  {name}: '?{values[0]}'? on rank 0; '?{values[1]}'? on rank 1"
        ):
            attention_context_parallel(q, k, v, **{name: values[rank]})
    with pytest.raises(ValueError, match=r"alpha must be the same .*\n  alpha: \[0\.3.*\] on rank 0; \[0\.3.*\] on rank 1"):
        attention_context_parallel(q, k, v, alpha=torch.linspace(0.3, 0.5 + 0.1 * rank, q.shape[1]))
    with pytest.raises(ValueError, match=r"query's dtype: torch.float32 on rank 0; torch.float64 on rank 1"):
        attention_context_parallel(*((q, k, v) if rank else (t.float() for t in (q, k, v))))
    with pytest.raises(ValueError, match="what requires a gradient must be the same"):
        attention_context_parallel(q.clone().requires_grad_(rank == 0), k, v)
    learned = torch.full((4,), 0.5, dtype=(torch.float32, torch.float64)[rank]).requires_grad_()
    for what in ("alpha", "sink"):  # their gradients are summed over the ranks: these ended a process
        with pytest.raises(
            ValueError, match=rf"a gradient: \['{what} \(torch.float32\)'\] on rank 0; \['{what} \(torch.float64"
        ):
            attention_context_parallel(q, k, v, **{what: learned})
    invalid = "" if rank == 1 else r"got invalid ones on rank 1\n  rank 1: diffmax.*"
    with pytest.raises(ValueError, match=invalid + "alpha must lie"):
        attention_context_parallel(q, k, v, alpha=torch.tensor(1.5 if rank == 1 else 0.5))
    with pytest.raises(ValueError, match=invalid + "query must have values to send, got a tensor on the meta device"):
        attention_context_parallel(*(t.to("meta") if rank == 1 else t for t in (q, k, v)))
    if rank == 1:  # whatever it is that a rank's argument raises, the others hear of it
        k = Unreadable()
    with pytest.raises(ValueError if rank == 0 else ZeroDivisionError, match="this has no shape"):
        attention_context_parallel(q, k, v)


class Unreadable(torch.Tensor):
    """What raises something that no check expects."""

    @property
    def shape(self):
        """None."""
        raise ZeroDivisionError("this has no shape")


@on_ranks(2)
def test_a_dtensor_and_a_transform_are_refused():
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    q, k, v = sequence()
    own = [distribute_tensor(t, mesh, [Shard(2)]) for t in (q, k, v)]
    with pytest.raises(TypeError, match=r"query must be this rank's part, got a DTensor\npass query.to_local\(\)"):
        attention_context_parallel(*own)
    out = attention_context_parallel(*(t.to_local() for t in own), group=own[0].device_mesh)
    assert float((out - part(diffmax.attention(q, k, v), "contiguous")).abs().max()) <= 1e-13
    with pytest.raises(NotImplementedError, match=r"attention_context_parallel: torch\.func transforms"):
        torch.func.grad(lambda q: attention_context_parallel(q, k, v).sum())(q)


@on_ranks(2, 4)
def test_it_runs_inside_torchs_context_and_the_others_warn_there():
    """The order of tokens is that of torch's load balancer; a function that is given a part of the keys cannot know it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    query, key, value = torch.randn(3, 1, 4, 64, 16).unbind()
    expected = diffmax.attention(query, key, value, is_causal=True, alpha=0.5)
    shards = [t.clone() for t in (query, key, value)]
    with context_parallel(mesh, buffers=shards, buffer_seq_dims=[2, 2, 2]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = attention_context_parallel(*shards, is_causal=True, alpha=0.5, group=mesh, layout="zigzag")
        for function, more in (
            (diffmax.attention, {}),
            (diffmax.power_attention, {}),
            (diffmax.threshold_attention, {"threshold": 0.5}),
        ):
            with pytest.warns(UserWarning, match="keys of this rank alone"):
                function(*shards, **more)
        (whole,) = context_parallel_unshard(mesh, [out], [2])
    torch.testing.assert_close(whole, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffmax.attention(query, key, value)


@on_ranks(2)
def test_no_tokens_and_no_batch():
    for method in EVERY:
        for layout in LAYOUTS:
            for causal in (False, True):
                q, k, v = sequence(length=0)
                out = attention_context_parallel(q, k, v, method=method, layout=layout, is_causal=causal)
                assert out.shape == (2, 4, 0, DIM_V)
                q, k, v = (part(t[:0], layout) for t in sequence())
                out = attention_context_parallel(q, k, v, method=method, layout=layout, is_causal=causal)
                assert out.shape == (0, 4, LENGTH // 2, DIM_V)


@on_ranks(4)
def test_the_example_of_many_devices_trains_as_one_process_does():
    spec = importlib.util.spec_from_file_location("many_devices", Path(__file__).parents[1] / "examples" / "many_devices.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    losses, alone, error = example.difference(mesh)
    assert losses == pytest.approx(alone, rel=1e-11)
    assert losses[-1] < losses[0] / 2  # it learns
    assert error <= 1e-11
    weights = dict(example.Model(mesh).named_parameters())
    assert weights["head.weight"].shape[0] < example.VOCABULARY
    assert weights["layers.0.up.weight"].shape[0] == example.HIDDEN // 2


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"must be initialised, got no process group\ncall torch\.distributed"):
        attention_context_parallel(*sequence())


def test_the_table_of_the_documentation_follows_its_equations():
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+), (\d+) \| (\d) \| (.*) \| ([\d.]+) / ([\d.]+) GB \| ([\d.]+) GB \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for heads, kv_heads, size, exchanged, *rest in rows:
        heads, kv_heads, size = int(heads), int(kv_heads), int(size)
        both_dims, length, gigabytes = 2 * 128, 131072 // size, 2 / 1e9  # bfloat16
        gathered = (size - 1) * length * kv_heads * both_dims * gigabytes
        held = size * length * kv_heads * both_dims * gigabytes
        assert [float(x) for x in rest] == pytest.approx([gathered, 2 * gathered, held], abs=5.1e-3)
        if kv_heads % size == 0:
            sent = (size - 1) / size * length * (heads + kv_heads) * both_dims * gigabytes
            assert exchanged == f"{sent:.2f} / {sent:.2f} GB"


def test_the_table_beside_torchs_ring_is_the_benchmarks():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "distributed.md").read_text(encoding="utf-8")
    file = re.search(r"`(benchmarks/results/[^`]*context_parallel.json)`", page)[1]
    rows = json.loads((root / file).read_text())["rows"]
    found = {}
    for row in rows:
        assert row["correct"]
        ratio = row["ratio_torch's ring"]
        figure = f"{ratio:.2f}" if ratio != 1 else "1"
        line = found.setdefault((row["ranks"], row["causal"], row["operation"]), [])
        line.append(f"{figure} ({row['sent_bytes'] / 1e6:.1f}; {row['peak_bytes'] / 1e6:.0f})")
    for (size, causal, operation), figures in found.items():
        assert f"| {size} | {'yes' if causal else 'no'} | {operation} | {' | '.join(figures)} |" in page
