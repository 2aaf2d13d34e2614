"""torch.ops.diffmax.loss_sharded: the loss where every rank of a process group holds some of the classes of each row.

Plain PyTorch on any device, in blocks of rows. What is sent, and why it is enough: docs/distributed.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.common import messages
from diffmax.operators.common.autograd import differentiates
from diffmax.operators.common.numerics import accumulation_dtype, clamp_e, newton_steps
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.wiring import enter
from diffmax.operators.loss import terms
from diffmax.operators.loss.checks import _SUM_SLACK
from diffmax.operators.rows.sharded import alpha_of, invalid, solve, weights_at

# Scores of the longest part in one block of rows: each block has messages of its own.
BLOCK_ELEMENTS = 1 << 24
NAME = "diffmax_loss_sharded"
_ELSEWHERE, _IGNORED = -1, -2


class Arguments(NamedTuple):
    """Of torch.ops.diffmax.loss_sharded.

    Attributes:
        x: (R, c), this rank's classes of each row.
        target: int64 (R,), indices of all ranks' classes, the same on every rank; or (R, c), this rank's probabilities.
        weight: None, or (c,), this rank's.
        e, e_tensor: As of bisect; a tensor is (1, 1) or (R, 1).
        group: The name of a process group.
    """

    x: Tensor
    target: Tensor
    weight: Tensor | None
    e: float
    e_tensor: Tensor | None
    ignore_index: int
    n_iter: int
    group: str


class Results(NamedTuple):
    """All but `place` are the same on every rank.

    Attributes:
        losses, share: (R,) in the accumulation dtype: the losses without weights, and the weight of each row.
        place: (R,), where this rank has the class of a row, else a negative number; (0,) for probabilities.
        m, delta, total: (R, 1): the rows' maxima and thresholds, and the sums that weights are divided by.
    """

    losses: Tensor
    share: Tensor
    place: Tensor
    m: Tensor
    delta: Tensor
    total: Tensor


class BackwardArguments(NamedTuple):
    """Of torch.ops.diffmax.loss_sharded_backward; needs_e only with an e_tensor."""

    grad: Tensor
    x: Tensor
    target: Tensor
    weight: Tensor | None
    share: Tensor
    place: Tensor
    m: Tensor
    delta: Tensor
    total: Tensor
    e: float
    e_tensor: Tensor | None
    needs_x: bool
    needs_e: bool
    group: str


class Gradients(NamedTuple):
    """Each is (0,) if not needed; grad_e is the same on every rank, in e_tensor's shape."""

    grad_x: Tensor
    grad_e: Tensor


FORWARD = Schema("loss_sharded", Arguments, Results)
BACKWARD = Schema("loss_sharded_backward", BackwardArguments, Gradients)


def _loss(*flat: Any) -> Results:
    given = Arguments(*flat)
    counts = _agree(given)
    x, group, acc = given.x, given.group, accumulation_dtype(given.x.dtype)
    found = _empty_results(given)
    of_index = not given.target.is_floating_point()
    if of_index:
        found.place.copy_(_places(given, counts))
    else:
        found.share.copy_(_masses(given))
    steps = newton_steps(given.n_iter, sum(counts), given.e if given.e_tensor is None else 1.0, acc)
    for rows in _blocks(x.shape[0], max(counts)):
        row_e = given.e if given.e_tensor is None else given.e_tensor.expand(x.shape[0], 1)[rows]
        scores = x[rows].to(acc)
        p, m, delta, total = solve(scores, row_e, 1, steps, group)
        p = (p / torch.where(total > 0, total, 1.0)).masked_fill(invalid(m, row_e), torch.nan)
        found.m[rows], found.delta[rows], found.total[rows] = m, delta, total
        if of_index:
            found.losses[rows], found.share[rows] = _index_losses(given, scores, p, found.place[rows], m, delta, row_e)
        else:
            y = _probabilities(given.target[rows], given.weight, found.share[rows])
            part = terms.soft_losses(scores, y, p, m, delta, clamp_e(row_e), 1)
            found.losses[rows] = messages.all_reduce(part, "sum", group).squeeze(1)
    return found


