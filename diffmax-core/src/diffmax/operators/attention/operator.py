"""torch.ops.diffmax.attention and attention_backward: schemas, shapes for tracing, gradients.

Wired like the operators of `operators.rows.operator`. The arithmetic is in the kernel that `machine.dispatch` chooses, with the
signatures of `diffmax.reference.attention`.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffmax.machine.dispatch import kernel
from diffmax.operators.attention import differentiable
from diffmax.operators.common import portable
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.rows import operator as rows_operator
from diffmax.plugin import AttentionCall
from diffmax.reference import attention as reference_attention

_LIBRARY = torch.library.Library("diffmax", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_TYPES = {"float": "float", "bool": "bool", "int": "SymInt", "Tensor | None": "Tensor?"}


def _arguments() -> dict[str, str]:
    """What both operators share, name to declaration: the fields of `AttentionCall`, e as for bisect in two, and the backend.

    A field that a later version adds comes behind the backend, with its default: calls written today stay valid.
    """
    declared: dict[str, str] = {}
    for field in fields(AttentionCall):
        kind = _TYPES.get(str(field.type), "")
        if field.name == "e":
            declared |= {"e": "float e", "e_tensor": "Tensor? e_tensor"}
        elif "backend" in declared:
            declared[field.name] = f"{kind} {field.name}={field.default}"
        else:
            declared[field.name] = f"{kind} {field.name}"
        if field.name == "max_seqlen_k":
            declared["backend"] = 'str backend=""'
    return declared


_CALL = ", ".join(_arguments().values())
_NAMES = tuple(_arguments())
_PLACES = {name: place for place, name in enumerate(_NAMES)}
_LIBRARY.define(
    f"attention(Tensor query, Tensor key, Tensor value, bool keep, bool stats, {_CALL})"
    " -> (Tensor out, Tensor m, Tensor delta, Tensor u, Tensor live, Tensor support)",
    tags=_TAGS,
)
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor m, Tensor delta, Tensor u, Tensor live,"
    f" bool needs_e, {_CALL}, bool needs_bias=False, bool needs_sink=False)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_e, Tensor grad_bias, Tensor grad_sink)",
    tags=_TAGS,
)


def packed(call: AttentionCall, backend: str) -> tuple[Any, ...]:
    """What the operators take for `call`."""
    e_tensor = call.e if isinstance(call.e, Tensor) else None
    given = {"e": call.e if e_tensor is None else 0.0, "e_tensor": e_tensor, "backend": backend}
    return tuple(given[name] if name in given else getattr(call, name) for name in _NAMES)


def unpacked(rest: tuple[Any, ...]) -> tuple[AttentionCall, str]:
    """The reverse of `packed`. torch leaves defaults at the end out."""
    given = dict(zip(_NAMES, rest, strict=False))
    backend, e_tensor = given.pop("backend", ""), given.pop("e_tensor")
    if e_tensor is not None:
        given["e"] = e_tensor
    return AttentionCall(**given), backend


def _split(rest: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool, bool]:
    """The call's arguments, needs_bias and needs_sink of attention_backward's last arguments."""
    needs_bias, needs_sink, *_ = (*rest[len(_NAMES) :], False, False)
    return rest[: len(_NAMES)], needs_bias, needs_sink


def features(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, stats: bool) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the call needs, alpha's aside."""
    needs = {
        "causal": call.right == 0,
        "window": call.left >= 0 or call.right > 0,
        "mask": call.mask is not None,
        "gqa": query.shape[1] != key.shape[1],
        "varlen": call.cu_seqlens_q is not None,
        "value_dim": value.shape[3] != key.shape[3],
        "attention_stats": stats,
        "bias": call.bias is not None,
        "alibi": call.alibi is not None,
        "softcap": call.softcap > 0,
        "sink": call.sink is not None,
        "dropout": call.dropout_p > 0,
    }
    return frozenset(name for name, needed in needs.items() if needed)


def _attention(query: Tensor, key: Tensor, value: Tensor, keep: bool, stats: bool, *rest: Any) -> Any:
    call, backend = unpacked(rest)
    choice = (features(query, key, value, call, stats), query.shape[3], value.shape[3])
    run = kernel("attention", query, backend, tensor_alpha=isinstance(call.e, Tensor), attention=choice)
    if run is reference_attention.attention and not backend:  # no fused kernel serves the call; a row kernel may
        run = partial(run, solve=differentiable.row_operator(""))
    with torch._C._DisableAutocast():  # a kernel's products are of the dtypes that it chose
        out, m, delta, u, live, support = run(query, key, value, call, keep, stats)
    return out, m, delta, u, _folded(live), support


def _folded(live: Tensor) -> Tensor:
    """(B, H, tiles, words) as the operators hand it on: (B, H, n), n at least 2; (0,) is nothing known.

    A tracer asks of every size whether it is 1. Of this one it can know without binding the lengths to one tile.
    """
    if live.ndim == 1:
        return live
    live = live.flatten(2)
    return live if live.shape[2] >= 2 else reference_attention.widened(live, 2)


