"""torch.ops.diffmax.*: schemas, fake implementations, gradients. The arithmetic is in the kernel from `machine.dispatch`.

Each operator has one Python implementation for every device, which gets a kernel from `machine.dispatch`, and one under the
Autograd key, so that torch.ops.diffmax.bisect is as differentiable as the public function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from diffmax import reference
from diffmax.machine.dispatch import kernel, weights_kernel
from diffmax.operators.common import portable
from diffmax.operators.common.autograd import differentiates, forward_levels, has_tangent, is_transformed
from diffmax.operators.common.fast_path import is_plain
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.wiring import enter


class Arguments(NamedTuple):
    """Arguments of torch.ops.diffmax.bisect. e = 1 - alpha is the float, or e_tensor if given, which broadcasts against m."""

    x: Tensor
    e: float
    e_tensor: Tensor | None
    dim: int
    n_iter: int
    ensure_sum_one: bool
    backend: str


class Results(NamedTuple):
    """The weights; m and delta have x's shape with `dim` reduced to 1 and the accumulation dtype: tau = m - (1 - delta) / e."""

    p: Tensor
    m: Tensor
    delta: Tensor


class BackwardArguments(NamedTuple):
    """Arguments of torch.ops.diffmax.bisect_backward. x is given if p's dtype flushes small weights to zero (float16)."""

    grad: Tensor
    p: Tensor
    m: Tensor
    delta: Tensor
    x: Tensor | None
    e: float
    e_tensor: Tensor | None
    dim: int
    needs_e: bool
    backend: str

    @property
    def given_e(self) -> float | Tensor:
        """e_tensor if given, else e."""
        return self.e if self.e_tensor is None else self.e_tensor


class Gradients(NamedTuple):
    """grad_e has m's shape, or (0,) if not needed."""

    grad_x: Tensor
    grad_e: Tensor


FORWARD = Schema("bisect", Arguments, Results)
BACKWARD = Schema("bisect_backward", BackwardArguments, Gradients)


def _bisect(x: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, backend: str) -> Any:
    run = kernel("bisect", x, backend, tensor_alpha=e_tensor is not None)
    return run(x, e if e_tensor is None else e_tensor, dim, n_iter, ensure_sum_one)


