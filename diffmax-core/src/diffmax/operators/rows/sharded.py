"""torch.ops.diffmax.bisect_sharded: the row operator where every rank of a process group holds a part of each row.

Plain PyTorch on any device, like `diffmax.reference`. What is sent, and why it is enough: docs/distributed.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.common import messages
from diffmax.operators.common.autograd import differentiates
from diffmax.operators.common.numerics import MIN_E, accumulation_dtype, alpha_weight, clamp_e, newton_steps
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.wiring import enter
from diffmax.operators.rows.operator import Gradients, Results
from diffmax.reference.rows import _power


class Arguments(NamedTuple):
    """Of torch.ops.diffmax.bisect_sharded: as of bisect; x and p are this rank's part, m and delta are the same on every rank.

    group is the name of a process group.
    """

    x: Tensor
    e: float
    e_tensor: Tensor | None
    dim: int
    n_iter: int
    ensure_sum_one: bool
    group: str


class BackwardArguments(NamedTuple):
    """Of torch.ops.diffmax.bisect_sharded_backward: as of bisect_backward.

    grad_e is the same on every rank and has e_tensor's shape, or (0,) where it is not wanted.
    """

    grad: Tensor
    p: Tensor
    m: Tensor
    delta: Tensor
    x: Tensor | None
    e: float
    e_tensor: Tensor | None
    dim: int
    needs_e: bool
    group: str

    @property
    def given_e(self) -> float | Tensor:
        """The one of the two that counts."""
        return self.e if self.e_tensor is None else self.e_tensor


NAME = "diffmax_bisect_sharded"
FORWARD = Schema("bisect_sharded", Arguments, Results)
BACKWARD = Schema("bisect_sharded_backward", BackwardArguments, Gradients)


def _bisect(*flat: Any) -> Results:
    given = Arguments(*flat)
    x, e, e_tensor, dim, group = given.x, given.e, given.e_tensor, given.dim, given.group
    n = _agree(given)
    acc = accumulation_dtype(x.dtype)
    rows = _rows_of(x, dim)
    if n == 0 or math.prod(rows) == 0:
        return Results(x.new_empty(x.shape), x.new_full(rows, -torch.inf, dtype=acc), x.new_zeros(rows, dtype=acc))

    given_e = e if e_tensor is None else e_tensor
    steps = newton_steps(given.n_iter, n, e if e_tensor is None else 1.0, acc)
    p, m, delta, total = solve(x.to(acc), given_e, dim, steps, group)
    if given.ensure_sum_one:
        p = p / torch.where(total > 0, total, 1.0)
    p = p.masked_fill(invalid(m, given_e), torch.nan)
    return Results(p.to(x.dtype).contiguous(), m, delta)


def solve(scores: Tensor, e: float | Tensor, dim: int, steps: int, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows of which each rank has some scores: its [z - t]^k, and of the whole row the maximum, delta and the sum."""
    row_e = _row_e(e, scores)
    m = messages.all_reduce(_row_max(scores, dim), "max", group)
    z = row_e * (scores - torch.where(m == -torch.inf, 0.0, m))
    p, total, delta = _newton(z, m, row_e, dim, steps, group)
    return p, m, delta, total


def weights_at(scores: Tensor, m: Tensor, delta: Tensor, total: Tensor, e: float | Tensor) -> Tensor:
    """The weights of rows that are solved, without a message."""
    row_e = _row_e(e, scores)
    p = _power(row_e * (scores - torch.where(m == -torch.inf, 0.0, m)), delta, row_e)[0]
    return (p / torch.where(total > 0, total, 1.0)).masked_fill(invalid(m, e), torch.nan)


def invalid(m: Tensor, e: float | Tensor) -> Tensor:
    """Rows whose weights are NaN: they hold NaN or +inf, or their alpha is outside [0, 1]."""
    return (m == torch.inf) | ~torch.as_tensor((e >= 0) & (e <= 1), device=m.device)


def _row_e(e: float | Tensor, scores: Tensor) -> Tensor:
    given = torch.full((), e, dtype=scores.dtype, device=scores.device) if not isinstance(e, Tensor) else e
    return given.clamp_min(MIN_E)