def _unfolded(live: Tensor, query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """The reverse."""
    if live.ndim == 1:
        return live
    shape = reference_attention.live_shape(query, key, call)
    return live[..., : shape[2] * shape[3]].reshape(shape)


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, keep: bool, stats: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, _ = unpacked(rest)
    rows = query.shape[:3]
    out = value.new_empty((*rows, value.shape[3]))
    m = query.new_empty(rows, dtype=accumulation_dtype(query.dtype))
    *of_heads, tiles, words = reference_attention.live_shape(query, key, call)
    live = query.new_empty((*of_heads, torch.sym_max(2, tiles * words)) if keep or stats else (0,), dtype=torch.int32)
    support = query.new_empty(rows if stats else (0,), dtype=torch.int32)
    return out, m, torch.empty_like(m), torch.empty_like(out) if keep else out.new_empty(0), live, support


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    m: Tensor,
    delta: Tensor,
    u: Tensor,
    live: Tensor,
    needs_e: bool,
    *rest: Any,
) -> Any:
    rest, *more = _split(rest)
    call, backend = unpacked(rest)
    run = kernel(
        "attention_backward",
        query,
        backend,
        tensor_alpha=isinstance(call.e, Tensor),
        alpha_gradient=needs_e,
        attention=(features(query, key, value, call, False), query.shape[3], value.shape[3]),
    )
    live = _unfolded(live, query, key, call)
    with torch._C._DisableAutocast():
        grads = run(grad, query, key, value, m, delta, u, live, call, needs_e, *(more if any(more) else ()))
    nothing = m.new_empty(0), m.new_empty(0)
    return (*grads, *nothing[: 6 - len(grads)])  # a kernel of an older interface gives four


def _attention_backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    m: Tensor,
    delta: Tensor,
    u: Tensor,
    live: Tensor,
    needs_e: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    rest, needs_bias, needs_sink = _split(rest)
    bias = unpacked(rest)[0].bias
    return (
        *(t.new_empty(t.shape) for t in (query, key, value)),
        m.new_empty(m.shape if needs_e else (0,)),
        m.new_empty(bias.shape if needs_bias and bias is not None else (0,)),
        m.new_empty(m.shape if needs_sink else (0,)),
    )