def _index_losses(
    given: Arguments, scores: Tensor, p: Tensor, place: Tensor, m: Tensor, delta: Tensor, e: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. 18, of numbers that are sums over ranks: all but one have 0 for what belongs to the class of a row."""
    e = clamp_e(e)
    here, column = (place >= 0).unsqueeze(1), place.clamp_min(0).unsqueeze(1)
    nothing = p.new_zeros(p.shape[0], 1)
    p_y, x_y = (torch.where(here, t.gather(1, column), 0.0) if t.shape[1] else nothing for t in (p, scores))
    if p.shape[1]:
        p = p.scatter(1, column, torch.where(here, 0.0, p.gather(1, column)))
    parts = [p.sum(1, keepdim=True), p.pow(1 + e).sum(1, keepdim=True), p_y, x_y]
    if given.weight is not None:
        weight = given.weight.to(p.dtype)
        parts.append(torch.where(here, weight[column.squeeze(1)].unsqueeze(1), 0.0) if len(weight) else nothing)
    rest, powers, p_y, x_y, *weights = messages.all_reduce(torch.stack(parts), "sum", given.group)
    ignored = (place == _IGNORED).unsqueeze(1)
    losses = terms.index_losses(rest, powers, p_y, x_y, m, delta, e).masked_fill(ignored | (m == -torch.inf), 0.0)
    share = weights[0] if weights else torch.ones_like(m)
    return losses.squeeze(1), share.masked_fill(ignored, 0.0).squeeze(1)


def _loss_backward(*flat: Any) -> Gradients:
    """p - y, without a message, and the sum of Eq. 20 over the ranks."""
    given = BackwardArguments(*flat)
    x, acc = given.x, accumulation_dtype(given.x.dtype)
    grad_x = x.new_empty(x.shape if given.needs_x else (0,))
    slopes = x.new_empty((x.shape[0], 1) if given.needs_e else (0,), dtype=acc)
    for rows in _blocks(*x.shape):
        row_e = given.e if given.e_tensor is None else given.e_tensor.expand(x.shape[0], 1)[rows]
        p = weights_at(x[rows].to(acc), given.m[rows], given.delta[rows], given.total[rows], row_e)
        part = _gradients(given, rows, p, given.grad[rows].unsqueeze(1), clamp_e(row_e))
        if given.needs_x:
            grad_x[rows] = part.grad_x
        if given.needs_e:
            slopes[rows] = part.grad_e
    if not given.needs_e or given.e_tensor is None:
        return Gradients(grad_x, slopes)
    return Gradients(grad_x, messages.all_reduce(slopes.sum_to_size(given.e_tensor.shape), "sum", given.group))


def _gradients(given: BackwardArguments, rows: slice, p: Tensor, grad: Tensor, e: float | Tensor) -> Gradients:
    """Of some rows: this rank's part of Eq. 16, and its share of Eq. 20; in differentiable operators of p, grad and e."""
    idle = given.m[rows] == -torch.inf
    grad_x, grad_e = p.new_empty(0), p.new_empty(0)
    if given.target.is_floating_point():
        y = _probabilities(given.target[rows], given.weight, given.share[rows])
        slope = terms.omega_slopes(y, p, e, 1) if given.needs_e else None
    else:
        place = given.place[rows].unsqueeze(1)
        idle = idle | (place == _IGNORED)
        y = torch.zeros_like(p)
        if p.shape[1]:
            y = y.scatter(1, place.clamp_min(0), (place >= 0).to(p.dtype))
        slope = terms.omega_slopes(given.place[rows], p, e, 1) if given.needs_e else None
    if given.needs_x:
        grad_x = (grad * (p - y)).masked_fill(idle, 0.0)
    if slope is not None:
        grad_e = (grad * slope).masked_fill(idle, 0.0)
    return Gradients(grad_x, grad_e)


def _probabilities(target: Tensor, weight: Tensor | None, mass: Tensor) -> Tensor:
    """The target that is meant: with weights w*y / <w, y>."""
    y = target.to(mass.dtype)
    if weight is None:
        return y
    return y * weight.to(mass.dtype) / torch.where(mass == 0, 1.0, mass).unsqueeze(1)


def _masses(given: Arguments) -> Tensor:
    """<w, y> of every row, 1 without weights; the sums of y are checked, and so that none is negative."""
    y = given.target.to(accumulation_dtype(given.x.dtype))
    sums = torch.where((y < 0).any(1), torch.nan, y.sum(1))
    parts = sums if given.weight is None else torch.stack([sums, y @ given.weight.to(y.dtype)])
    sums, *masses = messages.all_reduce(parts, "sum", given.group).view(1 if given.weight is None else 2, y.shape[0])
    if not bool(((sums - 1).abs() <= _SUM_SLACK).all()):
        raise ValueError(
            f"{NAME}: probabilities must not be negative and must sum to 1 over the classes of all ranks, got sums from "
            f"{sums.min().item():g} to {sums.max().item():g}"
        )
    return masses[0] if masses else torch.ones_like(sums)


def _places(given: Arguments, counts: list[int]) -> Tensor:
    """Which class of this rank's the target of a row is."""
    target, ignored = given.target, given.target == given.ignore_index
    fine = ((target >= 0) & (target < sum(counts))) | ignored
    if not bool(fine.all()):
        raise ValueError(
            f"{NAME}: class indices must lie in [0, {sum(counts) - 1}], of the classes of all ranks, or equal ignore_index = "
            f"{given.ignore_index}, got {target[~fine][0].item()}"
        )
    rank = messages.resolve(given.group).rank()
    place = target - sum(counts[:rank])
    place = torch.where((place >= 0) & (place < counts[rank]), place, _ELSEWHERE)
    return torch.where(ignored, _IGNORED, place)


def _agree(given: Arguments) -> list[int]:
    """See that all ranks make the same call; how many classes they have."""
    target = given.target
    of_index = not target.is_floating_point()
    code = int((target * torch.arange(1, 2 * len(target) + 1, 2, device=target.device)).sum()) if of_index else None
    facts = {
        "the number of rows": given.x.shape[0],
        "the dtype of X": given.x.dtype,
        "the dtype of target": target.dtype,
        "the checksum of target": code,
        "whether there are weights": given.weight is not None,
        "alpha": (1 - given.e) if given.e_tensor is None else alpha_of(given.e_tensor),
        "whether alpha requires a gradient": given.e_tensor is not None and given.e_tensor.requires_grad,
        "ignore_index": given.ignore_index,
        "n_iter": given.n_iter,
    }
    counts = messages.agree(NAME, facts, given.x.shape[1], None, given.group, given.x.device)
    if sum(counts) == 0:
        raise ValueError(f"{NAME}: the ranks must have at least one class together, got none")
    return counts


def _blocks(rows: int, classes: int) -> Iterator[slice]:
    height = max(1, BLOCK_ELEMENTS // max(1, classes))
    return (slice(start, start + height) for start in range(0, rows, height))


def _empty_results(given: Arguments) -> Results:
    x, rows = given.x, given.x.shape[0]
    acc = accumulation_dtype(x.dtype)
    losses, share = (x.new_empty(rows, dtype=acc) for _ in range(2))
    place = x.new_empty((0,) if given.target.is_floating_point() else (rows,), dtype=torch.int64)
    return Results(losses, share, place, *(x.new_empty((rows, 1), dtype=acc) for _ in range(3)))


def _loss_fake(*flat: Any) -> Results:
    return _empty_results(Arguments(*flat))


def _loss_backward_fake(*flat: Any) -> Gradients:
    given = BackwardArguments(*flat)
    x, e_tensor = given.x, given.e_tensor
    of_e = e_tensor.shape if given.needs_e and e_tensor is not None else (0,)
    return Gradients(x.new_empty(x.shape if given.needs_x else (0,)), given.m.new_empty(of_e))


class _Loss(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.loss_sharded in x, which is p - y, and in e (Eq. 20)."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Results:
        given = Arguments(*flat)
        with torch._C._AutoDispatchBelowAutograd():
            found = Results(*torch.ops.diffmax.loss_sharded(*given))
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(given.x, given.target, given.weight, *found[1:], given.e_tensor)
        ctx.e, ctx.group = given.e, given.group
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = dict(zip(Arguments._fields, ctx.needs_input_grad, strict=True))
        if grad is None:
            return (None,) * len(needs)
        *saved, e_tensor = ctx.saved_tensors
        grad_x, grad_e = torch.ops.diffmax.loss_sharded_backward(
            grad, *saved, ctx.e, e_tensor, needs["x"], needs["e_tensor"], ctx.group
        )
        found = {"x": grad_x, "e_tensor": grad_e}
        return tuple(found[name] if needed else None for name, needed in needs.items())


def _loss_autograd(*flat: Any) -> Any:
    given = Arguments(*flat)
    messages.refuse_transforms(NAME)
    if differentiates(given.x, given.e_tensor):
        return _Loss.apply(*given)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.loss_sharded(*given)


def _loss_backward_autograd(*flat: Any) -> Any:
    given = BackwardArguments(*flat)
    if not differentiates(given.grad, given.x, given.e_tensor):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.diffmax.loss_sharded_backward(*flat)
    # second derivative: the weights of all rows at once, as of an operator that has a backward
    e_tensor, group = given.e_tensor, given.group
    p = torch.ops.diffmax.bisect_sharded(given.x.to(given.grad.dtype), given.e, e_tensor, 1, 50, True, group)[0]
    e = given.e if e_tensor is None else messages.Hand.apply(e_tensor, group)
    grad = messages.Hand.apply(given.grad, group).unsqueeze(1)
    grad_x, slopes = _gradients(given, slice(None), p, grad, clamp_e(e))
    if not given.needs_e or e_tensor is None:
        return Gradients(grad_x.to(given.x.dtype), slopes)
    return Gradients(grad_x.to(given.x.dtype), messages.Add.apply(slopes.sum_to_size(e_tensor.shape), group))


enter(FORWARD, run=_loss, autograd=_loss_autograd, fake=_loss_fake)
enter(BACKWARD, run=_loss_backward, autograd=_loss_backward_autograd, fake=_loss_backward_fake)
