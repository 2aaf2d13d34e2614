"""torch.ops.diffmax.bisect_sharded: the row operator where every rank of a process group holds a part of each row.

Plain PyTorch on any device, like `diffmax.reference`. What is sent, and why it is enough: docs/distributed.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.distributed_c10d import _get_group_size_by_name

from diffmax.operators.common.autograd import differentiates
from diffmax.operators.common.numerics import MIN_E, accumulation_dtype, alpha_weight, clamp_e, newton_steps
from diffmax.reference.rows import _power

_LIBRARY = torch.library.Library("diffmax", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

# Arguments as for diffmax::bisect; x and p are this rank's part, m, delta and the gradient for e are the same on every rank.
# group is the name of a process group. grad_e has e_tensor's shape, or (0,) where it is not wanted.
_LIBRARY.define(
    "bisect_sharded(Tensor x, float e, Tensor? e_tensor, int dim, int n_iter, bool ensure_sum_one, str group)"
    " -> (Tensor p, Tensor m, Tensor delta)",
    tags=_TAGS,
)
_LIBRARY.define(
    "bisect_sharded_backward(Tensor grad, Tensor p, Tensor m, Tensor delta, Tensor? x, float e, Tensor? e_tensor, int dim,"
    " bool needs_e, str group) -> (Tensor grad_x, Tensor grad_e)",
    tags=_TAGS,
)


def _bisect(x: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, group: str) -> Any:
    n = _agree(x, e, e_tensor, dim, n_iter, ensure_sum_one, group)
    acc = accumulation_dtype(x.dtype)
    row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    if n == 0 or math.prod(row_shape) == 0:
        return x.new_empty(x.shape), x.new_full(row_shape, -torch.inf, dtype=acc), x.new_zeros(row_shape, dtype=acc)

    scores = x.to(acc)
    given_e = torch.full((), e, dtype=acc, device=x.device) if e_tensor is None else e_tensor
    invalid_e = ~((given_e >= 0) & (given_e <= 1))
    row_e = given_e.clamp_min(MIN_E)
    m = _all_reduce(_row_max(scores, dim), "max", group)
    z = row_e * (scores - torch.where(m == -torch.inf, 0.0, m))
    steps = newton_steps(n_iter, n, e if e_tensor is None else 1.0, acc)
    p, total, delta = _newton(z, m, row_e, dim, steps, group)
    if ensure_sum_one:
        p = p / torch.where(total > 0, total, 1.0)
    p = p.masked_fill((m == torch.inf) | invalid_e, torch.nan)
    return p.to(x.dtype).contiguous(), m, delta


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
        sums = _all_reduce(torch.cat([*parts, unfinished]), "sum", group)
        total, slope = sums[:-1].view(2, *m.shape)
        if step == steps or (step > 0 and float(sums[-1]) == 0):
            break
        # S - S^alpha = -S expm1(-e ln S): the difference of two numbers near 1, without cancellation
        update = -total * torch.expm1(-e * total.log()) / slope
        raised = torch.where(total - 1 > 4 * eps, delta + update, delta)  # NaN or nothing visible in the row: stays
        unfinished = ((total - 1 > near) & (raised > delta)).any().to(z.dtype).view(1)
        delta = raised
    return p, total, delta


def _bisect_fake(
    x: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    m = x.new_empty(row_shape, dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), m, torch.empty_like(m)


def _bisect_backward(
    grad: Tensor,
    p: Tensor,
    m: Tensor,
    delta: Tensor,
    x: Tensor | None,
    e: float,
    e_tensor: Tensor | None,
    dim: int,
    needs_e: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    def add(part: Tensor) -> Tensor:
        return _all_reduce(part, "sum", group)

    grad_x, grad_e = _gradients(grad, p, m, delta, x, e if e_tensor is None else e_tensor, dim, needs_e, add)
    return grad_x.contiguous(), add(grad_e) if needs_e else grad_e


def _gradients(
    grad: Tensor,
    p: Tensor,
    m: Tensor,
    delta: Tensor,
    x: Tensor | None,
    e: float | Tensor,
    dim: int,
    needs_e: bool,
    add: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Eq. 3 for this rank's scores, and this rank's share of the negative of Eq. 4; `add` sums over the ranks.

    Built from differentiable operators of grad, p and e, and so, with an `add` that is one, the second derivative too.
    """
    acc = accumulation_dtype(p.dtype)
    row_e = clamp_e(e)
    if x is None:
        weights = p.to(acc)
        live = weights != 0  # NaN counts as live and so reaches the gradient
        log_p = torch.where(live, weights, 1.0).log()
    else:  # float16 has flushed small weights to zero
        shift = torch.where(m == -torch.inf, 0.0, m)
        weights, log_p, _ = _power(row_e * (x.to(acc) - shift), delta, row_e)
        live = (weights != 0) | p.isnan()
        weights, log_p = (torch.where(p.isnan(), torch.nan, t) for t in (weights, log_p))
    s = torch.where(live, torch.exp((1 - row_e) * log_p), 0.0)
    g = grad.to(acc)
    total, product = add(torch.stack([s.sum(dim, keepdim=True), (s * g).sum(dim, keepdim=True)])).unbind()
    centred = g - product / torch.where(total == 0, 1.0, total)
    grad_x = (s * centred).to(p.dtype)
    if not (needs_e and isinstance(e, Tensor)):
        return grad_x, m.new_empty(0)
    share = -(alpha_weight(weights, log_p, row_e) * centred).sum(dim, keepdim=True)
    return grad_x, share.sum_to_size(e.shape)


