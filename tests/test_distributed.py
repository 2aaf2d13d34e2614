"""Rows that are spread over ranks: diffmax.distributed against the same rows on one process."""

import math
import re
from pathlib import Path

import entmax
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from diffmax import HillMap, diffmax_bisect, reference
from diffmax.distributed import attention_context_parallel, diffmax_bisect_sharded
from diffmax.operators.common import messages
from diffmax.operators.common.numerics import newton_steps
from diffmax.testing import gates
from diffmax.testing.oracle import solve_exactly
from diffmax.testing.pairs import every_pair
from diffmax.testing.rows.nasty import NASTY_ROWS
from tests import ranks

on_ranks = ranks.on_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ALPHAS = [0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99, 0.999]
inf, nan = math.inf, math.nan


def cuts(n, how):
    """Where each rank's part of a row of n entries begins and ends."""
    size = dist.get_world_size()
    bounds = {
        "even": [n * rank // size for rank in range(size + 1)],
        "uneven": [0, *(n - (n - 1) // 2**rank for rank in range(1, size)), n],
        "all on the first": [0] + [n] * size,
        "all on the last": [0] * size + [n],
    }[how]
    return bounds[dist.get_rank()], bounds[dist.get_rank() + 1]


def part(t, dim=-1, how="even"):
    """This rank's part of a tensor that is whole on every rank."""
    start, end = cuts(t.shape[dim], how)
    return t.narrow(dim, start, end - start)


def forward_passes(x, alpha, dim, how):
    ((exact, gate),) = gates(lambda x: reference.bisect(x, 1 - alpha, dim % (x.ndim - 1) + 1, 200, True)[0], x, stacked=True)
    p = diffmax_bisect_sharded(part(x, dim, how), alpha, dim)
    mine = part(exact, dim, how)
    assert p.dtype == x.dtype
    assert p.shape == mine.shape
    error = float((p.double() - mine).abs().max()) if mine.numel() else 0.0
    assert error <= gate, f"{x.dtype} {tuple(x.shape)} alpha={alpha} {how}: error {error:.3g}, allowed {gate:.3g}"


@on_ranks(2, 4)
def test_the_weights_pass_the_gate():
    for dtype, alpha, sigma in every_pair(DTYPES, ALPHAS, (0.3, 1.0, 10.0)):
        forward_passes((torch.randn(3, 63) * sigma).to(dtype), alpha, 1, "even")
    for dtype in DTYPES:
        forward_passes(torch.randn(2, 4099).to(dtype), 0.5, 1, "even")
        forward_passes(torch.randn(2, 9, 5).to(dtype), 0.9, 1, "even")
        forward_passes(torch.randn(4, 1).to(dtype), 0.5, 1, "even")


@on_ranks(2, 4)
def test_parts_may_be_uneven_and_empty():
    for how in ("uneven", "all on the first", "all on the last"):
        for dtype in DTYPES:
            for alpha in (0.1, 0.5, 0.9):
                forward_passes(torch.randn(3, 21).to(dtype), alpha, 1, how)
                forward_passes(torch.randn(21, 2).to(dtype), alpha, 0, how)


@on_ranks(2, 4)
def test_nasty_rows_pass_the_gate():
    for name, row in NASTY_ROWS.items():
        for dtype in (torch.float64, torch.float32):
            for alpha in (0.1, 0.5, 0.99):
                x = torch.tensor([row], dtype=dtype)
                try:
                    forward_passes(x, alpha, 1, "even")
                except AssertionError as error:
                    raise AssertionError(f"row {name!r}: {error}") from None


@on_ranks(2)
def test_the_weights_are_those_of_forty_digits_and_of_entmax():
    x = torch.randn(2, 11, dtype=torch.float64) * 2
    for alpha in (0.2, 0.5, 0.95):
        p = diffmax_bisect_sharded(part(x), alpha)
        exact = torch.tensor([[float(w) for w in solve_exactly(row.tolist(), alpha)] for row in x], dtype=torch.float64)
        assert float((p - part(exact)).abs().max()) <= 1e-13
        other = entmax.entmax_bisect(x, 2 - alpha, dim=-1, n_iter=100)
        assert float((p - part(other)).abs().max()) <= 1e-12  # entmax's own digits


@on_ranks(2, 4)
def test_masked_rows_and_masked_parts():
    x = torch.randn(4, 12, dtype=torch.float64)
    x[0] = -inf  # nothing visible on any rank
    start, end = 0, 12 // dist.get_world_size()
    x[1, start:end] = -inf  # nothing visible on the first rank
    x[2, 1:] = -inf  # nothing visible on any other rank
    whole, own = x.clone().requires_grad_(), part(x).clone().requires_grad_()
    expected, p = diffmax_bisect(whole, 0.5, backend="reference"), diffmax_bisect_sharded(own, 0.5)
    grad = torch.randn(4, 12, dtype=torch.float64)
    expected.backward(grad)
    p.backward(part(grad))
    assert not p[0].any()
    assert not own.grad[0].any()
    for ours, theirs in ((p, part(expected)), (own.grad, part(whole.grad))):
        assert float((ours - theirs).abs().max()) <= 1e-13


@on_ranks(2, 4)
def test_nan_or_infinity_on_one_rank_spoils_that_row_on_every_rank():
    for bad in (nan, inf):
        for column in (0, 11):
            x = torch.randn(3, 12)
            x[1, column] = bad
            own = part(x).clone().requires_grad_()
            p = diffmax_bisect_sharded(own, 0.5)
            p.sum().backward()
            for t in (p, own.grad):
                assert bool(t[1].isnan().all())
                assert not bool(t[[0, 2]].isnan().any())


@on_ranks(2, 4)
def test_rows_without_entries_and_no_rows():
    for shape in ((3, 0), (0, 3)):
        x = torch.randn(shape, requires_grad=True)
        p = diffmax_bisect_sharded(x, 0.5)
        assert p.shape == shape
        p.sum().backward()


@on_ranks(2)
def test_an_alpha_tensor_outside_its_range_gives_nan_in_its_rows():
    x, e = torch.randn(3, 4), torch.tensor([[0.5], [1.5], [nan]])
    p = torch.ops.diffmax.bisect_sharded(x, 0.0, e, 1, 50, True, dist.group.WORLD.group_name)[0]
    assert p.isnan().any(1).tolist() == [False, True, True]


@on_ranks(2)
def test_the_ends_of_alpha_are_sparsemax_and_softmax():
    x = torch.randn(3, 10, dtype=torch.float64)
    assert float((diffmax_bisect_sharded(part(x), torch.ones(())) - part(x.softmax(-1))).abs().max()) <= 1e-13
    sparsemax = entmax.sparsemax(x, dim=-1)
    assert float((diffmax_bisect_sharded(part(x), torch.zeros(())) - part(sparsemax)).abs().max()) <= 1e-13


@on_ranks(2)
def test_without_the_division_the_sum_is_one_to_the_solvers_tolerance_and_n_iter_bounds_it():
    x = torch.randn(64, 50, dtype=torch.float64)
    p = diffmax_bisect_sharded(part(x), 0.5, ensure_sum_one=False)
    total = p.sum(-1)
    dist.all_reduce(total)
    assert float((total - 1).abs().max()) <= 1e-13
    rough = diffmax_bisect_sharded(part(x), 0.5, n_iter=1, ensure_sum_one=False).sum(-1)
    dist.all_reduce(rough)
    assert float((rough - 1).abs().max()) > 1e-9
    assert bool((rough.log() <= 2.0**-1 * math.log(50)).all())  # Eq. 13


@on_ranks(2, 4)
def test_the_backward_operator_passes_the_gate():
    """On given residuals, as decision 0011 has it."""
    group = dist.group.WORLD.group_name
    for dtype in DTYPES:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        for alpha in ALPHAS:
            x, grad = (torch.randn(3, 2, 37).to(dtype) for _ in range(2))
            kept = x if dtype == torch.float16 else None
            e = torch.full((2, 1), 1 - alpha, dtype=acc)
            saved = reference.bisect(x, e, 2, 50, True)

            def backward(*given, e=e, kept=kept):
                grad_x, grad_e = reference.bisect_backward(*given, kept, e.to(given[2].dtype), 2, True)
                return grad_x, grad_e.sum(0)

            wanted = gates(backward, grad, *saved)
            own = [part(t) if t is not None and t.shape[2] > 1 else t for t in (grad, *saved, kept)]
            grad_x, grad_e = torch.ops.diffmax.bisect_sharded_backward(*own, 0.0, e, 2, True, group)
            for ours, mine, gate in ((grad_x, part(wanted[0].exact), wanted[0].allowed), (grad_e, *wanted[1])):
                error = float((ours.double() - mine).abs().max())
                assert error <= gate, f"{dtype} alpha={alpha}: error {error:.3g}, allowed {gate:.3g}"


@on_ranks(2, 4)
def test_gradients_and_second_derivatives_are_those_of_the_whole_rows():
    """In float64: in the scores and in alpha, of the weights, and of a function of both first gradients."""
    for how in ("even", "uneven", "all on the last"):
        for alpha in (0.1, 0.5, 0.6, 0.9, 0.999):
            x, grad, v = (torch.randn(2, 3, 21, dtype=torch.float64) for _ in range(3))
            u = torch.randn(3, 1, dtype=torch.float64)
            results = []
            for ours in (False, True):
                mine = (lambda t, how=how: part(t, how=how)) if ours else (lambda t: t)
                leaf = mine(x).clone().requires_grad_()
                a = torch.full((3, 1), alpha, dtype=torch.float64, requires_grad=True)
                p = diffmax_bisect_sharded(leaf, a) if ours else diffmax_bisect(leaf, a, backend="reference")
                g = mine(grad).clone().requires_grad_()
                first = torch.autograd.grad(p, (leaf, a), g, create_graph=True)
                second = torch.autograd.grad(first, (leaf, a, g), (mine(v), u))
                results.append([*first, *second])
            for whole, own in zip(*results, strict=True):
                mine = part(whole, how=how) if whole.shape == x.shape else whole
                allowed = 1e-13 * max(1.0, float(whole.abs().max()))
                assert mine.numel() == 0 or float((own - mine).abs().max()) <= allowed


@on_ranks(2, 4)
def test_gradients_of_narrow_dtypes_are_right_on_average():
    """Forward and backward together, by the mean error, as decision 0011 has it."""
    for dtype in DTYPES[1:]:
        for alpha in (0.1, 0.5, 0.9, 0.99):
            x, grad = (torch.randn(200, 37).to(dtype) for _ in range(2))

            def both(x, grad, e=1 - alpha):
                kept = x if x.dtype == torch.float16 else None
                return reference.bisect_backward(grad, *reference.bisect(x, e, 2, 200, True), kept, e, 2, True)

            wanted = gates(both, x, grad, average=True, stacked=True)
            leaf, a = part(x).clone().requires_grad_(), torch.full((200, 1), alpha, dtype=torch.float64, requires_grad=True)
            diffmax_bisect_sharded(leaf, a).backward(part(grad))
            for ours, truth, gate in (
                (leaf.grad, part(wanted[0].exact), wanted[0].allowed),
                (-a.grad, *wanted[1]),
            ):
                error = float((ours.double() - truth).abs().mean())
                assert error <= gate, f"{dtype} alpha={alpha}: {error:.3g}, allowed {gate:.3g}"


@on_ranks(2)
def test_the_second_derivative_in_float16_has_the_weights_that_p_has_lost():
    x = (torch.randn(8, 40) * 2).half()
    results = []
    for how, cast in (("whole", torch.float64), ("whole", torch.float16), ("own", torch.float16)):
        leaf = (x if how == "whole" else part(x)).to(cast).clone().requires_grad_()
        p = diffmax_bisect(leaf, 0.6, backend="reference") if how == "whole" else diffmax_bisect_sharded(leaf, 0.6)
        (first,) = torch.autograd.grad(p.double().square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.double().square().sum(), leaf)
        results.append(part(second).double() if how == "whole" else second.double())
    exact, yardstick, ours = results
    assert float((ours - exact).abs().mean()) <= 2 * float((yardstick - exact).abs().mean()) + 2 * 2.0**-10


@on_ranks(2, 4)
def test_alpha_may_be_a_float_a_tensor_a_function_or_learned():
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64)
    per_head = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64).view(3, 1, 1)
    log_beta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for alpha in (0.5, torch.tensor(0.5), per_head, lambda: per_head, lambda: HillMap(0.3)(log_beta.exp())):
        p = diffmax_bisect_sharded(part(x), alpha)
        assert float((p - part(diffmax_bisect(x, alpha, backend="reference"))).abs().max()) <= 1e-13
    p.square().sum().backward()
    own, log_beta.grad = log_beta.grad, None
    diffmax_bisect(x, HillMap(0.3)(log_beta.exp())).square().sum().backward()
    torch.testing.assert_close(own, log_beta.grad, rtol=1e-12, atol=1e-12)


@on_ranks(2, 4)
def test_what_is_sent_is_what_the_documentation_says():
    """Sizes of every message: the agreement, the maxima, two numbers per row and one in each iteration, two in backward."""
    sent, real = [], messages.all_reduce

    def recorded(t, operation, group):
        sent.append((t.numel(), operation))
        return real(t, operation, group)

    messages.all_reduce = recorded
    try:
        x = part(torch.randn(5, 400)).clone().requires_grad_()
        alpha = torch.full((5, 1), 0.85, requires_grad=True)
        p = diffmax_bisect_sharded(x, alpha)
        forward, sent[:] = list(sent), []
        p.sum().backward()
        backward, sent[:] = list(sent), []
        diffmax_bisect_sharded(x, 0.85).sum().backward()
    finally:
        messages.all_reduce = real
    assert forward[:2] == [(40 + dist.get_world_size(), "max"), (5, "max")]
    assert forward[2:] == [(11, "sum")] * len(forward[2:])
    assert 2 <= len(forward[2:]) <= 5 < newton_steps(50, 400, 0.15, torch.float32)
    assert backward == [(10, "sum"), (5, "sum")]
    assert sent[-1] == (10, "sum")


@on_ranks(1, marks=[pytest.mark.slow])
def test_the_number_of_evaluations_is_what_the_documentation_says():
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    table = [
        [float(cell) for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| 0\.\d+(?: \| \d+)+ \|$", page, re.MULTILINE)
    ]
    assert [row[0] for row in table] == [0.1, 0.5, 0.85, 0.99]
    sent, real = [], messages.all_reduce
    messages.all_reduce = lambda *message: (sent.append(message), real(*message))[1]
    try:
        for alpha, *documented in table:
            for sigma, evaluations in zip((0.3, 1.0, 3.0, 10.0), documented, strict=True):
                sent.clear()
                diffmax_bisect_sharded(torch.randn(64, 4096) * sigma, alpha)
                assert abs(len(sent) - 2 - evaluations) <= 1, f"alpha={alpha} sigma={sigma}: {len(sent) - 2}"
    finally:
        messages.all_reduce = real


@on_ranks(4)
def test_a_group_may_be_a_part_of_the_ranks_and_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "rows"))
    x = torch.randn(2, 3, 8, dtype=torch.float64)[mesh.get_local_rank("data")]
    expected = diffmax_bisect(x, 0.5, backend="reference")
    own = x.chunk(2, -1)[mesh.get_local_rank("rows")]
    for group in (mesh["rows"], mesh.get_group("rows")):
        p = diffmax_bisect_sharded(own, 0.5, group=group)
        assert float((p - expected.chunk(2, -1)[mesh.get_local_rank("rows")]).abs().max()) <= 1e-13
    with pytest.raises(ValueError, match="DeviceMesh of one dimension, got 2"):
        diffmax_bisect_sharded(own, 0.5, group=mesh)


