"""Hugging Face transformers: `register()`, then `attn_implementation="diffmax"` works in every model that lets one choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from importlib_metadata import PackageNotFoundError, version
from packaging.version import Version
from torch import Tensor, nn

from diffmax._checks import one_minus_alpha
from diffmax.functional import diffmax_bisect

ModelAlpha: TypeAlias = "float | Tensor | Callable[[nn.Module], float | Tensor]"

# transformers looks for these in the name of an attention implementation and changes course when it finds one.
_RESERVED = ("eager", "flash", "flex", "paged", "sdpa", "/", "|")

# What models hand to every attention function and what says nothing about the weights.
_BOOKKEEPING = {
    "cache_position",
    "deterministic",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}

_UNPACK = (
    "leave it out and pass position_ids that restart at 0, no attention_mask and use_cache=False: transformers then separates "
    "the sequences with a mask"
)
_WHAT_TO_DO = {
    "cache": "continuous batching keeps its own paged cache: call model.generate instead",
    "cu_seq_lens_k": _UNPACK,
    "cu_seq_lens_q": _UNPACK,
}


def register(name: str = "diffmax", alpha: ModelAlpha = 0.9) -> None:
    """Make diffmax an attention implementation of Hugging Face transformers, under `name`.

    Afterwards `AutoModel.from_pretrained(..., attn_implementation=name)` and `model.set_attn_implementation(name)` know it.
    Both the attention function and its mask function are registered: with the first alone, models would receive no mask.

    Args:
        name: The key. Two keys with different alphas live side by side. Registering a key again replaces it, also in the models
            that use it already.
        alpha: Shape parameter in (0, 1), as in `diffmax_bisect`. A float; a tensor of shape () or (H,), one per query head,
            which may require a gradient; or a function that takes the attention module and returns either: called in every
            forward pass, it gives each layer its own (`lambda module: alphas[module.layer_idx]`).
    Raises:
        ImportError: transformers is missing or too old.
        TypeError: alpha is of another type.
        ValueError: alpha lies outside (0, 1), or transformers would read another meaning into `name`.

    In a model: boolean and additive masks, causal and bidirectional attention, grouped query heads, KV caches and sliding
    windows (which arrive as a mask) are supported. Dropout acts on the weights. The weights are returned too, so that
    `output_attentions=True` works. A token that sees nothing gets zeros. What would change the weights and is not
    implemented (softcap, s_aux, position_bias, cu_seq_lens_q, any argument of unknown meaning) raises a ValueError. Scores
    (B, H, L, S) are held in memory.

    Example:
        >>> register("diffmax-sparser", alpha=0.5)
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        >>> model = LlamaModel(config)
        >>> model.set_attn_implementation("diffmax-sparser")
        >>> model(torch.tensor([[1, 2, 3, 4]])).last_hidden_state.shape
        torch.Size([1, 4, 8])
    """
    if any(word in name for word in _RESERVED):
        raise ValueError(
            f"register: name must not contain {', '.join(_RESERVED)}, got {name!r}\n"
            'transformers gives these a meaning of their own: take another name, such as "diffmax"'
        )
    if not callable(alpha) and not isinstance(alpha, Tensor):
        one_minus_alpha("register", torch.empty(1), alpha, 0)
    attention_interface, mask_interface, mask_function = _import_transformers()
    attention_interface.register(name, partial(_attention_forward, alpha=alpha))
    mask_interface.register(name, mask_function)


def _import_transformers() -> tuple[Any, Any, Any]:
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    # 4.57 takes the registration too, and then keeps softmax in BERT and its kin with no more than a log line
    if found == "none" or Version(found) < Version("5.0.0"):
        raise ImportError(
            f'register: transformers 5.0 or newer is needed, got {found}\npip install "diffmax-core[transformers]"'
        )
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    return AttentionInterface, AttentionMaskInterface, sdpa_mask


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
    *,
    alpha: ModelAlpha,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """What transformers calls: query (B, H, L, D), key and value (B, H_kv, S, D) to output (B, L, H, D) and weights."""
    _refuse_what_changes_the_weights(kwargs)
    length = query.shape[2]
    # as transformers' own SDPA function reads them: a single new token sees the whole cache, and a mask says it all
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = is_causal and attention_mask is None and length > 1
    if is_causal:
        # the rest is the empty part of a static cache, which no query sees: save the work
        key, value = key[:, :, :length], value[:, :, :length]
    if sliding_window is not None and attention_mask is None and key.shape[2] > sliding_window:
        raise ValueError(
            f"diffmax attention: a sliding window that hides keys must arrive as a mask, got sliding_window {sliding_window}, "
            f"{key.shape[2]} keys and no mask\nregister both functions, with diffmax.integrations.transformers.register"
        )
    output, weights = _attend(
        query,
        key,
        value,
        attention_mask,
        dropout_p=dropout if module.training else 0.0,
        is_causal=is_causal,
        scale=scaling,
        alpha=alpha(module) if callable(alpha) else alpha,
    )
    return output.transpose(1, 2).contiguous(), weights


def _refuse_what_changes_the_weights(kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is not None and name not in _BOOKKEEPING:
            got = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
            action = _WHAT_TO_DO.get(name, 'load this model with attn_implementation="eager"')
            raise ValueError(f"diffmax attention: {name} is not implemented, got {got}\n{action}")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    alpha: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Unfused attention with the arguments of `torch.nn.functional.scaled_dot_product_attention`; output and weights.

    The query heads of a group are laid below one another: one product per key head serves them, and no key is repeated.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped_query = query.reshape(batch, kv_heads, -1, head_dim)
    scores = grouped_query @ key.transpose(2, 3) * (1 / math.sqrt(head_dim) if scale is None else scale)
    scores = _mask(scores.view(-1, heads, length, key.shape[2]), attn_mask, is_causal)
    weights = diffmax_bisect(scores, _per_head(alpha, heads)).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout_p)
    output = weights.view(-1, kv_heads, grouped_query.shape[2], key.shape[2]) @ value
    return output.view(-1, heads, length, value.shape[3]), weights


def _mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """The scores, with -inf where nothing is to be seen."""
    if attn_mask is None:
        if not is_causal:
            return scores
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    elif attn_mask.dtype == torch.bool:
        visible = attn_mask
    elif attn_mask.is_floating_point():
        # transformers writes "hidden" as the most negative number: added to a whole row, it would not hide anything
        visible = attn_mask > torch.finfo(attn_mask.dtype).min
        scores = scores + attn_mask
    else:
        raise ValueError(
            f"diffmax attention: a mask must be boolean or floating, got {attn_mask.dtype}\n"
            "convert it first: True marks what is visible, and a floating mask is added to the scores"
        )
    return scores.masked_fill(~visible, -torch.inf)


def _per_head(alpha: float | Tensor, heads: int) -> float | Tensor:
    if not isinstance(alpha, Tensor):
        return alpha
    if alpha.shape not in ((), (heads,)):
        raise ValueError(
            f"diffmax attention: a tensor alpha must have shape () or ({heads},), got {tuple(alpha.shape)}\n"
            f"the layer has {heads} query heads; for other alphas in other layers, register a function of the attention module"
        )
    return alpha.reshape(-1, 1, 1)
