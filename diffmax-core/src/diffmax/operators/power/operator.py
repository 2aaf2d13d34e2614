"""torch.ops.diffmax.power_attention and power_attention_backward: schemas, shapes for tracing, gradients.

Wired like the operators of `operators.attention.operator`. The arithmetic is in the kernel that `machine.dispatch` chooses,
with the signatures of `diffmax.reference.power`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.machine.dispatch import kernel
from diffmax.operators.common import portable
from diffmax.operators.common.autograd import differentiates, has_tangent, is_transformed
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.schema import LIBRARY, Schema
from diffmax.operators.common.sharding import register_rules
from diffmax.plugin import PowerCall, PowerGradients, PowerResults, PowerSaved, PowerWanted
from diffmax.reference import power as reference


class Arguments(NamedTuple):
    """Of torch.ops.diffmax.power_attention. `keep`: whether a backward follows."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: bool
    call: PowerCall
    backend: str = ""


class BackwardArguments(NamedTuple):
    """Of torch.ops.diffmax.power_attention_backward."""

    grad: Tensor
    grad_sums: Tensor | None
    grad_norm: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    saved: PowerSaved
    wanted: PowerWanted
    call: PowerCall
    backend: str = ""


FORWARD = Schema("power_attention", Arguments, PowerResults, sizes=True, prefixes={"results": "end_"})
BACKWARD = Schema(
    "power_attention_backward",
    BackwardArguments,
    PowerGradients,
    prefixes={"wanted": "needs_", "results": "grad_"},
    sizes=True,
)
FORWARD.define()
BACKWARD.define()
LEARNED = ("log_gates", "sums", "norm")
"""Arguments that may have a gradient, besides query, key and value."""