@on_ranks(2)
def test_a_rank_outside_the_group_is_told_so():
    group = dist.new_group([0])
    x = torch.randn(3, 4, dtype=torch.float64)
    if dist.get_rank() == 0:
        p = diffmax_bisect_sharded(x, 0.5, group=group)
        assert float((p - diffmax_bisect(x, 0.5, backend="reference")).abs().max()) <= 1e-13
    else:
        with pytest.raises(ValueError, match="must be a member of group"):
            diffmax_bisect_sharded(x, 0.5, group=group)


@on_ranks(2)
def test_ranks_that_disagree_all_raise_and_none_waits():
    rank = dist.get_rank()
    calls = {
        r"the shape of X .*: \[3, 'dim'\] on rank 0; \[4, 'dim'\] on rank 1": lambda: diffmax_bisect_sharded(
            torch.randn(3 + rank, 4), 0.5
        ),
        "the dtype of X: torch.float64 on rank 0; torch.float32 on rank 1": lambda: diffmax_bisect_sharded(
            torch.randn(3, 4).to(DTYPES[rank]), 0.5
        ),
        r"alpha: '\[0.5, .*\] of shape \(3, 1\), checksum [0-9a-f]{8}' on rank 0; 0.5 on rank 1": lambda: (
            diffmax_bisect_sharded(torch.randn(3, 4), 0.5 if rank else torch.full((3, 1), 0.5))
        ),
        r"alpha: '\[0.5, .*\] of shape .*' on rank 0; '\[0.6\d*, .*\] of shape .*' on rank 1": lambda: diffmax_bisect_sharded(
            torch.randn(3, 4), torch.full((3, 1), 0.5 + 0.1 * rank)
        ),
        r"alpha: 0.5 on rank 0; 0.6\d* on rank 1": lambda: diffmax_bisect_sharded(
            torch.randn(3, 4), torch.tensor(0.5 + 0.1 * rank)
        ),
        r"alpha: .*\n  whether alpha requires a gradient: True on rank 0; False on rank 1": lambda: diffmax_bisect_sharded(
            torch.randn(3, 4), torch.tensor(0.5).requires_grad_(rank == 0)
        ),
        r"n_iter: 20 on rank 0; 21 on rank 1\n  ensure_sum_one: False on rank 0; True on rank 1": lambda: (
            diffmax_bisect_sharded(torch.randn(3, 4), 0.5, -1, 20 + rank, bool(rank))
        ),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=f"must be the same on every rank, got different ones\n  {what}"):
            call()
    with pytest.raises(
        ValueError, match="alpha must lie" if rank else "invalid ones on rank 1\n  rank 1: diffmax.*alpha must lie"
    ):
        diffmax_bisect_sharded(torch.randn(3, 4), 0.5 + rank)
    other = attention_context_parallel if rank else diffmax_bisect_sharded
    with pytest.raises(
        ValueError, match=r"the function: 'diffmax_bisect_sharded' on rank 0; 'diffmax\.distributed\.att.*' on rank 1"
    ):
        other(*torch.randn(3, 1, 2, 4, 4)[: 3 if rank else 1])
    diffmax_bisect_sharded(torch.randn(3, 4), 0.5 if rank else torch.tensor(0.5))  # the same number
    diffmax_bisect_sharded(torch.randn(3, 4 + rank), 0.5)  # lengths along dim may differ, and nothing is left of the errors


