"""torch.ops.diffmax.attention and attention_backward: schemas, shapes for tracing, gradients.

Wired like the operators of `_ops`. The arithmetic is in the kernel that `_dispatch` chooses, with the signatures of
`diffmax.reference_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffmax import _ops, reference_attention
from diffmax._dispatch import kernel
from diffmax._numerics import accumulation_dtype
from diffmax.plugin import AttentionCall

_LIBRARY = torch.library.Library("diffmax", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

# What both operators share is what `AttentionCall` holds, with e and e_tensor as for bisect and e_tensor of shape (H,).
# Later arguments are appended to it with defaults, so that calls written today stay valid.
_CALL = (
    "float scale, float e, Tensor? e_tensor, Tensor? mask, bool lower_right, SymInt left, SymInt right, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, str backend"
)
_LIBRARY.define(
    f"attention(Tensor query, Tensor key, Tensor value, bool keep, bool stats, {_CALL})"
    " -> (Tensor out, Tensor m, Tensor delta, Tensor u, Tensor live, Tensor support)",
    tags=_TAGS,
)
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor m, Tensor delta, Tensor u, Tensor live,"
    f" bool needs_e, {_CALL}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_e)",
    tags=_TAGS,
)
_E_TENSOR, _BACKEND = 2, 11  # places in _CALL


def _call(
    scale: float,
    e: float,
    e_tensor: Tensor | None,
    mask: Tensor | None,
    lower_right: bool,
    left: int,
    right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    backend: str,
) -> AttentionCall:
    return AttentionCall(
        scale=scale,
        e=e if e_tensor is None else e_tensor,
        mask=mask,
        lower_right=lower_right,
        left=left,
        right=right,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )


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
    }
    return frozenset(name for name, needed in needs.items() if needed)


def _attention(query: Tensor, key: Tensor, value: Tensor, keep: bool, stats: bool, *rest: Any) -> Any:
    call = _call(*rest)
    choice = (features(query, key, value, call, stats), query.shape[3], value.shape[3])
    run = kernel("attention", query, rest[_BACKEND], tensor_alpha=isinstance(call.e, Tensor), attention=choice)
    with torch._C._DisableAutocast():  # a kernel's products are of the dtypes that it chose
        return run(query, key, value, call, keep, stats)


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, keep: bool, stats: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _call(*rest)
    rows = query.shape[:3]
    out = value.new_empty((*rows, value.shape[3]))
    m = query.new_empty(rows, dtype=accumulation_dtype(query.dtype))
    live = query.new_empty(reference_attention.live_shape(query, key, call) if keep or stats else (0,), dtype=torch.int32)
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
    call = _call(*rest)
    run = kernel(
        "attention_backward",
        query,
        rest[_BACKEND],
        tensor_alpha=isinstance(call.e, Tensor),
        alpha_gradient=needs_e,
        attention=(features(query, key, value, call, False), query.shape[3], value.shape[3]),
    )
    with torch._C._DisableAutocast():
        return run(grad, query, key, value, m, delta, u, live, call, needs_e)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = (t.new_empty(t.shape) for t in (query, key, value))
    return (*gradients, m.new_empty(m.shape if needs_e else (0,)))  # type: ignore[return-value]  # they are three


class _Attention(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.attention in query, key, value and e (Eq. 5)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, e_tensor: Tensor | None, stats: bool, *rest: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = torch.ops.diffmax.attention(query, key, value, True, stats, *rest)
        _, m, delta, u, live, support = results
        ctx.mark_non_differentiable(m, delta, u, live, support)
        ctx.set_materialize_grads(False)
        ctx.tensor_places = [place for place, given in enumerate(rest) if isinstance(given, Tensor)]
        ctx.save_for_backward(query, key, value, m, delta, u, live, *(rest[place] for place in ctx.tensor_places))
        ctx.rest = [None if isinstance(given, Tensor) else given for given in rest]
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + len(ctx.rest))
        if grad is None:
            return (None,) * 4 + nothing
        saved, rest = ctx.saved_tensors, list(ctx.rest)  # checkpointing lets them be read once
        saved, given_tensors = saved[:7], saved[7:]
        for place, given in zip(ctx.tensor_places, given_tensors, strict=True):
            rest[place] = given
        needs_e = ctx.needs_input_grad[3]
        # under create_graph=True this operator's own Autograd key makes its results differentiable again
        *grads, grad_e = torch.ops.diffmax.attention_backward(grad, *saved, needs_e, *rest)
        grads = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
        return (*grads, grad_e.sum((0, 2)) if needs_e else None, *nothing)


def _refuse_transforms() -> None:
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "diffmax.attention: forward-mode differentiation and torch.func transforms are not supported\n"
            "use torch.autograd.grad, torch.autograd.functional.jacobian or hessian"
        )


def _attention_autograd(query: Tensor, key: Tensor, value: Tensor, keep: bool, stats: bool, *rest: Any) -> Any:
    _refuse_transforms()
    e_tensor = rest[_E_TENSOR]
    if _ops._differentiates(query, key, value, e_tensor):
        return _Attention.apply(query, key, value, e_tensor, stats, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.attention(query, key, value, keep, stats, *rest)


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
    e_tensor = rest[_E_TENSOR]
    if _ops._differentiates(grad, query, key, value, e_tensor):
        return _composed_backward(grad, query, key, value, needs_e, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.attention_backward(grad, query, key, value, m, delta, u, live, needs_e, *rest)


def _composed_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, needs_e: bool, *rest: Any) -> Any:
    """The second derivative: the same gradients from differentiable operators, with all scores and weights in memory."""
    call, backend = _call(*rest), rest[_BACKEND]
    if call.cu_seqlens_q is not None:
        raise NotImplementedError(
            "diffmax.attention_varlen: the second derivative is not supported for packed sequences\n"
            "use diffmax.attention, with a mask where sequences have different lengths"
        )
    acc = accumulation_dtype(query.dtype)
    scores = reference_attention.masked_scores(query, key, call)
    e_tensor = reference_attention.per_head(call.e) if isinstance(call.e, Tensor) else None
    e = 0.0 if isinstance(call.e, Tensor) else call.e
    by_name = backend if backend == "reference" else ""  # the scores live where the query does: some row kernel serves them
    p, m, delta = torch.ops.diffmax.bisect(scores, e, e_tensor, 3, 200, True, by_name)
    g, groups = grad.to(acc), key.shape[1]
    d_p = (reference_attention.grouped(g, groups) @ value.to(acc).mT).view(p.shape)
    d_s, grad_e = torch.ops.diffmax.bisect_backward(d_p, p, m, delta, None, e, e_tensor, 3, needs_e, by_name)
    d_s = reference_attention.grouped(d_s, groups) * call.scale
    return (
        (d_s @ key.to(acc)).view(query.shape).to(query.dtype),
        (d_s.mT @ reference_attention.grouped(query.to(acc), groups)).to(key.dtype),
        (reference_attention.grouped(p, groups).mT @ reference_attention.grouped(g, groups)).to(value.dtype),
        grad_e.squeeze(3) if needs_e else grad_e,
    )


_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("attention", _attention_autograd, "Autograd")
torch.library.register_fake("diffmax::attention", _attention_fake, lib=_LIBRARY)
_LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _attention_backward_autograd, "Autograd")
torch.library.register_fake("diffmax::attention_backward", _attention_backward_fake, lib=_LIBRARY)
