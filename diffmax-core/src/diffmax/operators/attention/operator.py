"""torch.ops.diffmax.attention and attention_backward: schemas, shapes for tracing, gradients.

Wired like the operators of `operators.rows.operator`. The arithmetic is in the kernel that `machine.dispatch` chooses, with the
signatures of `diffmax.reference.attention`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffmax.machine.dispatch import kernel
from diffmax.operators.attention import differentiable
from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.tiles import live_shape, widened
from diffmax.operators.common import portable
from diffmax.operators.common.autograd import differentiates, has_tangent, is_transformed
from diffmax.operators.common.fast_path import is_plain
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.wiring import beside_the_batch, enter, one_by_one
from diffmax.plugin import AttentionCall, AttentionGradients, AttentionResults, Saved, Wanted
from diffmax.reference import attention as reference_attention


class Arguments(NamedTuple):
    """Of torch.ops.diffmax.attention. `keep`: whether a backward follows; `stats`: whether statistics are asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: bool
    stats: bool
    call: AttentionCall
    backend: str = ""


class BackwardArguments(NamedTuple):
    """Of torch.ops.diffmax.attention_backward."""

    grad: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    saved: Saved
    wanted: Wanted
    call: AttentionCall
    backend: str = ""


FORWARD = Schema("attention", Arguments, AttentionResults, sizes=True)
BACKWARD = Schema(
    "attention_backward", BackwardArguments, AttentionGradients, prefixes={"wanted": "needs_", "results": "grad_"}, sizes=True
)
LEARNED = ("e_tensor", "bias", "sink")
"""Arguments that may have a gradient, besides query, key and value, in the order of `Wanted`."""


def features(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, stats: bool) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the call needs, alpha's aside."""
    return rules.features(
        call,
        gqa=query.shape[1] != key.shape[1],
        varlen=call.cu_seqlens_q is not None,
        value_dim=value.shape[3] != key.shape[3],
        attention_stats=stats,
        dropout=call.dropout_p > 0,
    )


def _attention(*flat: Any) -> AttentionResults:
    return _forward(*FORWARD.rebuild(flat))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, keep: bool, stats: bool, call: AttentionCall, backend: str
) -> AttentionResults:
    run = kernel(
        "attention",
        query,
        backend,
        tensor_alpha=isinstance(call.e, Tensor),
        features=features(query, key, value, call, stats),
        head_dims=(query.shape[3], value.shape[3]),
    )
    if run is reference_attention.attention and not backend:  # no fused kernel serves the call; a row kernel may
        run = partial(run, solve=differentiable.row_operator(""))
    with torch._C._DisableAutocast():  # a kernel's products are of the dtypes that it chose
        found = AttentionResults(*run(query, key, value, call, keep, stats))
    return found if found.live.ndim == 1 else found._replace(live=_folded(found.live))


def _folded(live: Tensor) -> Tensor:
    """(B, H, tiles, words) as the operators hand it on: (B, H, n), n at least 2.

    A tracer asks of every size whether it is 1. Of this one it can know without binding the lengths to one tile.
    """
    live = live.flatten(2)
    return live if live.shape[2] >= 2 else widened(live, 2)


def _unfolded(live: Tensor, query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """The reverse."""
    if live.ndim == 1:
        return live
    shape = live_shape(query, key, call)
    return live[..., : shape[2] * shape[3]].reshape(shape)


def _attention_fake(*flat: Any) -> AttentionResults:
    query, key, value, keep, stats, call, _ = FORWARD.rebuild(flat)
    rows = query.shape[:3]
    out = value.new_empty((*rows, value.shape[3]))
    m = query.new_empty(rows, dtype=accumulation_dtype(query.dtype))
    *of_heads, tiles, words = live_shape(query, key, call)
    live = query.new_empty((*of_heads, torch.sym_max(2, tiles * words)) if keep or stats else (0,), dtype=torch.int32)
    support = query.new_empty(rows if stats else (0,), dtype=torch.int32)
    return AttentionResults(out, m, torch.empty_like(m), torch.empty_like(out) if keep else out.new_empty(0), live, support)


def _attention_returned(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool
) -> AttentionResults:
    like = _attention_fake(*FORWARD.flatten(query, key, value, keep, stats, call, ""))
    return like._replace(live=like.live.new_empty(live_shape(query, key, call))) if keep or stats else like


def _attention_backward(*flat: Any) -> AttentionGradients:
    return _backward(*BACKWARD.rebuild(flat))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    wanted: Wanted,
    call: AttentionCall,
    backend: str,
) -> AttentionGradients:
    run = kernel(
        "attention_backward",
        query,
        backend,
        tensor_alpha=isinstance(call.e, Tensor),
        alpha_gradient=wanted.e,
        features=features(query, key, value, call, False),
        head_dims=(query.shape[3], value.shape[3]),
    )
    saved = saved._replace(live=_unfolded(saved.live, query, key, call))
    with torch._C._DisableAutocast():
        return AttentionGradients(*run(grad, query, key, value, saved, call, wanted))