@on_ranks(2)
def test_forward_mode_and_transforms_are_refused():
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match=r"forward-mode differentiation are not supported\nuse reverse mode"):
        torch.func.jvp(lambda t: diffmax_bisect_sharded(t, 0.5), (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.grad(lambda t: diffmax_bisect_sharded(t, 0.5).sum())(x)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda t: diffmax_bisect_sharded(t, 0.5))(x)


@on_ranks(2, marks=[pytest.mark.slow])
def test_compiled_it_stays_one_operator():
    x = torch.randn(3, 7 + dist.get_rank(), requires_grad=True)
    alpha = torch.full((1,), 0.5, requires_grad=True)

    def weigh(x, alpha):
        return diffmax_bisect_sharded(x * 1.5, alpha) * 2

    results = []
    for function in (weigh, torch.compile(weigh, backend="aot_eager", fullgraph=True)):
        y = function(x, alpha)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, alpha))))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@on_ranks(1, marks=[pytest.mark.slow])
def test_opcheck():
    group = dist.group.WORLD.group_name
    for dtype in DTYPES:
        x = torch.randn(3, 4).to(dtype).requires_grad_()
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        e = torch.full((3, 1), 0.5, dtype=acc)
        torch.library.opcheck(torch.ops.diffmax.bisect_sharded.default, (x, 0.5, None, 1, 50, True, group))
        for learned in (False, True):
            arguments = (x, 0.0, e.clone().requires_grad_(learned), 1, 50, True, group)
            torch.library.opcheck(torch.ops.diffmax.bisect_sharded.default, arguments)
            saved = torch.ops.diffmax.bisect_sharded(x.detach(), 0.0, e, 1, 50, True, group)
            kept = x.detach() if dtype == torch.float16 else None
            arguments = (torch.randn(3, 4).to(dtype), *saved, kept, 0.0, e, 1, learned, group)
            torch.library.opcheck(torch.ops.diffmax.bisect_sharded_backward.default, arguments)


@on_ranks(1)
def test_arguments_are_checked():
    with pytest.raises(ValueError, match="dim must lie in"):
        diffmax_bisect_sharded(torch.randn(3, 4), 0.5, 2)
    with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1"):
        diffmax_bisect_sharded(torch.randn(3, 4), 1.5)
    with pytest.raises(ValueError, match="must have a dimension to be sharded along, got a scalar"):
        diffmax_bisect_sharded(torch.tensor(1.0), 0.5)
    with pytest.raises(TypeError, match="group must be a ProcessGroup, a DeviceMesh or None, got str"):
        diffmax_bisect_sharded(torch.randn(3), 0.5, group="rows")


def test_without_a_process_group_it_says_what_to_call():
    with pytest.raises(RuntimeError, match=r"must be initialised, got no process group\ncall torch\.distributed\.init"):
        diffmax_bisect_sharded(torch.randn(3), 0.5)
