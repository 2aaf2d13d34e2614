"""The loss of classes that are sharded over ranks, and of DTensors, against the same loss on one process."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import diffmax
from diffmax.distributed import diffmax_loss_sharded
from diffmax.operators.common import messages
from diffmax.operators.loss import sharded
from tests import ranks

CLASSES = 23


def on_ranks(*sizes, marks=()):
    """As `ranks.on_ranks`, on plain PyTorch: there is nothing to compile on each rank."""

    def decorate(body):
        test = ranks.on_ranks(*sizes, marks=marks)(body)
        test.body = diffmax.use_backend("cpu")(body)
        return test

    return decorate


def shares(how, classes=CLASSES):
    """How many classes each rank has."""
    size = dist.get_world_size()
    return {
        "even": [classes // size + (rank < classes % size) for rank in range(size)],
        "none on the last": [classes // (size - 1) + (rank < classes % (size - 1)) for rank in range(size - 1)] + [0],
        "all on the last": [0] * (size - 1) + [classes],
    }[how]


def part(t, how="even", dim=1):
    """This rank's classes of a tensor that is whole on every rank."""
    return t.split(shares(how, t.shape[dim]), dim)[dist.get_rank()].contiguous()


def indices(*rows):
    target = torch.randint(CLASSES, rows)
    target.view(-1)[0] = -100
    return target


def probabilities(*shape):
    p = torch.rand(shape, dtype=torch.float64).softmax(1)
    p[0] = 0
    p[0, 3] = 1
    return p


