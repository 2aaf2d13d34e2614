"""Calls of `DiffmaxAttention` in the style of torch.nn.MultiheadAttention: masks, weights, and torch's fast paths."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from diffmax.operators.attention import scores as rules
from diffmax.operators.common.autocast import without_autocast
from diffmax.operators.common.checks import _shape
from diffmax.operators.rows.api import normalize
from diffmax.plugin import AttentionCall
from diffmax.reference import attention as reference

_LAYOUT_HINT = "tokens come batch first, unless the module is made with batch_first=False"
_PROJECTIONS_HINT = "the projections are apart, in q_proj, k_proj and v_proj"


class SeparateProjections:
    """Replaces the packed weights with which the fast path of torch's layers would bypass the module.

    If one of these tensors has a __torch_function__, the layers call the module instead. Encoders check the same before they
    make nested tensors.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(
            f"DiffmaxAttention: there is no in_proj_weight or in_proj_bias, got a call of {func.__name__}\n{_PROJECTIONS_HINT}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"DiffmaxAttention: there is no in_proj_weight or in_proj_bias, got a look at its {name}\n{_PROJECTIONS_HINT}"
        )


def merge_masks(
    name: str,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    query: Tensor,
    key: Tensor,
    batched: bool,
    is_torch_call: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, bool]:
    """attn_mask and is_causal for `diffmax.attention`, with padding masked; `query` and `key` are split into heads."""
    padding = _padding(name, key_padding_mask, key, batched, is_torch_call)
    if attn_mask is not None and hasattr(attn_mask, "variant"):  # torch's CausalBias, whose values must not be read
        if padding is not None:
            raise ValueError(f"{name}: a CausalBias and key_padding_mask exclude each other\npass is_causal=True instead")
        return attn_mask, is_causal
    if attn_mask is None:
        return padding, is_causal
    _check_kind(name, attn_mask, "hidden" if is_torch_call else "seen")
    if not is_torch_call:
        return _combine(attn_mask, padding), is_causal
    attn_mask = _torch_mask(name, attn_mask, query, key, batched)
    if is_causal and padding is None and not needs_weights:  # torch's module then ignores the mask too
        return None, True
    return _combine(attn_mask, padding), False


def _torch_mask(name: str, mask: Tensor, query: Tensor, key: Tensor, batched: bool) -> Tensor:
    """Convert an attn_mask of nn.MultiheadAttention, True where masked, to a 4-d mask of `diffmax.attention`."""
    batch, heads, length, _ = query.shape
    keys = key.shape[2]
    folded = (batch * heads, length, keys)
    if tuple(mask.shape) not in ((length, keys), folded):
        axes = "B * H, L, S" if batched else "H, L, S"
        raise ValueError(
            f"{name}: with query, key and value, attn_mask must have shape (L, S) = {folded[1:]} or ({axes}) = {folded}, as "
            f"in nn.MultiheadAttention, got {_shape(mask)}\n{_mask_hint(mask, query, keys)}"
        )
    mask = mask.view(batch, heads, length, keys) if mask.ndim == 3 else mask.view(1, 1, length, keys)
    return ~mask if mask.dtype == torch.bool else mask


def _mask_hint(mask: Tensor, query: Tensor, keys: int) -> str:
    wanted = (*query.shape[:2], query.shape[2], keys)
    padded = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(padded) == 4 and all(a in (1, w) for a, w in zip(padded, wanted, strict=True)):
        hidden = "" if mask.is_floating_point() else "if it is True where a key is seen, pass ~mask; "
        return f"{hidden}give it the shape with .expand{tuple(wanted)}.flatten(0, 1)"
    return _LAYOUT_HINT


def _padding(name: str, mask: Tensor | None, key: Tensor, batched: bool, floating: bool) -> Tensor | None:
    """key_padding_mask as a mask of `diffmax.attention`; `floating`: whether it may be added to the scores."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or (floating and mask.is_floating_point())):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name}: key_padding_mask must be boolean, True at padding{', or floating' if floating else ''}, got {got}\n"
            "of a tokenizer's attention_mask it is attention_mask == 0"
        )
    batch, keys = key.shape[0], key.shape[2]
    wanted, axes = ((batch, keys), "(B, S)") if batched else ((keys,), "(S,)")
    if tuple(mask.shape) != wanted:
        hint = f"\n{_LAYOUT_HINT}" if tuple(mask.shape) == wanted[::-1] else ""
        raise ValueError(f"{name}: key_padding_mask must have shape {axes} = {wanted}, got {_shape(mask)}{hint}")
    mask = mask.view(batch, 1, 1, keys)
    return ~mask if mask.dtype == torch.bool else mask


def _combine(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Combine two masks, each boolean and True where visible, or floating and added."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        first, second = second, first
    return first.masked_fill(~second, -torch.inf) if second.dtype == torch.bool else first + second


def with_weights(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """The output of attention, and its weights after dropout (B, H, L, S), with a sink (B, H, L, S + 1), unfused."""
    with without_autocast(query):
        weights = _weights(query, key, call, backend)
        out = reference.weighted(weights[..., : key.shape[2]], value).to(query.dtype)
        return out, weights.to(query.dtype)


def only_weights(query: Tensor, key: Tensor, call: AttentionCall, backend: str | None) -> Tensor:
    """The weights of `with_weights`, in the dtype in which they are computed."""
    with without_autocast(query):
        return _weights(query, key, call, backend)


def _weights(query: Tensor, key: Tensor, call: AttentionCall, backend: str | None) -> Tensor:
    keys, region = key.shape[2], reference.Whole.of(query, key, call)
    scores = rules.apply(reference.products(query, key, call.scale), call, region)
    e, e_tensor = (0.0, call.e.view(-1, 1, 1)) if isinstance(call.e, Tensor) else (call.e, None)
    weights = normalize(scores, e, e_tensor, 3, 200, True, backend)
    kept = reference.times(weights[..., :keys], reference.keep_factors(scores[..., :keys], call))
    return torch.cat([kept, weights[..., keys:]], 3)


def _check_kind(name: str, mask: Tensor, meaning: str) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name}: attn_mask must be boolean or floating, got {got}\n"
            f"a boolean mask is True where a key is {meaning}; a floating one is added to the scores"
        )
