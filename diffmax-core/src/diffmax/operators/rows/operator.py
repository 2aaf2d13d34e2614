"""torch.ops.diffmax.*: schemas, shapes for tracing, gradients. The arithmetic is in the kernel that `machine.dispatch` chooses.

Each operator has one Python implementation for every device, which asks `machine.dispatch` for a kernel, and one under the
Autograd key, so that torch.ops.diffmax.bisect called directly is as differentiable as the public function.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from diffmax import reference
from diffmax.machine.dispatch import kernel, weights_kernel
from diffmax.operators.common import portable
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.rows.fast_path import is_plain
from diffmax.operators.rows.sharding import register_rules

_PROXY = torch._C._TorchDispatchModeKey.PROXY
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
        outputs = _below_autograd(x, e, e_tensor, dim, *rest)
        _save(ctx, x, e, e_tensor, dim, rest[-1], outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, e_tensor, p, m, delta = ctx.saved_tensors
        needs_x, _, needs_e, *_ = ctx.needs_input_grad
        # where this is differentiated once more, the operator's own Autograd key makes its result differentiable
        plain = not torch.is_grad_enabled() and not _is_transformed() and is_plain(grad) and is_plain(p)
        run = _bisect_backward if plain else torch.ops.diffmax.bisect_backward
        grad_x, grad_e = run(grad, p, m, delta, x, ctx.e, e_tensor, ctx.dim, needs_e, ctx.backend)
        grad_e = grad_e.sum_to_size(e_tensor.shape) if needs_e else None
        return grad_x if needs_x else None, None, grad_e, None, None, None, None


class _TransformableBisect(torch.autograd.Function):
    """As `_Bisect`, in the form that torch.func and forward-mode differentiation need; calling it costs five times as much."""

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
    """The weights by torch.ops.diffmax.bisect, on the shortest way there that differentiates what has to be."""
    arguments = (x, e, e_tensor, dim, n_iter, ensure_sum_one, backend)
    if torch.compiler.is_compiling():  # the compiler sees the operator, and no autograd.Function
        p: Tensor = torch.ops.diffmax.bisect(*arguments)[0]
    elif portable.is_tracing():
        p = portable.bisect(x, e if e_tensor is None else e_tensor, dim, n_iter, ensure_sum_one)[0]
    elif _is_transformed():
        p = (_retraced if _forward_levels() > 1 else _TransformableBisect.apply)(*arguments)[0]
    elif _differentiates(x, e_tensor):
        p = _Bisect.apply(*arguments)[0]
    elif e_tensor is None and is_plain(x) and (weights := weights_kernel(x, backend)):
        p = weights(x, e, dim, n_iter, ensure_sum_one)
    else:
        p = _below_autograd(*arguments)[0]
    return p


def _is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def _forward_levels() -> int:
    """How many jvp transforms enclose the call. An autograd.Function knows of one: the tangents of a second are silently 0."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through one of them; compiled code enters it unseen by `forward_ad`."""
    with _unrecorded():  # looking makes an alias, which a compiler's graph would keep
        return any(t is not None and torch._VF._unpack_dual(t, level=0).tangent is not None for t in tensors)


def _unrecorded() -> AbstractContextManager[object]:
    """What is done inside it, a graph that is being made does not show."""
    if torch._C._len_torch_dispatch_stack() == 0 or torch._C._get_dispatch_mode(_PROXY) is None:
        return nullcontext()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def _bisect_autograd(*arguments: Any) -> Any:
    """torch.ops.diffmax.bisect as users, compilers and sharding rules call it."""
    x, e, e_tensor, *rest, _ = arguments
    if portable.exports_onnx():
        return portable.bisect(x, e if e_tensor is None else e_tensor, *rest)
    forward_mode = _has_tangent(x, e_tensor)
    if not forward_mode and not _differentiates(x, e_tensor):
        return _below_autograd(*arguments)
    if peek_interpreter_stack() is not None:  # where no autograd.Function may be called
        return _retraced(*arguments)
    return (_TransformableBisect if forward_mode else _Bisect).apply(*arguments)


def _retraced(x: Tensor, e: float, e_tensor: Tensor | None, dim: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, m, delta = _below_autograd(x, e, e_tensor, dim, *rest)
    return reference.retraced(x, e if e_tensor is None else e_tensor, m, delta, dim).to(x.dtype), m, delta


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
    if _has_tangent(grad, p, e_tensor) or _differentiates(grad, p, e_tensor):
        # The second derivative: the reference consists of differentiable operators of grad, p and e, and p leads on to x.
        # It is not given x, because it would combine it with delta, which autograd takes for a constant; where p has lost
        # its small weights, one in float32 that leads to x takes its place.
        if x is not None:
            p = reference.retraced(x, e if e_tensor is None else e_tensor, m, delta, dim)
        grad_x, grad_e = reference.bisect_backward(grad, p, m, delta, None, e if e_tensor is None else e_tensor, dim, needs_e)
        return grad_x.to(grad.dtype), grad_e
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.bisect_backward(grad, p, m, delta, x, e, e_tensor, dim, needs_e, backend)


# vmap: the batch becomes the first axis of every tensor


def _bisect_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    e: float,
    e_tensor: Tensor | None,
    dim: int,
    n_iter: int,
    ensure_sum_one: bool,
    backend: str,
) -> Any:
    ndim = x.ndim - (in_dims[0] is not None)
    batch, batch_e = _batched(x, in_dims[0], ndim, info.batch_size), _batched(e_tensor, in_dims[2], ndim, None)
    outputs = torch.ops.diffmax.bisect(batch, e, batch_e, dim + 1, n_iter, ensure_sum_one, backend)
    return outputs, (0, 0, 0)


def _bisect_backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
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
    ndim = p.ndim - (in_dims[1] is not None)
    tensors = [_batched(t, d, ndim, info.batch_size) for t, d in zip((grad, p, m, delta, x), in_dims[:5], strict=True)]
    e_tensor = _batched(e_tensor, in_dims[6], ndim, None)
    grad_x, grad_e = torch.ops.diffmax.bisect_backward(*tensors, e, e_tensor, dim + 1, needs_e, backend)
    return (grad_x, grad_e), (0, 0 if needs_e else None)


def _batched(t: Tensor | None, batch_dim: int | None, ndim: int, batch_size: int | None) -> Tensor | None:
    """`t` with the batch in front and `ndim` axes behind it. Without a batch of its own, it is repeated if a size is given."""
    if t is None:
        return None
    if batch_dim is None:
        t = t.reshape(1, *(1,) * (ndim - t.ndim), *t.shape)
        return t if batch_size is None else t.expand(batch_size, *t.shape[1:])
    t = t.movedim(batch_dim, 0)
    return t.reshape(t.shape[0], *(1,) * (ndim - t.ndim + 1), *t.shape[1:])


_LIBRARY.impl("bisect", _bisect, "CompositeExplicitAutograd")
_LIBRARY.impl("bisect", _bisect_autograd, "Autograd")
torch.library.register_fake("diffmax::bisect", _bisect_fake, lib=_LIBRARY)
_LIBRARY.impl("bisect_backward", _bisect_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("bisect_backward", _bisect_backward_autograd, "Autograd")
torch.library.register_fake("diffmax::bisect_backward", _bisect_backward_fake, lib=_LIBRARY)
if hasattr(torch.library, "register_vmap"):  # torch 2.5
    torch.library.register_vmap("diffmax::bisect", _bisect_vmap, lib=_LIBRARY)
    torch.library.register_vmap("diffmax::bisect_backward", _bisect_backward_vmap, lib=_LIBRARY)