class _Attention(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.attention in query, key, value, e (Eq. 5), bias and sink."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, stats: bool, *rest: Any) -> Any:
        results = _below_autograd(query, key, value, True, stats, *rest)
        _save(ctx, query, key, value, rest, results)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        of_rest: list[Tensor | None] = [None] * len(ctx.rest)
        if grad is None:
            return (None,) * 4 + tuple(of_rest)
        saved, rest = ctx.saved_tensors, list(ctx.rest)  # checkpointing lets them be read once
        saved, given_tensors = saved[:7], saved[7:]
        for place, given in zip(ctx.tensor_places, given_tensors, strict=True):
            rest[place] = given
        needed = ctx.needs_input_grad
        places = [_PLACES[name] for name in ("e_tensor", "bias", "sink")]
        needs_e, needs_bias, needs_sink = (place < len(rest) and needed[4 + place] for place in places)
        # under create_graph=True this operator's own Autograd key makes its results differentiable again
        *grads, grad_e, grad_bias, grad_sink = torch.ops.diffmax.attention_backward(
            grad, *saved, needs_e, *rest, needs_bias=needs_bias, needs_sink=needs_sink
        )
        if needs_e:
            of_rest[places[0]] = grad_e.sum((0, 2))
        if needs_bias:
            of_rest[places[1]] = grad_bias.to(rest[places[1]].dtype)
        if needs_sink:
            of_rest[places[2]] = grad_sink.sum((0, 2))
        return (*(g if wanted else None for g, wanted in zip(grads, needed, strict=False)), None, *of_rest)


class _TransformableAttention(torch.autograd.Function):
    """As `_Attention`, in the form that torch.func needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, stats: bool, *rest: Any) -> Any:
        return _below_autograd(query, key, value, True, stats, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        query, key, value, _, *rest = inputs
        _save(ctx, query, key, value, tuple(rest), output)

    backward = _Attention.backward


def _below_autograd(*arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.attention(*arguments)


def _save(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rest: tuple[Any, ...], results: Any) -> None:
    _, m, delta, u, live, support = results
    ctx.mark_non_differentiable(m, delta, u, live, support)
    ctx.set_materialize_grads(False)
    ctx.tensor_places = [place for place, given in enumerate(rest) if isinstance(given, Tensor)]
    ctx.save_for_backward(query, key, value, m, delta, u, live, *(rest[place] for place in ctx.tensor_places))
    ctx.rest = [None if isinstance(given, Tensor) else given for given in rest]


def attention(query: Tensor, key: Tensor, value: Tensor, stats: bool, call: AttentionCall, backend: str) -> Any:
    """What torch.ops.diffmax.attention gives, by a way that torch.func can transform."""
    if not torch.compiler.is_compiling() and portable.is_tracing():
        return portable.attention(query, key, value, call, stats)
    rest = packed(call, backend)
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    if transformed and forward_ad._current_level < 0:
        return _TransformableAttention.apply(query, key, value, stats, *rest)
    return torch.ops.diffmax.attention(query, key, value, False, stats, *rest)


def _differentiable(rest: tuple[Any, ...]) -> list[Tensor | None]:
    """What of a call may have a gradient, besides query, key and value."""
    return [rest[_PLACES[name]] for name in ("e_tensor", "bias", "sink") if _PLACES[name] < len(rest)]


def _attention_autograd(query: Tensor, key: Tensor, value: Tensor, keep: bool, stats: bool, *rest: Any) -> Any:
    if portable.exports_onnx():
        return portable.attention(query, key, value, unpacked(rest)[0], stats)
    tensors = (query, key, value, *_differentiable(rest))
    forward_mode = rows_operator._has_tangent(*tensors)
    if not forward_mode and not rows_operator._differentiates(*tensors):
        return _below_autograd(query, key, value, keep, stats, *rest)
    if forward_mode or torch._C._functorch.peek_interpreter_stack() is not None:  # where no autograd.Function may be called
        call, backend = unpacked(rest)
        return differentiable.forward(query, key, value, call, stats, _rows_backend(backend))
    return _Attention.apply(query, key, value, stats, *rest)


def _attention_backward_autograd(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    m: Tensor,
    delta: Tensor,
    u: Tensor,
    live: Tensor,
    needs_e: bool,
    *rest: Any,
) -> Any:
    tensors = (grad, query, key, value, *_differentiable(rest))
    if rows_operator._has_tangent(*tensors) or rows_operator._differentiates(*tensors):
        rest, needs_bias, needs_sink = _split(rest)
        call, backend = unpacked(rest)
        needs = (needs_e, needs_bias, needs_sink)
        return differentiable.backward(grad, query, key, value, call, *needs, _rows_backend(backend))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.attention_backward(grad, query, key, value, m, delta, u, live, needs_e, *rest)


def _rows_backend(backend: str) -> str:
    """Where scores are held, they live where the query does: some row kernel serves them."""
    return backend if backend == "reference" else ""


# vmap: a batch of queries, keys and values alone lies beside the call's own; of anything else, one after the other


def _attention_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _vmapped(torch.ops.diffmax.attention, 3, 5, info.batch_size, in_dims, arguments)


def _attention_backward_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _vmapped(torch.ops.diffmax.attention_backward, 8, 9, info.batch_size, in_dims, arguments)


def _vmapped(
    operator: Any, tensors: int, call_at: int, size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    dims = [dim if isinstance(given, Tensor) else None for given, dim in zip(arguments, in_dims, strict=True)]
    if any(dim is not None for dim in dims[tensors:]) or not _widens(arguments[call_at:]):
        each = [
            operator(*(given if dim is None else given.select(dim, n) for given, dim in zip(arguments, dims, strict=True)))
            for n in range(size)
        ]
        results = tuple(torch.stack(entries) for entries in zip(*each, strict=True))
        return results, (0,) * len(results)
    wide = []
    for t, dim in zip(arguments[:tensors], dims, strict=False):
        t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        wide.append(t.flatten(0, 1) if t.ndim > 2 else t[0])  # of what is not there, (0,)
    results = operator(*wide, *arguments[tensors:])
    there = [t.ndim > 1 for t in results]
    unfolded = (
        t.unflatten(0, (size, t.shape[0] // size)) if is_there else t for t, is_there in zip(results, there, strict=True)
    )
    return tuple(unfolded), tuple(0 if is_there else None for is_there in there)


def _widens(rest: tuple[Any, ...]) -> bool:
    """Whether the call says the same of every entry of a batch."""
    rest, needs_bias, _ = _split(rest)
    call, _ = unpacked(rest)
    alike = all(t is None or t.shape[0] == 1 for t in (call.mask, call.bias))
    slopes = call.alibi is None or call.alibi.ndim == 1
    return alike and slopes and not needs_bias and call.cu_seqlens_q is None and call.dropout_p == 0


_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("attention", _attention_autograd, "Autograd")
torch.library.register_fake("diffmax::attention", _attention_fake, lib=_LIBRARY)
_LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _attention_backward_autograd, "Autograd")
torch.library.register_fake("diffmax::attention_backward", _attention_backward_fake, lib=_LIBRARY)
if hasattr(torch.library, "register_vmap"):  # torch 2.5
    torch.library.register_vmap("diffmax::attention", _attention_vmap, lib=_LIBRARY)
    torch.library.register_vmap("diffmax::attention_backward", _attention_backward_vmap, lib=_LIBRARY)
