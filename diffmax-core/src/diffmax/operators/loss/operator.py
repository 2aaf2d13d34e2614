"""torch.ops.diffmax.loss and loss_backward: schemas, fake implementations, gradients. The arithmetic is in `terms`.

They are wired like the operators of `operators.rows.operator`, and reach the chosen backend through torch.ops.diffmax.bisect.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.machine.forked import alone_in_child
from diffmax.operators.common import portable
from diffmax.operators.common.autograd import differentiates, has_tangent
from diffmax.operators.common.numerics import accumulation_dtype, clamp_e
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.wiring import enter
from diffmax.operators.loss import terms as rows


class Arguments(NamedTuple):
    """Arguments of torch.ops.diffmax.loss.

    Attributes:
        x: Scores with at least two dimensions.
        target: int64 of x's shape with `dim` reduced to 1, where a negative number marks an ignored row; or of a floating
            dtype and x's shape, each row a point of the simplex.
        e, e_tensor: As for bisect.
    """

    x: Tensor
    target: Tensor
    e: float
    e_tensor: Tensor | None
    dim: int
    n_iter: int
    backend: str


class Results(NamedTuple):
    """`weights` are p, of x's shape, if they fit one block; else (0,), and backward recomputes them."""

    losses: Tensor
    weights: Tensor


class BackwardArguments(NamedTuple):
    """Arguments of torch.ops.diffmax.loss_backward."""

    grad: Tensor
    x: Tensor
    weights: Tensor
    target: Tensor
    e: float
    e_tensor: Tensor | None
    dim: int
    n_iter: int
    needs_x: bool
    needs_e: bool
    backend: str


class Gradients(NamedTuple):
    """Each is (0,) if not needed."""

    grad_x: Tensor
    grad_e: Tensor


FORWARD = Schema("loss", Arguments, Results)
BACKWARD = Schema("loss_backward", BackwardArguments, Gradients)


def _loss_fake(*flat: Any) -> Results:
    given = Arguments(*flat)
    x, acc = given.x, accumulation_dtype(given.x.dtype)
    return Results(x.new_empty(rows.row_shape(x, given.dim), dtype=acc), x.new_empty(rows.kept_shape(x), dtype=acc))


def _loss_backward_fake(*flat: Any) -> Gradients:
    given = BackwardArguments(*flat)
    x, grad = given.x, given.grad
    return Gradients(x.new_empty(x.shape if given.needs_x else (0,)), grad.new_empty(grad.shape if given.needs_e else (0,)))


class _Loss(torch.autograd.Function):
    """Gradient of torch.ops.diffmax.loss for x, which is p - y, and for e (Eq. 20)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, e: float, e_tensor: Tensor | None, *rest: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            losses, weights = torch.ops.diffmax.loss(x, target, e, e_tensor, *rest)
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weights, target, e_tensor)
        ctx.e, ctx.rest = e, rest
        return losses, weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, weights, target, e_tensor = ctx.saved_tensors
        needs_x, _, _, needs_e, *_ = ctx.needs_input_grad
        *rest, backend = ctx.rest
        grad_x, grad_e = torch.ops.diffmax.loss_backward(
            grad, x, weights, target, ctx.e, e_tensor, *rest, needs_x, needs_e, backend
        )
        grad_e = grad_e.sum_to_size(e_tensor.shape) if needs_e else None
        return grad_x if needs_x else None, None, None, grad_e, None, None, None


def loss(x: Tensor, target: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, backend: str) -> Tensor:
    """Call torch.ops.diffmax.loss in a way that torch.jit.trace can record."""
    if not torch.compiler.is_compiling() and portable.is_tracing():
        return portable.loss(x, target, e if e_tensor is None else e_tensor, dim, n_iter)
    losses: Tensor = torch.ops.diffmax.loss(x, target, e, e_tensor, dim, n_iter, backend)[0]
    return losses


def _loss_autograd(x: Tensor, target: Tensor, e: float, e_tensor: Tensor | None, *rest: Any) -> Any:
    if portable.exports_onnx():
        losses = portable.loss(x, target, e if e_tensor is None else e_tensor, *rest[:2])
        return losses, losses.new_empty(rows.kept_shape(x))
    if has_tangent(x, target, e_tensor) or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "diffmax_loss: forward-mode differentiation and torch.func transforms are not supported\n"
            "use torch.autograd.grad, torch.autograd.functional.jacobian or hessian"
        )
    if differentiates(x, e_tensor):
        return _Loss.apply(x, target, e, e_tensor, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.loss(x, target, e, e_tensor, *rest)


def _loss_backward_autograd(*flat: Any) -> Any:
    grad, x, _, target, e, e_tensor, dim, n_iter, needs_x, needs_e, backend = BackwardArguments(*flat)
    if not differentiates(grad, x, e_tensor):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.diffmax.loss_backward(*flat)
    # second derivative: the same formulas as differentiable operators, from weights that depend on x
    p = torch.ops.diffmax.bisect(x.to(grad.dtype), e, e_tensor, dim, n_iter, True, backend)[0]
    idle = rows.silent(target, p.detach().amax(dim, keepdim=True) == 0)
    grad_x, grad_e = x.new_empty(0), grad.new_empty(0)
    if needs_x:
        y = target.to(p.dtype) if target.is_floating_point() else torch.zeros_like(p).scatter(dim, target.clamp_min(0), 1.0)
        grad_x = (grad * (p - y)).masked_fill(idle, 0.0).to(x.dtype)
    if needs_e:
        slope = rows.omega_slopes(target, p, clamp_e(e if e_tensor is None else e_tensor), dim)
        grad_e = (grad * slope).masked_fill(idle, 0.0)
    return grad_x, grad_e


enter(FORWARD, run=alone_in_child(rows.loss), autograd=_loss_autograd, fake=_loss_fake)
enter(BACKWARD, run=alone_in_child(rows.loss_backward), autograd=_loss_backward_autograd, fake=_loss_backward_fake)