def _newton(z: Tensor, m: Tensor, e: Tensor, dim: int, steps: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Solve every row for t = delta - 1 (Eq. 2): [z - t]^k of this rank, its sum over all ranks, and delta.

    All ranks must leave the loop together. A sum of floats may differ in its last digit from rank to rank, so that no rank
    decides on its own: each message also carries, from every rank, 1 if the step before it was not the last one to need
    another. That count is exact, and the message that ends the loop brings the sum that the weights are divided by.
    """
    eps = torch.finfo(z.dtype).eps
    # where N has a continuous second derivative (k >= 2), a step from below sqrt(eps) ends at rounding level
    near = torch.where(e <= 0.5, math.sqrt(eps), 4 * eps)
    delta = torch.zeros_like(m)
    unfinished = m.new_ones(1)
    for step in range(steps + 1):
        p, _, base = _power(z, delta, e)
        parts = [part.sum(dim, keepdim=True).flatten() for part in (p, p / base)]
        sums = messages.all_reduce(torch.cat([*parts, unfinished]), "sum", group)
        total, slope = sums[:-1].view(2, *m.shape)
        if step == steps or (step > 0 and float(sums[-1]) == 0):
            break
        # S - S^alpha = -S expm1(-e ln S): the difference of two numbers near 1, without cancellation
        update = -total * torch.expm1(-e * total.log()) / slope
        raised = torch.where(total - 1 > 4 * eps, delta + update, delta)  # NaN or nothing visible in the row: stays
        unfinished = ((total - 1 > near) & (raised > delta)).any().to(z.dtype).view(1)
        delta = raised
    return p, total, delta


def _bisect_fake(*flat: Any) -> Results:
    given = Arguments(*flat)
    m = given.x.new_empty(_rows_of(given.x, given.dim), dtype=accumulation_dtype(given.x.dtype))
    return Results(given.x.new_empty(given.x.shape), m, torch.empty_like(m))


def _bisect_backward(*flat: Any) -> Gradients:
    given = BackwardArguments(*flat)

    def add(part: Tensor) -> Tensor:
        return messages.all_reduce(part, "sum", given.group)

    grad_x, grad_e = _gradients(given, given.given_e, add)
    return Gradients(grad_x.contiguous(), add(grad_e) if given.needs_e else grad_e)


def _gradients(given: BackwardArguments, e: float | Tensor, add: Callable[[Tensor], Tensor]) -> Gradients:
    """Eq. 3 for this rank's scores, and this rank's share of the negative of Eq. 4; `add` sums over the ranks.

    Built from differentiable operators of grad, p and e, and so, with an `add` that is one, the second derivative too.
    """
    p, x, m, dim = given.p, given.x, given.m, given.dim
    acc = accumulation_dtype(p.dtype)
    row_e = clamp_e(e)
    if x is None:
        weights = p.to(acc)
        live = weights != 0  # NaN counts as live and so reaches the gradient
        log_p = torch.where(live, weights, 1.0).log()
    else:  # float16 has flushed small weights to zero
        shift = torch.where(m == -torch.inf, 0.0, m)
        weights, log_p, _ = _power(row_e * (x.to(acc) - shift), given.delta, row_e)
        live = (weights != 0) | p.isnan()
        weights, log_p = (torch.where(p.isnan(), torch.nan, t) for t in (weights, log_p))
    s = torch.where(live, torch.exp((1 - row_e) * log_p), 0.0)
    g = given.grad.to(acc)
    total, product = add(torch.stack([s.sum(dim, keepdim=True), (s * g).sum(dim, keepdim=True)])).unbind()
    centred = g - product / torch.where(total == 0, 1.0, total)
    grad_x = (s * centred).to(p.dtype)
    if not (given.needs_e and isinstance(e, Tensor)):
        return Gradients(grad_x, m.new_empty(0))
    share = -(alpha_weight(weights, log_p, row_e) * centred).sum(dim, keepdim=True)
    return Gradients(grad_x, share.sum_to_size(e.shape))


def _bisect_backward_fake(*flat: Any) -> Gradients:
    given = BackwardArguments(*flat)
    of_e = given.e_tensor.shape if given.needs_e and given.e_tensor is not None else (0,)
    return Gradients(given.p.new_empty(given.p.shape), given.m.new_empty(of_e))


class _Bisect(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.bisect_sharded in x (Eq. 3) and e (Eq. 4)."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Results:
        given = Arguments(*flat)
        with torch._C._AutoDispatchBelowAutograd():
            found = Results(*torch.ops.diffmax.bisect_sharded(*given))
        ctx.mark_non_differentiable(found.m, found.delta)
        ctx.save_for_backward(given.x if given.x.dtype == torch.float16 else None, given.e_tensor, *found)
        ctx.e, ctx.dim, ctx.group = given.e, given.dim, given.group
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, e_tensor, p, m, delta = ctx.saved_tensors
        needs = dict(zip(Arguments._fields, ctx.needs_input_grad, strict=True))
        # under create_graph=True this operator's own Autograd key makes its result differentiable again
        grad_x, grad_e = torch.ops.diffmax.bisect_sharded_backward(
            *BackwardArguments(grad, p, m, delta, x, ctx.e, e_tensor, ctx.dim, needs["e_tensor"], ctx.group)
        )
        found = {"x": grad_x, "e_tensor": grad_e}
        return tuple(found[name] if needed else None for name, needed in needs.items())


def _bisect_autograd(*flat: Any) -> Any:
    given = Arguments(*flat)
    messages.refuse_transforms(NAME)
    if differentiates(given.x, given.e_tensor):
        return _Bisect.apply(*given)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect_sharded(*given)


def _bisect_backward_autograd(*flat: Any) -> Any:
    given = BackwardArguments(*flat)
    if differentiates(given.grad, given.p, given.e_tensor):
        return _differentiable_gradients(given)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect_sharded_backward(*given)


def _differentiable_gradients(given: BackwardArguments) -> Gradients:
    """The backward, of operators that have a backward."""
    group, e_tensor = given.group, given.e_tensor
    if given.x is not None:
        # p leads on to x; where p has lost its small weights, a p in float32 that leads to x takes its place
        again = Arguments(given.x.float(), given.e, e_tensor, given.dim, 50, True, group)
        given = given._replace(p=torch.ops.diffmax.bisect_sharded(*again)[0], x=None)
    e = given.e if e_tensor is None else messages.Hand.apply(e_tensor, group)

    def add(part: Tensor) -> Tensor:
        handed: Tensor = messages.Hand.apply(messages.Add.apply(part, group), group)
        return handed

    grad_x, grad_e = _gradients(given, e, add)
    return Gradients(grad_x.to(given.grad.dtype), messages.Add.apply(grad_e, group) if given.needs_e else grad_e)


def _rows_of(x: Tensor, dim: int) -> list[int]:
    """The shape of what each row has one of."""
    return [*x.shape[:dim], 1, *x.shape[dim + 1 :]]


def _row_max(scores: Tensor, dim: int) -> Tensor:
    """The maximum of this rank's part, -inf where it is empty. NaN becomes +inf: all-reduced maxima may lose NaN."""
    if scores.shape[dim] == 0:
        return scores.new_full(_rows_of(scores, dim), -torch.inf)
    m = scores.amax(dim, keepdim=True)
    return torch.where(m.isnan(), torch.inf, m)


def _agree(given: Arguments) -> int:
    """See that all ranks make the same call; return a whole row's length."""
    x, dim, e_tensor = given.x, given.dim, given.e_tensor
    facts = {
        "the shape of X outside dim": [*x.shape[:dim], "dim", *x.shape[dim + 1 :]],
        "the dtype of X": x.dtype,
        "alpha": (1 - given.e) if e_tensor is None else alpha_of(e_tensor),
        "whether alpha requires a gradient": e_tensor is not None and e_tensor.requires_grad,
        "n_iter": given.n_iter,
        "ensure_sum_one": given.ensure_sum_one,
    }
    return sum(messages.agree(NAME, facts, x.shape[dim], None, given.group, x.device))


def alpha_of(e_tensor: Tensor) -> str:
    """A tensor alpha as a fact that ranks compare: its shape, its first values, and a code of all of them."""
    values = (1 - e_tensor.detach()).flatten().tolist()
    shown = ", ".join(f"{value:.9g}" for value in values[:4]) + ", ..." * (len(values) > 4)
    return f"[{shown}] of shape {tuple(e_tensor.shape)}, checksum {zlib.crc32(repr(values).encode()):08x}"


enter(FORWARD, run=_bisect, autograd=_bisect_autograd, fake=_bisect_fake)
enter(BACKWARD, run=_bisect_backward, autograd=_bisect_backward_autograd, fake=_bisect_backward_fake)
