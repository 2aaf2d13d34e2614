"""Masks for attention that keeps a state: causal with padding, and nothing else. All others are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffmax.integrations.transformers import refusals
from diffmax.integrations.transformers.attention import _BOOKKEEPING, _wants_weights
from diffmax.integrations.transformers.masks import is_traced

_KINDS = {
    "sliding_window": "a sliding window: the state cannot forget a single token",
    "chunked": "chunked attention: the state cannot forget single tokens",
    "bidirectional": "attention in both directions: the state has what came before, and nothing of what follows",
    "packed": "packed sequences: pass them as rows with padding; a compiled model cannot tell: give it an attention_mask",
    "and_mask": "a mask of its own, or packed sequences: the state has all tokens before",
    "or_mask": "a mask of its own: the state has no tokens that follow",
}
_REASONS = {
    "softcap": "a capped product is no power of a query and a key that a state could add up",
    "s_aux": "a sink is a score without a key, and has no part in a state",
    "sliding_window": "the state cannot forget a single token",
    "position_bias": "a number added to the score of one pair of tokens cannot be added up in a state",
    "output_attentions": "the weights of tokens in the state are not known one by one",
    "dropout": "weights in a state cannot be dropped one by one: set attention_dropout=0 in the configuration",
    "cu_seq_lens_q": "packed sequences: pass them as rows with padding",
    "cu_seq_lens_k": "packed sequences: pass them as rows with padding",
    "cache": "continuous batching keeps its own paged cache: call model.generate instead",
}


def padding_mask_of(
    label: str,
    *,
    kv_length: int,
    kv_offset: int = 0,
    q_length: int | None = None,
    q_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """The registered mask function: boolean (B, 1, 1, S), True where a key is a token, or None where all are.

    Raises:
        ValueError: The mask is not causal, or the keys have places that are not written yet.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not None and mask_function is not causal_mask_function:
        name = getattr(mask_function, "__qualname__", "") + " " + " ".join(_names_inside(mask_function))
        kind = next((said for part, said in _KINDS.items() if part in name), "a mask of its own")
        raise ValueError(f'{label}: masks must be causal, with or without padding, got {kind}\nload this model with "sdpa"')
    position = others.get("cache_position")
    if q_length is None and position is not None:  # its name before transformers 5.3
        q_length = len(position)
        q_offset = kv_offset + kv_length - q_length if is_traced() else int(position[0])
    if isinstance(q_offset, Tensor) or (q_length is not None and q_offset + q_length != kv_offset + kv_length):
        raise ValueError(
            f"{label}: the last key must be the last token, got a cache with places that are not written yet\n"
            'leave out cache_implementation="static": the cache of a state has a constant size'
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if not is_traced() and bool(padding.all()):
        return None
    return padding[:, None, None, :]


def _names_inside(function: Any) -> list[str]:
    """Names of the functions that a mask function combines."""
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        for part in cell.cell_contents if isinstance(cell.cell_contents, (tuple, list)) else (cell.cell_contents,):
            if callable(part):
                found += [getattr(part, "__qualname__", ""), *_names_inside(part)]
    return found


def check_call(
    label: str, module: nn.Module, query: Tensor, key: Tensor, mask: Any, dropout: float, is_causal: bool | None, kwargs: Any
) -> Tensor | None:
    """Refuse what a state cannot do; the keys that are tokens, boolean (B, S), or None where all are.

    Raises:
        ValueError: The call is not causal, or has an argument that changes the weights.
    """
    refusals.refuse_heads(label, module)
    if module.training and dropout > 0:
        kwargs = {**kwargs, "dropout": dropout}
    if _wants_weights(module, kwargs):
        kwargs = {**kwargs, "output_attentions": True}
    for name, given in kwargs.items():
        unset = given is None or (name == "softcap" and not given) or (name == "output_attentions" and not given)
        if unset or (name in _BOOKKEEPING and name not in _REASONS):
            continue
        got = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        reason = _REASONS.get(name, "it is unknown, and could change the weights")
        raise ValueError(f"{label}: {name} is not possible, got {got}\n{reason}")
    length, many = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is False or (causal is None and length > 1):
        said = "is_causal=False" if causal is False else "no is_causal"
        raise ValueError(
            f"{label}: {type(module).__name__} must be causal, got {said}\nthe state has what came before a token, in one "
            'sequence of tokens: load this part of the model with "sdpa"'
        )
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[3] != many or mask.shape[2] not in (1, length):
        raise ValueError(f"{label}: a mask must be (B, 1, L, S) for {length} queries and {many} keys, got {mask!r:.60}")
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    tokens = seen[:, 0, -1].expand(query.shape[0], many)
    if not is_traced():
        _check_mask(label, mask, seen, tokens, length)
    elif mask.shape[1] != 1:
        raise ValueError(f"{label}: a mask must be one for all heads, (B, 1, L, S), got shape {tuple(mask.shape)}")
    return tokens


def _check_mask(label: str, mask: Tensor, seen: Tensor, tokens: Tensor, length: int) -> None:
    """Refuse what is more than causal with padding: numbers other than 0, heads that differ, tokens that some do not see."""
    many = mask.shape[3]
    wrong = "one of its own"
    if mask.dtype != torch.bool and bool((seen & (mask != 0)).any()):
        numbers = mask[seen & (mask != 0)]
        wrong = f"numbers such as {numbers[0].item():g} (a key is hidden by torch.finfo({mask.dtype}).min alone)"
    elif bool((seen != seen[:, :1]).any()):
        wrong = "one that differs between heads"
    elif mask.shape[2] == 1:
        return
    else:
        place = torch.arange(many, device=seen.device)
        own = place == place[many - length :].unsqueeze(1)
        causal_mask = tokens[:, None, None, :] & (place <= place[many - length :].unsqueeze(1))
        count = seen.sum(3, keepdim=True)
        # a row of padding sees nothing, or everything or itself so that its softmax is a number
        is_padding = ~tokens[:, None, many - length :, None] & (
            (count == 0) | (count == many) | ((count == 1) & (seen & own).any(3, keepdim=True))
        )
        if not bool(((seen != causal_mask) & ~is_padding).any()):
            return
    raise ValueError(
        f"{label}: masks must be causal, with or without padding, got {wrong} of shape {tuple(mask.shape)}\n"
        "the state has all tokens before"
    )