def same(x, target, alpha, how, digits=1e-12, dim=1, **options):
    """The loss and the gradients in the scores and in alpha are those of the whole; returns the loss."""
    weight = options.pop("weight", None)
    is_soft = target.is_floating_point()
    results = []
    for ours in (False, True):
        leaf = (part(x, how, dim) if ours else x).clone().requires_grad_()
        a = alpha.clone().requires_grad_() if isinstance(alpha, torch.Tensor) else alpha
        if ours:
            own = part(target, how, dim) if is_soft else target
            loss = diffmax_loss_sharded(leaf, own, a, weight=None if weight is None else part(weight, how, 0), **options)
        else:
            loss = diffmax.diffmax_loss(leaf, target, a, weight=weight, backend="reference", **options)
        grad = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view_as(loss)
        learned = (leaf, a) if isinstance(a, torch.Tensor) else (leaf,)
        results.append((loss, *torch.autograd.grad(loss, learned, grad)))
    for place, (truth, found) in enumerate(zip(*results, strict=True)):
        truth = part(truth, how, dim) if place == 1 else truth
        assert found.shape == truth.shape
        assert found.dtype == truth.dtype
        try:
            torch.testing.assert_close(found, truth, rtol=digits, atol=digits, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{alpha} {how} {options} {place}: {error}") from None
    return results[1][0].detach()


@on_ranks(2, 4)
def test_losses_and_gradients_are_those_of_the_whole_rows():
    for how in ("even", "none on the last", "all on the last"):
        for sigma in (0.5, 3.0):
            x = torch.randn(6, CLASSES, dtype=torch.float64) * sigma
            for target in (indices(6), probabilities(6, CLASSES)):
                for alpha in (0.1, 0.5, torch.tensor(0.9), torch.linspace(0.2, 0.99, 6, dtype=torch.float64).view(6, 1)):
                    for weight in (None, torch.rand(CLASSES, dtype=torch.float64)):
                        same(x, target, alpha, how, reduction="none", weight=weight)
                for reduction in ("mean", "sum"):
                    same(x, target, 0.5, how, reduction=reduction, weight=torch.rand(CLASSES, dtype=torch.float64))
                    same(x, target, 0.5, how, reduction=reduction)
    same(torch.randn(CLASSES, dtype=torch.float64), torch.tensor(4), 0.5, "even", dim=0)
    for alpha in (0.7, torch.rand(3, 1, 2, 1, dtype=torch.float64) / 2 + 0.2, torch.rand(2, 5, dtype=torch.float64) / 2 + 0.2):
        same(torch.randn(3, CLASSES, 2, 5, dtype=torch.float64), indices(3, 2, 5), alpha, "even")
        same(torch.randn(3, CLASSES, 2, 5, dtype=torch.float64), probabilities(3, CLASSES, 2, 5), alpha, "even")
    same(torch.randn(6, CLASSES, dtype=torch.float64), torch.tensor([7, 1, 7, 3, 7, 7]), 0.5, "even", ignore_index=7)


@on_ranks(2, 4)
def test_edges_are_those_of_the_whole_rows():
    x = torch.randn(6, CLASSES, dtype=torch.float64)
    x[0] = -math.inf  # a row that is all masked
    x[1, 4] = -math.inf  # a target that is masked
    x[2, 8] = math.nan
    x[3, 8] = math.inf
    x[4, 5] = 100.0  # loss 0
    target = torch.tensor([1, 4, 2, 2, 5, -100])
    loss = same(x, target, 0.5, "even", reduction="none")
    assert loss.isinf().tolist() == [False, True] + [False] * 4
    assert loss.isnan().tolist() == [False, False, True, True, False, False]
    assert float(loss[4]) == 0
    same(x[:0], target[:0], 0.5, "even", reduction="none")
    assert diffmax_loss_sharded(part(x[:0]), target[:0]).isnan()
    assert diffmax_loss_sharded(part(x[4:]), torch.tensor([-100, -100])).isnan()


@on_ranks(2, 4)
def test_narrow_dtypes_are_as_near_as_the_whole():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, target = (torch.randn(40, CLASSES) * 2).to(dtype), indices(40)
        for alpha in (0.1, 0.5, 0.9):
            exact = x.double().requires_grad_()
            truth = diffmax.diffmax_loss(exact, target, alpha, reduction="none")
            (slope,) = torch.autograd.grad(truth.sum(), exact)
            truth = truth.detach()
            whole, own = x.clone().requires_grad_(), part(x).clone().requires_grad_()
            there = diffmax.diffmax_loss(whole, target, alpha, reduction="none", backend="reference")
            here = diffmax_loss_sharded(own, target, alpha, reduction="none")
            there.sum().backward()
            here.sum().backward()
            here, there = here.detach(), there.detach()
            assert (
                float((here - truth).abs().mean())
                <= 2 * float((there - truth).abs().mean()) + 2 * torch.finfo(torch.float32).eps
            )
            yardstick = 2 * float((whole.grad - slope).abs().mean()) + 2 * torch.finfo(torch.float32).eps
            error = messages.all_reduce((own.grad - part(slope)).abs().sum(), "sum", dist.group.WORLD.group_name)
            assert float(error) / slope.numel() <= yardstick, (dtype, alpha)


@on_ranks(2)
def test_second_derivatives_are_those_of_the_whole_rows():
    x, u = torch.randn(5, CLASSES, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for target in (indices(5), probabilities(5, CLASSES)):
        for weight in (None, torch.rand(CLASSES, dtype=torch.float64)):
            results = []
            for ours in (False, True):
                leaf = (part(x) if ours else x).clone().requires_grad_()
                alpha = torch.full((5, 1), 0.7, dtype=torch.float64, requires_grad=True)
                outer = u.clone().requires_grad_()
                if ours:
                    own = part(target) if target.is_floating_point() else target
                    losses = diffmax_loss_sharded(
                        leaf, own, alpha, reduction="none", weight=None if weight is None else part(weight, dim=0)
                    )
                else:
                    losses = diffmax.diffmax_loss(leaf, target, alpha, reduction="none", weight=weight, backend="reference")
                first = torch.autograd.grad(losses, (leaf, alpha), outer, create_graph=True)
                # alpha's first gradient is one value on every rank, and counts once
                v = part(x.square()) if ours else x.square()
                second = torch.autograd.grad(first, (leaf, alpha, outer), (v, torch.ones_like(alpha)))
                results.append([*first, *second])
            for truth, found in zip(*results, strict=True):
                truth = part(truth) if truth.shape == x.shape else truth
                torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)


@on_ranks(2)
def test_in_blocks_it_is_the_same_and_a_large_vocabulary_fits():
    x, target, limit = torch.randn(11, CLASSES, dtype=torch.float64), indices(11), sharded.BLOCK_ELEMENTS
    sharded.BLOCK_ELEMENTS = 3 * 12
    try:
        same(x, target, torch.linspace(0.2, 0.99, 11, dtype=torch.float64).view(11, 1), "even", reduction="none")
        same(x, probabilities(11, CLASSES), torch.tensor(0.6), "even", weight=torch.rand(CLASSES, dtype=torch.float64))
    finally:
        sharded.BLOCK_ELEMENTS = limit
    x, target = torch.randn(4, 131072) * 2, torch.tensor([0, 131071, 65535, 65536])
    same(x, target, 0.5, "even", digits=1e-5, reduction="none")


@on_ranks(2, 4)
def test_what_is_sent_is_what_the_documentation_says():
    """Numbers of every message; bytes per token of 131072 classes, against those of the logits."""
    sent, real, size = [], messages.all_reduce, dist.get_world_size()
    rows = 5

    def recorded(t, operation, group):
        sent.append((t.numel(), operation, t.element_size()))
        return real(t, operation, group)

    messages.all_reduce = recorded
    try:
        x = torch.randn(rows, 131072 // size).to(torch.bfloat16).requires_grad_()
        weight, y = torch.rand(131072 // size), torch.full((rows, 131072 // size), 1 / 131072)
        for alpha in (0.85, torch.tensor(0.85, requires_grad=True)):
            for target, w, last, extra in (
                (torch.arange(rows), None, 4, 0),
                (torch.arange(rows), weight, 5, 0),
                (y, None, 1, 1),
                (y, weight, 1, 2),
            ):
                sent.clear()
                loss = diffmax_loss_sharded(x, target, alpha, weight=w)
                forward, sent[:] = list(sent), []
                loss.backward()
                first, *forward = forward
                assert first == (40 + size, "max", 8)
                if extra:
                    assert forward.pop(0) == (extra * rows, "sum", 4)
                assert forward[0] == (rows, "max", 4)
                assert forward[-1] == (last * rows, "sum", 4)
                assert forward[1:-1] == [(2 * rows + 1, "sum", 4)] * (len(forward) - 2)
                evaluations = len(forward) - 2
                assert 2 <= evaluations <= 8
                assert sent == ([(1, "sum", 4)] if isinstance(alpha, torch.Tensor) else [])
                per_token = sum(n * width for n, _, width in forward) / rows + 4 * extra
                assert per_token == pytest.approx(4 * (2 * evaluations + 1 + last + extra) + 4 * evaluations / rows)  # Eq. 45
                assert 131072 * 2 / per_token > 2000
    finally:
        messages.all_reduce = real


@on_ranks(2)
def test_wrong_arguments_and_ranks_that_differ_raise_on_every_rank():
    rank = dist.get_rank()
    x, target = torch.randn(4, 6), torch.tensor([0, 1, 11, -100])
    for given, options, match in (
        ((x, torch.tensor([0, 1, 12, 2])), {}, r"must lie in \[0, 11\], of the classes of all ranks, .* got 12"),
        ((x, torch.tensor([0, 1, -1, 2])), {}, "got -1"),
        ((x, torch.full((4, 6), 0.1)), {}, r"must sum to 1 over the classes of all ranks, got sums from 1\.2 to 1\.2"),
        ((x, torch.tensor([[-0.1, 0.6, 0, 0, 0, 0]]).expand(4, 6)), {}, "must not be negative"),
        ((x, target[:3]), {}, r"must have shape \(4,\), got \(3,\)"),
        ((x, target), {"reduction": "median"}, "reduction must be one of"),
        ((x, target), {"weight": torch.ones(7)}, "weight must hold one number per class"),
        ((x[:, :0], target), {}, "at least one class together, got none"),
        ((x, target + rank), {}, "the checksum of target must be the same on every rank"),
        ((x[: 3 + rank], target[: 3 + rank]), {}, "the number of rows: 3 on rank 0; 4 on rank 1"),
        (
            (x, target, 0.5 + 0.1 * rank),
            {},
            r"alpha: 0\.5 on rank 0; 0\.4?\d* on rank 1|alpha: 0\.5 on rank 0; 0\.6\d* on rank 1",
        ),
        (
            (x, target),
            {"weight": torch.ones(6) if rank else None},
            "whether there are weights: False on rank 0; True on rank 1",
        ),
        ((x, target, 0.5 + rank), {}, "alpha must lie strictly"),
    ):
        with pytest.raises(ValueError, match=match):
            diffmax_loss_sharded(*given, **options)
    with pytest.raises(NotImplementedError, match=r"diffmax_loss_sharded: torch\.func transforms"):
        torch.func.grad(lambda t: diffmax_loss_sharded(t, target))(x)
    assert diffmax_loss_sharded(x, target).isfinite()  # nothing is left of the errors


@on_ranks(2, marks=[pytest.mark.slow])
def test_compiled_it_stays_one_operator():
    x, target = torch.randn(4, 6 + dist.get_rank(), requires_grad=True), torch.tensor([0, 1, 11, -100])
    alpha = torch.full((1,), 0.5, requires_grad=True)

    def lose(x, alpha):
        return diffmax_loss_sharded(x * 1.5, target, alpha) * 2

    results = []
    for function in (lose, torch.compile(lose, backend="aot_eager", fullgraph=True)):
        y = function(x, alpha)
        results.append((y, *torch.autograd.grad(y, (x, alpha))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


@on_ranks(1, marks=[pytest.mark.slow])
def test_opcheck():
    group = dist.group.WORLD.group_name
    x, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 3, -100])
    e = torch.full((3, 1), 0.5)
    for y in (target, torch.full((3, 4), 0.25)):
        for e_tensor in (None, e, e.clone().requires_grad_()):
            arguments = (x, y, None, 0.5, e_tensor, -100, 50, group)
            torch.library.opcheck(torch.ops.diffmax.loss_sharded.default, arguments)
        found = torch.ops.diffmax.loss_sharded(x.detach(), y, None, 0.5, e, -100, 50, group)
        arguments = (torch.randn(3), x.detach(), y, None, *found[1:], 0.5, e, True, True, group)
        torch.library.opcheck(torch.ops.diffmax.loss_sharded_backward.default, arguments)


@on_ranks(2)
def test_a_dtensor_of_sharded_classes_is_not_gathered():
    """`diffmax_loss` itself; the hidden states times a weight whose rows are sharded, as tensor parallelism has them."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))
    hidden, head = torch.randn(8, 12, dtype=torch.float64), torch.randn(40, 12, dtype=torch.float64)
    class_weight = torch.rand(40, dtype=torch.float64)
    for target in (torch.randint(40, (8,)).index_fill(0, torch.tensor([2]), -100), probabilities(8, 40)):
        for reduction in ("mean", "sum", "none"):
            for weight in (None, class_weight):
                own = [
                    distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_(),
                    distribute_tensor(head, mesh, [Shard(0)]).requires_grad_(),
                    distribute_tensor(torch.full((1, 1), 0.6, dtype=torch.float64), mesh, [Replicate()]).requires_grad_(),
                ]
                whole = [t.detach().full_tensor().requires_grad_() for t in own]
                places = [Shard(1)] if target.is_floating_point() else [Replicate()]
                with CommDebugMode() as sent:
                    loss = diffmax.diffmax_loss(
                        own[0] @ own[1].T,
                        distribute_tensor(target, mesh, places, src_data_rank=None),
                        own[2],
                        weight=None if weight is None else distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None),
                        reduction=reduction,
                    )
                    loss.sum().backward()
                truth = diffmax.diffmax_loss(whole[0] @ whole[1].T, target, whole[2], weight=weight, reduction=reduction)
                truth.sum().backward()
                assert "all_gather_into_tensor" not in {str(op).split(".")[-1] for op in sent.get_comm_counts()}
                torch.testing.assert_close(loss.full_tensor(), truth)
                for found, expected in zip(own, whole, strict=True):
                    torch.testing.assert_close(found.grad.full_tensor(), expected.grad)
    with pytest.raises(TypeError, match="target must be a DTensor as X is"):
        diffmax.diffmax_loss(own[0] @ own[1].T, torch.zeros(8, dtype=torch.int64))


@on_ranks(4)
def test_rows_and_classes_are_sharded_together_in_a_mesh():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    x, target = torch.randn(5, 41, 3, dtype=torch.float64), torch.randint(41, (5, 3))
    for alpha, alpha_places in (
        (torch.full((1,), 0.6), [Replicate()] * 2),
        (torch.linspace(0.3, 0.9, 5).view(5, 1, 1), [Shard(0), Replicate()]),
    ):
        own = distribute_tensor(x, mesh, [Shard(0), Shard(1)]).requires_grad_()
        a = distribute_tensor(alpha.double(), mesh, alpha_places).requires_grad_()
        whole, b = x.clone().requires_grad_(), alpha.double().requires_grad_()
        loss = diffmax.diffmax_loss(own, distribute_tensor(target, mesh, [Shard(0), Replicate()]), a)
        truth = diffmax.diffmax_loss(whole, target, b)
        torch.testing.assert_close(loss.full_tensor(), truth)
        loss.backward()
        truth.backward()
        torch.testing.assert_close(own.grad.full_tensor(), whole.grad)
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)


def test_without_a_process_group_it_says_what_to_call():
    with pytest.raises(RuntimeError, match=r"must be initialised, got no process group\ncall torch\.distributed\.init"):
        diffmax_loss_sharded(torch.randn(3), torch.tensor(0))
