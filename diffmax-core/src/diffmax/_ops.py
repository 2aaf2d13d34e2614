"""torch.ops.diffmax.*: schemas, shapes for tracing, gradients. The arithmetic is in the kernel that `_dispatch` chooses.

Each operator has one Python implementation for every device, which asks `_dispatch` for a kernel, and one under the Autograd
key, so that torch.ops.diffmax.bisect called directly is as differentiable as the public function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffmax import reference
from diffmax._dispatch import kernel
from diffmax._dtensor import register_rules
from diffmax._numerics import accumulation_dtype

_LIBRARY = torch.library.Library("diffmax", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

# e = 1 - alpha is a float or, where e_tensor is given, a tensor that broadcasts against m; then the float is not read.
# m and delta have x's shape with `dim` reduced to 1 and the accumulation dtype; tau = m - (1 - delta) / e.
_LIBRARY.define(
    "bisect(Tensor x, float e, Tensor? e_tensor, int dim, int n_iter, bool ensure_sum_one, str backend)"
    " -> (Tensor p, Tensor m, Tensor delta)",
    tags=_TAGS,
)
# x is given where p's dtype flushes small weights to zero (float16). grad_e has m's shape, or (0,) where it is not wanted.
_LIBRARY.define(
    "bisect_backward(Tensor grad, Tensor p, Tensor m, Tensor delta, Tensor? x, float e, Tensor? e_tensor, int dim,"
    " bool needs_e, str backend) -> (Tensor grad_x, Tensor grad_e)",
    tags=_TAGS,
)


def _bisect(x: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, backend: str) -> Any:
    run = kernel("bisect", x, backend, tensor_alpha=e_tensor is not None)
    return run(x, e if e_tensor is None else e_tensor, dim, n_iter, ensure_sum_one)


def _bisect_fake(
    x: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    register_rules()  # DTensor comes here for shapes just before it looks for its rule
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
    backend: str,
) -> Any:
    run = kernel("bisect_backward", p, backend, tensor_alpha=e_tensor is not None, alpha_gradient=needs_e)
    return run(grad, p, m, delta, x, e if e_tensor is None else e_tensor, dim, needs_e)


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    register_rules()  # DTensor comes here for shapes just before it looks for its rule
    return p.new_empty(p.shape), m.new_empty(m.shape if needs_e else (0,))


class _Bisect(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.bisect in x (Eq. 3) and e (Eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, e: float, e_tensor: Tensor | None, dim: int, *rest: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            p, m, delta = torch.ops.diffmax.bisect(x, e, e_tensor, dim, *rest)
        ctx.mark_non_differentiable(m, delta)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if x.dtype == torch.float16 else None, e_tensor, p, m, delta)
        ctx.e, ctx.dim, ctx.backend = e, dim, rest[-1]
        return p, m, delta

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, e_tensor, p, m, delta = ctx.saved_tensors
        needs_x, _, needs_e, *_ = ctx.needs_input_grad
        # under create_graph=True this operator's own Autograd key makes its result differentiable again
        grad_x, grad_e = torch.ops.diffmax.bisect_backward(grad, p, m, delta, x, ctx.e, e_tensor, ctx.dim, needs_e, ctx.backend)
        grad_e = grad_e.sum_to_size(e_tensor.shape) if needs_e else None
        return grad_x if needs_x else None, None, grad_e, None, None, None, None


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _bisect_autograd(x: Tensor, e: float, e_tensor: Tensor | None, *rest: Any) -> Any:
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "diffmax: forward-mode differentiation (jvp) is not supported yet\n"
            "use reverse mode: torch.autograd.grad, torch.autograd.functional.jacobian"
        )
    if _differentiates(x, e_tensor):
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "diffmax: torch.func transforms that differentiate are not supported yet\n"
                "use torch.autograd.grad, torch.autograd.functional.jacobian or hessian"
            )
        return _Bisect.apply(x, e, e_tensor, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect(x, e, e_tensor, *rest)


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
    backend: str,
) -> Any:
    if _differentiates(grad, p, e_tensor):
        # The second derivative: the reference consists of differentiable operators of grad, p and e, and p leads on to x.
        # It is not given x, because it would combine it with delta, which autograd takes for a constant; where p has lost
        # its small weights, a p in float32 that leads to x takes its place.
        if x is not None:
            p = torch.ops.diffmax.bisect(x.float(), e, e_tensor, dim, 50, True, backend)[0]
        grad_x, grad_e = reference.bisect_backward(grad, p, m, delta, None, e if e_tensor is None else e_tensor, dim, needs_e)
        return grad_x.to(grad.dtype), grad_e
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect_backward(grad, p, m, delta, x, e, e_tensor, dim, needs_e, backend)


_LIBRARY.impl("bisect", _bisect, "CompositeExplicitAutograd")
_LIBRARY.impl("bisect", _bisect_autograd, "Autograd")
torch.library.register_fake("diffmax::bisect", _bisect_fake, lib=_LIBRARY)
_LIBRARY.impl("bisect_backward", _bisect_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("bisect_backward", _bisect_backward_autograd, "Autograd")
torch.library.register_fake("diffmax::bisect_backward", _bisect_backward_fake, lib=_LIBRARY)