def with_flat_arguments(run: Any) -> Any:
    """A kernel of attention_backward for interface 1.3 or older, as one of today: flat arguments, four gradients or six."""

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, call: AttentionCall, wanted: Wanted
    ) -> Any:
        more = wanted[1:] if wanted.bias or wanted.sink else ()
        found = run(grad, query, key, value, *saved, call, wanted.e, *more)
        if not isinstance(found, tuple | list):
            return found  # which `operators.common.results` refuses
        nothing = (saved.m.new_empty(0),) * (len(AttentionGradients._fields) - len(found))
        return (*found, *nothing)

    return backward


def _attention_backward_fake(*flat: Any) -> AttentionGradients:
    _, query, key, value, saved, wanted, call, _ = BACKWARD.rebuild(flat)
    m, bias = saved.m, call.bias
    return AttentionGradients(
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        m.new_empty(m.shape if wanted.e else (0,)),
        m.new_empty(bias.shape if wanted.bias and bias is not None else (0,)),
        m.new_empty(m.shape if wanted.sink else (0,)),
    )


def _attention_backward_returned(*arguments: Any) -> AttentionGradients:
    *tensors, call, wanted = arguments
    return _attention_backward_fake(*BACKWARD.flatten(*tensors, wanted, call, ""))


class _Attention(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.attention in query, key, value, e (Eq. 5), bias and sink."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Any:
        results = _below_autograd(*flat)
        _save(ctx, flat, results)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        flat, needed = list(ctx.flat), tuple(ctx.needs_input_grad)
        of: list[Tensor | None] = [None] * len(flat)
        if grad is None:
            return tuple(of)
        *given, m, delta, u, live = ctx.saved_tensors  # checkpointing lets them be read once
        for place, t in zip(ctx.places, given, strict=True):
            flat[place] = t
        query, key, value, *_rest, call, backend = FORWARD.rebuild(flat)
        learned = [FORWARD.place[name] for name in LEARNED]
        wanted = Wanted._make(place < len(flat) and needed[place] for place in learned)
        # under create_graph=True this operator's own Autograd key makes its results differentiable again
        plain = not torch.is_grad_enabled() and not is_transformed() and is_plain(grad, *given, m, delta, u, live)
        found = AttentionGradients(
            *(_backward if plain else BACKWARD)(grad, query, key, value, Saved(m, delta, u, live), wanted, call, backend)
        )
        of[:3] = (t if is_needed else None for t, is_needed in zip(found[:3], needed, strict=False))
        e, bias, sink = learned
        if wanted.e:
            of[e] = found.e.sum((0, 2))
        if wanted.bias:
            of[bias] = found.bias.to(flat[bias].dtype)
        if wanted.sink:
            of[sink] = found.sink.sum((0, 2))
        return tuple(of)


class _TransformableAttention(torch.autograd.Function):
    """As `_Attention`, in the form that torch.func needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*flat: Any) -> Any:
        return _below_autograd(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, output)

    backward = _Attention.backward


def _below_autograd(*flat: Any) -> Any:
    run = _attention if not is_transformed() and is_plain(*flat) else torch.ops.diffmax.attention
    with torch._C._AutoDispatchBelowAutograd():
        return run(*flat)


def _save(ctx: Any, flat: tuple[Any, ...], results: Any) -> None:
    _, m, delta, u, live, support = results
    ctx.mark_non_differentiable(m, delta, u, live, support)
    ctx.set_materialize_grads(False)
    ctx.places = [place for place, given in enumerate(flat) if isinstance(given, Tensor)]
    ctx.save_for_backward(*(flat[place] for place in ctx.places), m, delta, u, live)
    ctx.flat = [None if isinstance(given, Tensor) else given for given in flat]


def attention(query: Tensor, key: Tensor, value: Tensor, stats: bool, call: AttentionCall, backend: str) -> AttentionResults:
    """What torch.ops.diffmax.attention gives, on the shortest way there that differentiates and transforms what has to be."""
    if torch.compiler.is_compiling():
        return AttentionResults(*FORWARD(query, key, value, False, stats, call, backend))
    if portable.is_tracing():
        return portable.attention(query, key, value, call, stats)
    transformed = is_transformed()
    plain = not transformed and is_plain(query, key, value, *vars(call).values())
    if plain and not differentiates(query, key, value, *_learned(call)):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(query, key, value, False, stats, call, backend)
    if plain or (transformed and forward_ad._current_level < 0):
        function = _Attention if plain else _TransformableAttention
        return AttentionResults(*function.apply(*FORWARD.flatten(query, key, value, True, stats, call, backend)))
    return AttentionResults(*FORWARD(query, key, value, False, stats, call, backend))


def _learned(call: AttentionCall) -> tuple[Tensor | None, ...]:
    """What of a call may have a gradient."""
    return call.e if isinstance(call.e, Tensor) else None, call.bias, call.sink


def _attention_autograd(*flat: Any) -> Any:
    query, key, value, _, stats, call, backend = FORWARD.rebuild(flat)
    if portable.exports_onnx():
        return portable.attention(query, key, value, call, stats)
    tensors = (query, key, value, *_learned(call))
    forward_mode = has_tangent(*tensors)
    if not forward_mode and not differentiates(*tensors):
        return _below_autograd(*flat)
    if forward_mode or torch._C._functorch.peek_interpreter_stack() is not None:  # where no autograd.Function may be called
        return differentiable.forward(query, key, value, call, stats, _rows_backend(backend))
    return _Attention.apply(*flat[:3], True, *flat[4:])


def _attention_backward_autograd(*flat: Any) -> Any:
    grad, query, key, value, _, wanted, call, backend = BACKWARD.rebuild(flat)
    tensors = (grad, query, key, value, *_learned(call))
    if has_tangent(*tensors) or differentiates(*tensors):
        return differentiable.backward(grad, query, key, value, call, wanted, _rows_backend(backend))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.attention_backward(*flat)


def _rows_backend(backend: str) -> str:
    """Where scores are held, they live where the query does: some row kernel serves them."""
    return backend if backend == "reference" else ""


# vmap: a batch of queries, keys and values alone lies beside the call's own; of anything else, one after the other


def _attention_vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
    return _vmapped(torch.ops.diffmax.attention, FORWARD.rebuild(flat).call, 3, info.batch_size, in_dims, flat)


def _attention_backward_vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
    given = BACKWARD.rebuild(flat)
    tensors = 0 if given.wanted.bias else BACKWARD.place["live"] + 1  # a bias is the whole batch's
    return _vmapped(torch.ops.diffmax.attention_backward, given.call, tensors, info.batch_size, in_dims, flat)


def _vmapped(
    operator: Any, call: AttentionCall, tensors: int, size: int, in_dims: tuple[Any, ...], flat: tuple[Any, ...]
) -> tuple[Any, Any]:
    """By a wider batch, if the first `tensors` of the arguments alone are batched; by none of them, one after the other."""
    dims = [dim if isinstance(given, Tensor) else None for given, dim in zip(flat, in_dims, strict=True)]
    if not tensors or any(dim is not None for dim in dims[tensors:]) or not _says_the_same(call):
        return one_by_one(operator, size, dims, flat)
    rest = flat[tensors:]
    return beside_the_batch(lambda *wide: operator(*wide, *rest), size, dims[:tensors], flat[:tensors])


def _says_the_same(call: AttentionCall) -> bool:
    """Whether the call says the same of every entry of a batch."""
    alike = all(t is None or t.shape[0] == 1 for t in (call.mask, call.bias))
    slopes = call.alibi is None or call.alibi.ndim == 1
    return alike and slopes and call.cu_seqlens_q is None and call.dropout_p == 0


enter(
    FORWARD,
    run=_attention,
    autograd=_attention_autograd,
    fake=_attention_fake,
    vmap=_attention_vmap,
    returned=_attention_returned,
    optional=("live",),
)
enter(
    BACKWARD,
    run=_attention_backward,
    autograd=_attention_backward_autograd,
    fake=_attention_backward_fake,
    vmap=_attention_backward_vmap,
    returned=_attention_backward_returned,
)
