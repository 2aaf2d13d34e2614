"""torch.ops.diffmax.threshold_attention and threshold_attention_backward: schemas, shapes for tracing, gradients.

Wired like power attention's. The arithmetic is in the kernel that `machine.dispatch` chooses, with the signatures of
`diffmax.reference.threshold`.
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
from diffmax.plugin import ThresholdCall, ThresholdGradients, ThresholdResults, ThresholdSaved, ThresholdWanted
from diffmax.reference import threshold as reference


class Arguments(NamedTuple):
    """Of torch.ops.diffmax.threshold_attention. `keep`: whether a backward follows."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: bool
    call: ThresholdCall
    backend: str = ""


class BackwardArguments(NamedTuple):
    """Of torch.ops.diffmax.threshold_attention_backward."""

    grad: Tensor
    grad_mass: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    saved: ThresholdSaved
    wanted: ThresholdWanted
    call: ThresholdCall
    backend: str = ""


FORWARD = Schema("threshold_attention", Arguments, ThresholdResults, sizes=True)
BACKWARD = Schema(
    "threshold_attention_backward",
    BackwardArguments,
    ThresholdGradients,
    prefixes={"wanted": "needs_", "results": "grad_"},
    sizes=True,
)
FORWARD.define()
BACKWARD.define()


