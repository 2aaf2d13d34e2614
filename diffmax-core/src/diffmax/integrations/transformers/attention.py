"""Hugging Face transformers: `register()`, then `attn_implementation="diffmax"` works in models with a selectable attention."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from packaging.version import Version
from torch import Tensor, nn

from diffmax.integrations.transformers import refusals
from diffmax.integrations.transformers.masks import left_padding, mask_of, merged_mask, read
from diffmax.integrations.transformers.unfused import attend_with_weights
from diffmax.machine.metadata import PackageNotFoundError, version
from diffmax.matched import check_scale, matched_scale, rescaled
from diffmax.operators.attention.api import attention, attention_varlen
from diffmax.operators.common.checks import one_minus_alpha
from diffmax.operators.decoding.api import attention_with_kvcache

ModelAlpha: TypeAlias = "float | Tensor | Callable[[nn.Module], float | Tensor]"
ModelScale: TypeAlias = 'float | Tensor | Literal["match"] | Callable[[nn.Module], float | Tensor]'

# transformers gives these substrings of an attention implementation's name a special meaning.
_RESERVED = ("eager", "flash", "flex", "paged", "sdpa", "/", "|")

# Arguments that models pass to every attention function and that do not affect the weights.
_BOOKKEEPING = {
    "cache_position",
    "deterministic",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}

_WHAT_TO_DO = dict.fromkeys(
    ("cache", "logits_indices"), "continuous batching keeps its own paged cache: call model.generate instead"
)


def register(name: str = "diffmax", alpha: ModelAlpha = 0.9, *, scale: ModelScale = 1.0, partial: bool = False) -> None:
    """Make diffmax an attention implementation of Hugging Face transformers, under `name`.

    Afterwards `AutoModel.from_pretrained(..., attn_implementation=name)` and `model.set_attn_implementation(name)` accept it.
    Both the attention function and its mask function are registered: without the second, models would pass no mask.

    Args:
        name: The name to register. Several names with different alphas can coexist. Registering a name again replaces it, also
            in models that already use it.
        alpha: Shape parameter in (0, 1), as in `diffmax_bisect`. A float; a tensor of shape () or (H,), one per query head,
            which may require a gradient; or a function of the attention module that returns either. It is called in every
            forward pass, and can return a different alpha per layer (`lambda module: alphas[module.layer_idx]`).
        scale: Factor of the model's scores, with all that is added to them. "match": the matched scale of alpha, for a model
            that was trained with softmax (`diffmax.matched_scale`, docs/choosing.md); it follows an alpha that changes, and
            gives it a part of its gradient. Or a positive number, a tensor () or (H,), or a function of the attention module.
        partial: Accept models that keep softmax in a part of their attention, such as a pooling head. Default: refuse them.
    Raises:
        ImportError: transformers is missing or too old.
        TypeError: name, alpha or scale has the wrong type.
        ValueError: alpha lies outside (0, 1), scale is not positive, or `name` has a special meaning in transformers. Later,
            from a model: its configuration has heads from `replace`, which this name would not use; or it computes attention
            itself, and would keep softmax. The latter is detected when the model is loaded, or at its first forward pass, by a
            check that this function adds to `PreTrainedModel`; docs/models.md lists the types.

    A model then uses `diffmax.attention`, which does not hold the score matrix in memory, unless `output_attentions=True`
    requests the weights. Boolean and additive masks, position biases, causal and bidirectional attention, grouped query heads,
    KV caches, sliding windows, softcap, sinks (s_aux) and dropout are supported; so are packed sequences, given by
    cu_seq_lens_q and cu_seq_lens_k, or by position_ids with `use_cache=False`: with a cache, transformers does not detect
    packed sequences, and each token sees all previous ones; nor do models that do not tell their mask function of position_ids,
    such as GPT-OSS, with any attention. A fully masked token gets zeros. An argument that could change the
    weights and is not implemented, or is unknown, raises a ValueError.

    Example:
        >>> register("diffmax-sparser", alpha=0.5)
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        >>> model = LlamaModel(config)
        >>> model.set_attn_implementation("diffmax-sparser")
        >>> model(torch.tensor([[1, 2, 3, 4]])).last_hidden_state.shape
        torch.Size([1, 4, 8])
    """
    if not isinstance(name, str):
        hint = f"\nfor an alpha, write register(alpha={name!r})" if isinstance(name, (float, Tensor)) or callable(name) else ""
        raise TypeError(f"register: name must be a string, got {name!r}{hint}")
    if any(word in name for word in _RESERVED):
        raise ValueError(
            f"register: name must not contain {', '.join(_RESERVED)}, got {name!r}\n"
            'transformers gives these a meaning of their own: take another name, such as "diffmax"'
        )
    if not callable(alpha) and not isinstance(alpha, Tensor):
        one_minus_alpha("register", torch.empty(1), alpha, 0, ", or a function of the attention module that returns one")
    check_scale("register", scale, ", a tensor, or a function of the attention module that returns one")
    if isinstance(scale, str) and isinstance(alpha, float):
        scale = matched_scale(alpha)
    register_functions(name, functools.partial(_attend_registered, alpha=alpha, scale=scale), partial=partial)


def register_functions(name: str, attend: Callable[..., Any], label: str | None = None, partial: bool | None = False) -> None:
    """Register an attention function and its mask function under one name, and check the models that use it.

    `partial`: whether a model may keep softmax where it computes it itself; None: it may, with a warning.
    """
    attention_interface, mask_interface, sdpa_mask = _import_transformers()
    attention_interface.register(name, attend)
    mask_interface.register(name, functools.partial(mask_of, sdpa_mask))
    refusals.watch(name, label, partial)


def _import_transformers() -> tuple[Any, Any, Any]:
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    # 4.57 accepts the registration too, but keeps softmax in BERT and similar models, with only a log line
    if found == "none" or Version(found) < Version("5.0.0"):
        raise ImportError(
            f'register: transformers 5.0 or newer is needed, got {found}\npip install "diffmax-core[transformers]"'
        )
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    return AttentionInterface, AttentionMaskInterface, sdpa_mask


def _attend_registered(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    refusals.refuse_heads("diffmax attention", module)
    return _attention_forward(module, *args, **kwargs)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    *,
    alpha: ModelAlpha,
    scale: ModelScale = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function: query (B, H, L, D), key and value (B, H_kv, S, D) to output (B, L, H, D) and weights or None."""
    refusals.called()
    _refuse_what_changes_the_weights(kwargs)
    length, heads = query.shape[2], query.shape[1]
    packing = _packing(query, key, cu_seq_lens_q, cu_seq_lens_k)
    if packing is not None and is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # packed sequences come without a mask, as for flash-attention
    attention_mask, is_causal = read(module, attention_mask, is_causal, length, key.shape[2])
    if is_causal:
        # the rest is the empty part of a static cache, which is masked for every query: skip it
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    window = _window(sliding_window, attention_mask, key.shape[2], is_causal)
    alpha = _per_head("alpha", alpha(module) if callable(alpha) else alpha, heads)
    factor = _factor(scale(module) if callable(scale) else scale, alpha, heads)
    if softcap and isinstance(factor, Tensor):
        factor = _one_number(factor)
    query, scaling, _ = rescaled(factor, query, scaling)
    settings: dict[str, Any] = {
        "dropout_p": dropout if module.training else 0.0,
        "is_causal": is_causal,
        "scale": scaling,
        "alpha": alpha,
        "window_size": window,
        "softcap": factor * softcap if softcap else 0.0,
        "sink": None if s_aux is None else s_aux * factor,
    }
    wants_weights = _wants_weights(module, kwargs)
    if packing is not None and attention_mask is None and position_bias is None and not wants_weights:
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        longest = max_length_q or length, max_length_k or key.shape[2]
        out: Any = attention_varlen(q, k, v, *packing, *longest, enable_gqa=True, **settings)
        return out.unsqueeze(0), None
    if packing is not None:
        attention_mask = _mask_other_sequences(attention_mask, packing, length, key.shape[2])
    mask = merged_mask(attention_mask, position_bias)
    mask = rescaled(factor, query, None, mask)[2]
    if wants_weights:
        output, weights = attend_with_weights(query, key, value, mask, **settings)
        return output.transpose(1, 2).contiguous(), weights
    alike = query.dtype == key.dtype == value.dtype  # not so under autocast, where rotary keys are float32
    if length == 1 and alike and settings["dropout_p"] == 0 and not torch.is_grad_enabled():
        leftpad = None if mask is None else left_padding(mask, query.shape[0], key.shape[2])
        if mask is None or leftpad is not None:
            return _decode(query, key, value, leftpad, settings), None
    return attention(query, key, value, mask, enable_gqa=True, **settings).transpose(1, 2).contiguous(), None