def _bisect_fake(
    x: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    m = x.new_empty(row_shape, dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), m, torch.empty_like(m)


def _bisect_returned(x: Tensor, _: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, ...]:
    return _bisect_fake(x, 0.0, None, dim, n_iter, ensure_sum_one, "")


def _bisect_backward(*flat: Any) -> Any:
    grad, p, m, delta, x, e, e_tensor, dim, needs_e, backend = flat
    run = kernel("bisect_backward", p, backend, tensor_alpha=e_tensor is not None, alpha_gradient=needs_e)
    return run(grad, p, m, delta, x, e if e_tensor is None else e_tensor, dim, needs_e)


def _bisect_backward_fake(*flat: Any) -> Gradients:
    given = BackwardArguments(*flat)
    return Gradients(given.p.new_empty(given.p.shape), given.m.new_empty(given.m.shape if given.needs_e else (0,)))


def _bisect_backward_returned(*arguments: Any) -> Gradients:
    grad, p, m, delta, x, _, dim, needs_e = arguments
    return _bisect_backward_fake(grad, p, m, delta, x, 0.0, None, dim, needs_e, "")


class _Bisect(torch.autograd.Function):
    """Gradient of torch.ops.diffmax.bisect for x (Eq. 3) and e (Eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, e: float, e_tensor: Tensor | None, dim: int, *rest: Any) -> Any:
        outputs = _below_autograd(x, e, e_tensor, dim, *rest)
        _save(ctx, x, e, e_tensor, dim, rest[-1], outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, e_tensor, p, m, delta = ctx.saved_tensors
        needs_x, _, needs_e, *_ = ctx.needs_input_grad
        # for a second derivative, the operator's own Autograd key makes the result differentiable
        plain = not torch.is_grad_enabled() and not is_transformed() and is_plain(grad) and is_plain(p)
        run = _bisect_backward if plain else torch.ops.diffmax.bisect_backward
        grad_x, grad_e = run(grad, p, m, delta, x, ctx.e, e_tensor, ctx.dim, needs_e, ctx.backend)
        grad_e = grad_e.sum_to_size(e_tensor.shape) if needs_e else None
        return grad_x if needs_x else None, None, grad_e, None, None, None, None


class _TransformableBisect(torch.autograd.Function):
    """As `_Bisect`, in the form that torch.func and forward-mode differentiation need; a call costs five times as much."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, e: float, e_tensor: Tensor | None, *rest: Any) -> Any:
        return _below_autograd(x, e, e_tensor, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, e, e_tensor, dim, _, _, backend = inputs
        _save(ctx, x, e, e_tensor, dim, backend, output)

    backward = _Bisect.backward

    @staticmethod
    def jvp(ctx: Any, tangent_x: Tensor | None, _: None, tangent_e: Tensor | None, *__: None) -> Any:
        x, e_tensor, p, m, delta = ctx.saved_tensors
        e = ctx.e if e_tensor is None else e_tensor
        return reference.bisect_jvp(tangent_x, tangent_e, p, m, delta, x, e, ctx.dim), None, None


def _below_autograd(*arguments: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():  # inside torch.func.grad(torch.compile(f)): it cannot trace the guard below
        return torch.ops.diffmax.bisect(*arguments)
    if is_plain(*arguments) and not differentiates(arguments[0], arguments[2]):
        return _bisect(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect(*arguments)


def _save(ctx: Any, x: Tensor, e: float, e_tensor: Tensor | None, dim: int, backend: str, outputs: Any) -> None:
    p, m, delta = outputs
    ctx.mark_non_differentiable(m, delta)
    ctx.set_materialize_grads(False)
    saved = (x if x.dtype == torch.float16 else None, e_tensor, p, m, delta)
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.e, ctx.dim, ctx.backend = e, dim, backend


def bisect(x: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, backend: str) -> Tensor:
    """The weights by torch.ops.diffmax.bisect, by the cheapest path that is differentiable where the call needs it."""
    arguments = (x, e, e_tensor, dim, n_iter, ensure_sum_one, backend)
    if torch.compiler.is_compiling():  # the compiler sees the operator, and no autograd.Function
        p: Tensor = torch.ops.diffmax.bisect(*arguments)[0]
    elif portable.is_tracing():
        p = portable.bisect(x, e if e_tensor is None else e_tensor, dim, n_iter, ensure_sum_one)[0]
    elif is_transformed():
        p = (_retraced if forward_levels() > 1 else _TransformableBisect.apply)(*arguments)[0]
    elif differentiates(x, e_tensor):
        p = _Bisect.apply(*arguments)[0]
    elif e_tensor is None and is_plain(x) and (weights := weights_kernel(x, backend)):
        p = weights(x, e, dim, n_iter, ensure_sum_one)
    else:
        p = _below_autograd(*arguments)[0]
    return p


def _bisect_autograd(*arguments: Any) -> Any:
    """torch.ops.diffmax.bisect under the Autograd key: called by users, compilers and sharding rules."""
    x, e, e_tensor, *rest, _ = arguments
    if portable.exports_onnx():
        return portable.bisect(x, e if e_tensor is None else e_tensor, *rest)
    forward_mode = has_tangent(x, e_tensor)
    if not forward_mode and not differentiates(x, e_tensor):
        return _below_autograd(*arguments)
    if peek_interpreter_stack() is not None:  # here no autograd.Function may be called
        return _retraced(*arguments)
    return (_TransformableBisect if forward_mode else _Bisect).apply(*arguments)


def _retraced(x: Tensor, e: float, e_tensor: Tensor | None, dim: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, m, delta = _below_autograd(x, e, e_tensor, dim, *rest)
    return reference.retraced(x, e if e_tensor is None else e_tensor, m, delta, dim).to(x.dtype), m, delta


def _bisect_backward_autograd(*flat: Any) -> Any:
    given = BackwardArguments(*flat)
    grad, p = given.grad, given.p
    if has_tangent(grad, p, given.e_tensor) or differentiates(grad, p, given.e_tensor):
        # Second derivative: the reference consists of differentiable operators of grad, p and e, and p depends on x.
        # x itself is not passed, because the reference would combine it with delta, a constant to autograd. Where p has
        # lost its small weights, a float32 p that depends on x replaces it.
        if given.x is not None:
            p = reference.retraced(given.x, given.given_e, given.m, given.delta, given.dim)
        residuals = (p, given.m, given.delta, None)
        grad_x, grad_e = reference.bisect_backward(grad, *residuals, given.given_e, given.dim, given.needs_e)
        return grad_x.to(grad.dtype), grad_e
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect_backward(*flat)


# vmap: the batch becomes the first axis of every tensor


def _bisect_vmap(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
    given, dims = Arguments(*flat), dict(zip(Arguments._fields, in_dims, strict=True))
    ndim = given.x.ndim - (dims["x"] is not None)
    wide = {
        "x": _batched(given.x, dims["x"], ndim, info.batch_size),
        "e_tensor": _batched(given.e_tensor, dims["e_tensor"], ndim, None),
        "dim": given.dim + 1,
    }
    return torch.ops.diffmax.bisect(*(given._asdict() | wide).values()), (0, 0, 0)


def _bisect_backward_vmap(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
    given, dims = BackwardArguments(*flat), dict(zip(BackwardArguments._fields, in_dims, strict=True))
    ndim = given.p.ndim - (dims["p"] is not None)
    tensors = ("grad", "p", "m", "delta", "x")
    wide: dict[str, Any] = {name: _batched(getattr(given, name), dims[name], ndim, info.batch_size) for name in tensors}
    wide |= {"e_tensor": _batched(given.e_tensor, dims["e_tensor"], ndim, None), "dim": given.dim + 1}
    grads = torch.ops.diffmax.bisect_backward(*(given._asdict() | wide).values())
    return tuple(grads), (0, 0 if given.needs_e else None)


def _batched(t: Tensor | None, batch_dim: int | None, ndim: int, batch_size: int | None) -> Tensor | None:
    """`t` with the batch axis first, then `ndim` axes. A tensor without a batch axis is expanded if a size is given."""
    if t is None:
        return None
    if batch_dim is None:
        t = t.reshape(1, *(1,) * (ndim - t.ndim), *t.shape)
        return t if batch_size is None else t.expand(batch_size, *t.shape[1:])
    t = t.movedim(batch_dim, 0)
    return t.reshape(t.shape[0], *(1,) * (ndim - t.ndim + 1), *t.shape[1:])


enter(FORWARD, run=_bisect, autograd=_bisect_autograd, fake=_bisect_fake, vmap=_bisect_vmap, returned=_bisect_returned)
enter(
    BACKWARD,
    run=_bisect_backward,
    autograd=_bisect_backward_autograd,
    fake=_bisect_backward_fake,
    vmap=_bisect_backward_vmap,
    returned=_bisect_backward_returned,
)