def features(query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the call needs."""
    asked = {
        "gqa": query.shape[1] != key.shape[1],
        "value_dim": value.shape[3] != key.shape[3],
        "mask": call.mask is not None,
        "varlen": call.cu_seqlens_q is not None,
        "distance_bias": call.bias is not None,
        "threshold_softmax": call.weights == "softmax",
        "threshold_diffmax": call.weights == "diffmax",
        "real_power": call.power not in (1, 2),
    }
    return frozenset(name for name, on in asked.items() if on)


def _threshold(*flat: Any) -> ThresholdResults:
    query, key, value, keep, call, backend = FORWARD.rebuild(flat)
    asked, sizes = features(query, key, value, call), (query.shape[3], value.shape[3])
    run = kernel("threshold_attention", query, backend, features=asked, head_dims=sizes)
    with torch._C._DisableAutocast():  # a kernel's products are of the dtypes that it chose
        return ThresholdResults(*run(query, key, value, call, keep))


def _threshold_fake(*flat: Any) -> ThresholdResults:
    register_rules()
    query, _, value, keep, call, _ = FORWARD.rebuild(flat)
    rows, acc = query.shape[:3], accumulation_dtype(query.dtype)
    return ThresholdResults(
        value.new_empty((*rows, value.shape[3])),
        query.new_empty(rows, dtype=acc),
        query.new_empty(rows if keep and call.weights != "scores" else (0,), dtype=acc),
    )


def _threshold_backward(*flat: Any) -> ThresholdGradients:
    grad, grad_mass, query, key, value, saved, wanted, call, backend = BACKWARD.rebuild(flat)
    asked, sizes = features(query, key, value, call), (query.shape[3], value.shape[3])
    run = kernel("threshold_attention_backward", query, backend, features=asked, head_dims=sizes)
    with torch._C._DisableAutocast():
        return ThresholdGradients(*run(grad, grad_mass, query, key, value, saved, call, wanted))


def _threshold_backward_fake(*flat: Any) -> ThresholdGradients:
    register_rules()
    _, _, query, key, value, _, wanted, call, _ = BACKWARD.rebuild(flat)
    bias = call.bias if wanted.bias else None
    return ThresholdGradients(
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        call.theta.new_empty(query.shape[:3] if wanted.theta else (0,)),
        call.theta.new_empty((0,) if bias is None else bias.shape),
    )


class _Threshold(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.threshold_attention in query, key, value, theta and the bias."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Any:
        results = ThresholdResults(*_below_autograd(*flat))
        ctx.mark_non_differentiable(results.statistic)
        ctx.set_materialize_grads(False)
        ctx.places = [place for place, given in enumerate(flat) if isinstance(given, Tensor)]
        ctx.save_for_backward(*(flat[place] for place in ctx.places), results.statistic)
        ctx.flat = [None if isinstance(given, Tensor) else given for given in flat]
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mass: Tensor | None, _: Any) -> Any:
        flat, needed = list(ctx.flat), tuple(ctx.needs_input_grad)
        of: list[Tensor | None] = [None] * len(flat)
        if grad is None and grad_mass is None:
            return tuple(of)
        *given, statistic = ctx.saved_tensors
        for place, t in zip(ctx.places, given, strict=True):
            flat[place] = t
        query, key, value, _keep, call, backend = FORWARD.rebuild(flat)
        if grad is None:
            grad = value.new_zeros((*query.shape[:3], value.shape[3]))
        places = [FORWARD.place[name] for name in ("theta", "bias")]
        wanted = ThresholdWanted(*(place < len(flat) and needed[place] for place in places))
        # under create_graph=True this operator's own Autograd key makes its results differentiable again
        found = ThresholdGradients(
            *BACKWARD(grad, grad_mass, query, key, value, ThresholdSaved(statistic), wanted, call, backend)
        )
        of[:3] = (t if is_needed else None for t, is_needed in zip(found[:3], needed, strict=False))
        if wanted.theta:
            of[places[0]] = found.theta.sum_to_size(call.theta.shape)
        if wanted.bias:
            of[places[1]] = found.bias
        return tuple(of)


def _below_autograd(*flat: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.threshold_attention(*flat)


def threshold_attention(query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall, backend: str) -> ThresholdResults:
    """What torch.ops.diffmax.threshold_attention gives, on the way that differentiates and transforms what has to be."""
    if not torch.compiler.is_compiling():
        if portable.is_tracing():
            return reference.threshold_attention(query, key, value, call, False)
        if not is_transformed() and differentiates(query, key, value, call.theta, call.bias):
            return ThresholdResults(*_Threshold.apply(*FORWARD.flatten(query, key, value, True, call, backend)))
    return ThresholdResults(*FORWARD(query, key, value, False, call, backend))


def _threshold_autograd(*flat: Any) -> Any:
    query, key, value, _, call, _ = FORWARD.rebuild(flat)
    tensors = (query, key, value, call.theta, call.bias)
    forward_mode = has_tangent(*tensors)
    if not portable.exports_onnx() and not forward_mode and not differentiates(*tensors):
        return _below_autograd(*flat)
    if portable.exports_onnx() or forward_mode or torch._C._functorch.peek_interpreter_stack() is not None:
        return reference.threshold_attention(query, key, value, call, True)  # differentiable operators
    return _Threshold.apply(*flat[:3], True, *flat[4:])


def _threshold_backward_autograd(*flat: Any) -> Any:
    grad, grad_mass, query, key, value, saved, wanted, call, _ = BACKWARD.rebuild(flat)
    tensors = (grad, grad_mass, query, key, value, call.theta, call.bias)
    if has_tangent(*tensors) or differentiates(*tensors):
        return reference.threshold_attention_backward(grad, grad_mass, query, key, value, saved, call, wanted)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.threshold_attention_backward(*flat)


# vmap: one call after the other, since bias, mask and offsets need not have a batch


def _threshold_vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
    return _vmapped(torch.ops.diffmax.threshold_attention, info.batch_size, in_dims, flat)


def _threshold_backward_vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
    return _vmapped(torch.ops.diffmax.threshold_attention_backward, info.batch_size, in_dims, flat)


def _vmapped(operator: Any, size: int, in_dims: tuple[Any, ...], flat: tuple[Any, ...]) -> Any:
    calls = [
        operator(*(given if dim is None else given.select(dim, n) for given, dim in zip(flat, in_dims, strict=True)))
        for n in range(size)
    ]
    results = tuple(torch.stack(each) for each in zip(*calls, strict=True))
    return results, (0,) * len(results)


LIBRARY.impl("threshold_attention", _threshold, "CompositeExplicitAutograd")
LIBRARY.impl("threshold_attention", _threshold_autograd, "Autograd")
torch.library.register_fake("diffmax::threshold_attention", _threshold_fake, lib=LIBRARY)
LIBRARY.impl("threshold_attention_backward", _threshold_backward, "CompositeExplicitAutograd")
LIBRARY.impl("threshold_attention_backward", _threshold_backward_autograd, "Autograd")
torch.library.register_fake("diffmax::threshold_attention_backward", _threshold_backward_fake, lib=LIBRARY)
if hasattr(torch.library, "register_vmap"):  # torch 2.5
    torch.library.register_vmap("diffmax::threshold_attention", _threshold_vmap, lib=LIBRARY)
    torch.library.register_vmap("diffmax::threshold_attention_backward", _threshold_backward_vmap, lib=LIBRARY)