def _bisect_backward_fake(
    grad: Tensor,
    p: Tensor,
    m: Tensor,
    delta: Tensor,
    x: Tensor | None,
    e: float,
    e_tensor: Tensor | None,
    dim: int,
    needs_e: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape), m.new_empty(e_tensor.shape if needs_e and e_tensor is not None else (0,))


class _Bisect(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.bisect_sharded in x (Eq. 3) and e (Eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, e: float, e_tensor: Tensor | None, dim: int, *rest: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            p, m, delta = torch.ops.diffmax.bisect_sharded(x, e, e_tensor, dim, *rest)
        ctx.mark_non_differentiable(m, delta)
        ctx.save_for_backward(x if x.dtype == torch.float16 else None, e_tensor, p, m, delta)
        ctx.e, ctx.dim, ctx.group = e, dim, rest[-1]
        return p, m, delta

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, e_tensor, p, m, delta = ctx.saved_tensors
        needs_x, _, needs_e, *_ = ctx.needs_input_grad
        # under create_graph=True this operator's own Autograd key makes its result differentiable again
        grad_x, grad_e = torch.ops.diffmax.bisect_sharded_backward(
            grad, p, m, delta, x, ctx.e, e_tensor, ctx.dim, needs_e, ctx.group
        )
        return grad_x if needs_x else None, None, grad_e if needs_e else None, None, None, None, None


class _Add(torch.autograd.Function):
    """Parts, one on each rank, to their sum, which every rank then holds: one value. Its transpose is `_Hand`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_reduce(part, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Hand.apply(grad, ctx.group), None


class _Hand(torch.autograd.Function):
    """One value that every rank holds, to a copy of its own for each rank's part of the computation. Transpose: `_Add`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Add.apply(grad, ctx.group), None


def refuse_transforms() -> None:
    """Raise under a torch.func transform or in forward mode: neither has a meaning here that would not be slow or silent."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "diffmax_bisect_sharded: torch.func transforms and forward-mode differentiation are not supported\n"
            "use reverse mode: Tensor.backward, torch.autograd.grad"
        )


def _bisect_autograd(x: Tensor, e: float, e_tensor: Tensor | None, *rest: Any) -> Any:
    refuse_transforms()
    if differentiates(x, e_tensor):
        return _Bisect.apply(x, e, e_tensor, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect_sharded(x, e, e_tensor, *rest)


def _bisect_backward_autograd(
    grad: Tensor,
    p: Tensor,
    m: Tensor,
    delta: Tensor,
    x: Tensor | None,
    e: float,
    e_tensor: Tensor | None,
    dim: int,
    needs_e: bool,
    group: str,
) -> Any:
    if differentiates(grad, p, e_tensor):
        # p leads on to x; where p has lost its small weights, a p in float32 that leads to x takes its place
        if x is not None:
            p = torch.ops.diffmax.bisect_sharded(x.float(), e, e_tensor, dim, 50, True, group)[0]
        own_e = e if e_tensor is None else _Hand.apply(e_tensor, group)

        def add(part: Tensor) -> Tensor:
            handed: Tensor = _Hand.apply(_Add.apply(part, group), group)
            return handed

        grad_x, grad_e = _gradients(grad, p, m, delta, None, own_e, dim, needs_e, add)
        return grad_x.to(grad.dtype), _Add.apply(grad_e, group) if needs_e else grad_e
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect_sharded_backward(grad, p, m, delta, x, e, e_tensor, dim, needs_e, group)


def _all_reduce(t: Tensor, operation: str, group: Any) -> Tensor:
    reduced: Tensor = collectives.wait_tensor(collectives.all_reduce(t.contiguous(), operation, group))
    return reduced


def _row_max(scores: Tensor, dim: int) -> Tensor:
    """The maximum of this rank's part, -inf where it is empty. NaN becomes +inf: all-reduced maxima may lose NaN."""
    if scores.shape[dim] == 0:
        return scores.new_full([*scores.shape[:dim], 1, *scores.shape[dim + 1 :]], -torch.inf)
    m = scores.amax(dim, keepdim=True)
    return torch.where(m.isnan(), torch.inf, m)


def _agree(x: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, group: Any) -> int:
    """See that all ranks make the same call, in one message of fixed length; return an upper bound of a whole row's length.

    Without it, ranks that disagree would wait for each other, or exchange messages of different lengths.
    """
    facts = {
        "the shape of X outside dim": [*x.shape[:dim], "dim", *x.shape[dim + 1 :]],
        "the dtype of X": x.dtype,
        "alpha": 1 - e if e_tensor is None else f"a tensor of shape {tuple(e_tensor.shape)}",
        "n_iter": n_iter,
        "ensure_sum_one": ensure_sum_one,
    }
    codes = [zlib.crc32(repr(fact).encode()) for fact in facts.values()]
    message = torch.tensor([x.shape[dim], *codes, *(-code for code in codes)], device=x.device)
    longest, *extremes = _all_reduce(message, "max", group).tolist()
    highest, lowest = extremes[: len(codes)], [-code for code in extremes[len(codes) :]]
    differing = [name for name, high, low in zip(facts, highest, lowest, strict=True) if high != low]
    if differing:
        raise ValueError(
            f"diffmax_bisect_sharded: {' and '.join(differing)} must be the same on every rank, got different ones\n"
            + "\n".join(f"  {name} on this rank: {facts[name]}" for name in differing)
        )
    return int(longest) * _get_group_size_by_name(group)


_LIBRARY.impl("bisect_sharded", _bisect, "CompositeExplicitAutograd")
_LIBRARY.impl("bisect_sharded", _bisect_autograd, "Autograd")
torch.library.register_fake("diffmax::bisect_sharded", _bisect_fake, lib=_LIBRARY)
_LIBRARY.impl("bisect_sharded_backward", _bisect_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("bisect_sharded_backward", _bisect_backward_autograd, "Autograd")
torch.library.register_fake("diffmax::bisect_sharded_backward", _bisect_backward_fake, lib=_LIBRARY)