def _decode(query: Tensor, key: Tensor, value: Tensor, leftpad: Tensor | None, settings: dict[str, Any]) -> Tensor:
    """One new token that sees the whole cache: the decoding operator splits the work over the cache instead of the queries."""
    options = {
        "softmax_scale": settings["scale"],
        "alpha": settings["alpha"],
        "softcap": settings["softcap"],
        "sink": settings["sink"],
        "cache_leftpad": leftpad,
    }
    caches = sys.modules.get("diffmax.integrations.transformers.rounded_cache")  # where none is, no key is of its layers
    layer = None if caches is None else caches.layer_of(query, key, value)
    out: Any
    if layer is None:
        out = attention_with_kvcache(*(t.transpose(1, 2) for t in (query, key, value)), **options)
    else:
        out = layer.decode(query, **options)
    result: Tensor = out
    return result


def _refuse_what_changes_the_weights(kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is not None and name not in _BOOKKEEPING:
            got = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
            action = _WHAT_TO_DO.get(name, 'load this model with attn_implementation="eager"')
            raise ValueError(f"diffmax attention: {name} is not implemented, got {got}\n{action}")


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether weights are requested, as transformers decides it: by the model's argument, or else by the configuration."""
    if kwargs.get("output_attentions") is not None:
        return bool(kwargs["output_attentions"])
    collected = _requested_outputs()
    if collected is not None:
        return any(key.endswith("attentions") for key in collected)
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _requested_outputs() -> dict[str, Any] | None:
    """The outputs that transformers collects from the layers by hooks in this forward pass."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:  # before 5.2
        return None
    collector: Any = _active_collector
    if torch.compiler.is_compiling():  # a graph cannot read a context variable; a compiled model sets this one
        known: dict[str, Any] | None = collector.global_var if collector.compiling else None
        return known
    known = collector.get()
    return known


def _window(sliding_window: int | None, mask: Tensor | None, keys: int, is_causal: bool) -> tuple[int, int] | None:
    """The window of a causal attention without a mask; a mask already contains it."""
    if sliding_window is None or mask is not None or keys <= sliding_window:
        return None
    if not is_causal:
        raise ValueError(
            f"diffmax attention: a sliding window that hides keys must arrive as a mask, got sliding_window {sliding_window}, "
            f"{keys} keys and no mask\nregister both functions, with diffmax.integrations.transformers.register"
        )
    return sliding_window - 1, 0


def _packing(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The sequence starts (cu_seqlens) of queries and keys that are packed into one row."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None or query.shape[0] != 1:
        given = ["no" if t is None else "some" for t in (cu_seqlens_q, cu_seqlens_k)]
        raise ValueError(
            "diffmax attention: packed sequences must come as one row, with cu_seq_lens_q and cu_seq_lens_k, got "
            f"{query.shape[0]} rows, {given[0]} cu_seq_lens_q and {given[1]} cu_seq_lens_k"
        )
    return cu_seqlens_q, cu_seqlens_k


def _mask_other_sequences(mask: Tensor | None, packing: tuple[Tensor, Tensor], queries: int, keys: int) -> Tensor:
    """The mask, with the keys of other sequences masked too."""
    positions = (torch.arange(n, device=ends.device) for n, ends in zip((queries, keys), packing, strict=True))
    q, k = (torch.searchsorted(ends[1:].contiguous(), at, right=True) for at, ends in zip(positions, packing, strict=True))
    same = (q.unsqueeze(1) == k)[None, None]
    if mask is None:
        return same
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)


def _factor(scale: Any, alpha: float | Tensor, heads: int) -> float | Tensor:
    """Factor of the scores."""
    check_scale("diffmax attention", scale, ", or a tensor")
    return matched_scale(alpha) if isinstance(scale, str) else _per_head("scale", scale, heads)


def _one_number(factor: Tensor) -> float:
    """The factor of softcapped scores, which is that of the cap too, and no tensor there."""
    if factor.ndim == 0 and not factor.requires_grad:  # such as that of an AlphaSchedule
        return float(factor)
    got = "one that is learned" if factor.requires_grad else f"a tensor of shape {tuple(factor.shape)}"
    raise ValueError(
        f"diffmax attention: this model caps its scores (softcap), so the scale must be one number, got {got}\n"
        "register one alpha for all heads that is not learned, or a scale that does not depend on it"
    )


def _per_head(what: str, value: float | Tensor, heads: int) -> float | Tensor:
    """Check the shape of a tensor alpha or scale."""
    if isinstance(value, Tensor) and value.shape not in ((), (heads,)):
        raise ValueError(
            f"diffmax attention: a tensor {what} must have shape () or ({heads},), got {tuple(value.shape)}\n"
            f"the layer has {heads} query heads; for other {what}s in other layers, register a function of the attention module"
        )
    return value