def features(query: Tensor, key: Tensor, value: Tensor, call: PowerCall) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the call needs."""
    asked = {
        "gqa": query.shape[1] != key.shape[1],
        "value_dim": value.shape[3] != key.shape[3],
        "gates": call.log_gates is not None,
        "state": call.final or call.sums is not None,
        "high_degree": call.degree > 2,
    }
    return frozenset(name for name, on in asked.items() if on)


def _power(*flat: Any) -> PowerResults:
    return _forward(*FORWARD.rebuild(flat))


def _forward(query: Tensor, key: Tensor, value: Tensor, keep: bool, call: PowerCall, backend: str) -> PowerResults:
    sizes = (query.shape[3], value.shape[3])
    run = kernel("power_attention", query, backend, features=features(query, key, value, call), head_dims=sizes)
    with torch._C._DisableAutocast():  # a kernel's products are of the dtypes that it chose
        return PowerResults(*run(query, key, value, call, keep))


def _power_fake(*flat: Any) -> PowerResults:
    register_rules()
    query, key, value, keep, call, _ = FORWARD.rebuild(flat)
    rows, acc = query.shape[:3], accumulation_dtype(query.dtype)
    sums, norm = reference.state_shapes(key, value, call.degree) if call.final else ((0,), (0,))
    return PowerResults(
        value.new_empty((*rows, value.shape[3])),
        query.new_empty(rows if keep else (0,), dtype=acc),
        query.new_empty(sums, dtype=acc),
        query.new_empty(norm, dtype=acc),
        query.new_empty((*rows, value.shape[3]) if keep and value.dtype != acc else (0,), dtype=acc),
    )


def _power_backward(*flat: Any) -> PowerGradients:
    grad, grad_sums, grad_norm, query, key, value, saved, wanted, call, backend = BACKWARD.rebuild(flat)
    asked, sizes = features(query, key, value, call), (query.shape[3], value.shape[3])
    run = kernel("power_attention_backward", query, backend, features=asked, head_dims=sizes)
    with torch._C._DisableAutocast():
        return PowerGradients(*run(grad, grad_sums, grad_norm, query, key, value, saved, call, wanted))


def _power_backward_fake(*flat: Any) -> PowerGradients:
    register_rules()
    _, _, _, query, key, value, saved, wanted, call, _ = BACKWARD.rebuild(flat)
    gates, state = call.log_gates, call.sums

    def like(t: Tensor | None, needed: bool) -> Tensor:
        return saved.total.new_empty(t.shape if needed and t is not None else (0,))

    return PowerGradients(
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        like(gates, wanted.log_gates),
        like(state, wanted.state),
        like(call.norm, wanted.state),
    )


class _Power(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.power_attention in query, key, value, the gates and the states."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Any:
        results = PowerResults(*_below_autograd(*flat))
        ctx.mark_non_differentiable(results.total, results.exact)
        ctx.set_materialize_grads(False)
        ctx.places = [place for place, given in enumerate(flat) if isinstance(given, Tensor)]
        ctx.save_for_backward(*(flat[place] for place in ctx.places), *results.saved)
        ctx.flat = [None if isinstance(given, Tensor) else given for given in flat]
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any, grad_sums: Tensor | None, grad_norm: Tensor | None, *__: Any) -> Any:
        flat, needed = list(ctx.flat), tuple(ctx.needs_input_grad)
        of: list[Tensor | None] = [None] * len(flat)
        if not ctx.flat[FORWARD.place["final"]]:
            grad_sums = grad_norm = None
        if grad is None and grad_sums is None and grad_norm is None:
            return tuple(of)
        *given, out, total = ctx.saved_tensors
        for place, t in zip(ctx.places, given, strict=True):
            flat[place] = t
        query, key, value, _keep, call, backend = FORWARD.rebuild(flat)
        grad = torch.zeros_like(out, dtype=value.dtype) if grad is None else grad
        if grad_sums is not None or grad_norm is not None:
            sums, norm = reference.state_shapes(key, value, call.degree)
            grad_sums = total.new_zeros(sums) if grad_sums is None else grad_sums
            grad_norm = total.new_zeros(norm) if grad_norm is None else grad_norm
        gates, sums_at, norm_at = (FORWARD.place[name] for name in LEARNED)
        has = [place < len(flat) and needed[place] for place in (gates, sums_at, norm_at)]
        wanted = PowerWanted(has[0], has[1] or has[2])
        # under create_graph=True this operator's own Autograd key makes its results differentiable again
        found = PowerGradients(
            *BACKWARD(grad, grad_sums, grad_norm, query, key, value, PowerSaved(out, total), wanted, call, backend)
        )
        of[:3] = (t if is_needed else None for t, is_needed in zip(found[:3], needed, strict=False))
        for place, is_needed, t in zip((gates, sums_at, norm_at), has, found[3:], strict=True):
            if is_needed:
                of[place] = t
        return tuple(of)


def _below_autograd(*flat: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.power_attention(*flat)


def power_attention(query: Tensor, key: Tensor, value: Tensor, call: PowerCall, backend: str) -> PowerResults:
    """What torch.ops.diffmax.power_attention gives, on the way there that differentiates and transforms what has to be."""
    if not torch.compiler.is_compiling():
        if portable.is_tracing():
            return reference.power_attention(query, key, value, call, False)
        if not is_transformed() and differentiates(query, key, value, call.log_gates, call.sums, call.norm):
            return PowerResults(*_Power.apply(*FORWARD.flatten(query, key, value, True, call, backend)))
    return PowerResults(*FORWARD(query, key, value, False, call, backend))


def _power_autograd(*flat: Any) -> Any:
    query, key, value, _, call, _ = FORWARD.rebuild(flat)
    tensors = (query, key, value, call.log_gates, call.sums, call.norm)
    forward_mode = has_tangent(*tensors)
    if not portable.exports_onnx() and not forward_mode and not differentiates(*tensors):
        return _below_autograd(*flat)
    if portable.exports_onnx() or forward_mode or torch._C._functorch.peek_interpreter_stack() is not None:
        return reference.power_attention(query, key, value, call, True)  # differentiable operators
    return _Power.apply(*flat[:3], True, *flat[4:])


def _power_backward_autograd(*flat: Any) -> Any:
    grad, grad_sums, grad_norm, query, key, value, saved, wanted, call, _ = BACKWARD.rebuild(flat)
    tensors = (grad, grad_sums, grad_norm, query, key, value, call.log_gates, call.sums, call.norm)
    if has_tangent(*tensors) or differentiates(*tensors):
        return reference.power_attention_backward(grad, grad_sums, grad_norm, query, key, value, saved, call, wanted)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.power_attention_backward(*flat)


# vmap: a mapped dimension lies beside the batch


def _power_vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
    return _vmapped(torch.ops.diffmax.power_attention, info.batch_size, in_dims, flat)


def _power_backward_vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
    return _vmapped(torch.ops.diffmax.power_attention_backward, info.batch_size, in_dims, flat)


def _vmapped(operator: Any, size: int, in_dims: tuple[Any, ...], flat: tuple[Any, ...]) -> Any:
    wide = list(flat)
    for place, (given, dim) in enumerate(zip(flat, in_dims, strict=True)):
        if isinstance(given, Tensor):
            t = given.expand(size, *given.shape) if dim is None else given.movedim(dim, 0)
            wide[place] = t.flatten(0, 1)
    results = operator(*wide)
    there = [t.ndim > 1 for t in results]
    unfolded = (
        t.unflatten(0, (size, t.shape[0] // size)) if is_there else t for t, is_there in zip(results, there, strict=True)
    )
    return tuple(unfolded), tuple(0 if is_there else None for is_there in there)


LIBRARY.impl("power_attention", _power, "CompositeExplicitAutograd")
LIBRARY.impl("power_attention", _power_autograd, "Autograd")
torch.library.register_fake("diffmax::power_attention", _power_fake, lib=LIBRARY)
LIBRARY.impl("power_attention_backward", _power_backward, "CompositeExplicitAutograd")
LIBRARY.impl("power_attention_backward", _power_backward_autograd, "Autograd")
torch.library.register_fake("diffmax::power_attention_backward", _power_backward_fake, lib=LIBRARY)
if hasattr(torch.library, "register_vmap"):  # torch 2.5
    torch.library.register_vmap("diffmax::power_attention", _power_vmap, lib=LIBRARY)
    torch.library.register_vmap("diffmax::power_attention_backward", _power_backward_vmap, lib=LIBRARY)
