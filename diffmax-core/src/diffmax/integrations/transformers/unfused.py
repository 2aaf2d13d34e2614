"""Attention that returns its weights, for models that are asked for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmax.operators.rows.api import diffmax_bisect


def attend_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    alpha: float | Tensor,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`diffmax.attention` from its parts, and the weights (B, H, L, S); the dropped ones differ.

    The query heads of a group are laid below one another: one product per key head serves them, and no key is repeated.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    grouped_query = query.reshape(batch, kv_heads, -1, head_dim)
    scores = grouped_query @ key.transpose(2, 3) * (1 / math.sqrt(head_dim) if scale is None else scale)
    scores = scores.view(batch, heads, length, keys)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = masked(scores, mask, is_causal, window_size)
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype).view(-1, 1, 1).expand(batch, heads, length, 1)], -1)
    weights = diffmax_bisect(scores, alpha.reshape(-1, 1, 1) if isinstance(alpha, Tensor) else alpha)[..., :keys]
    weights = nn.functional.dropout(weights.to(value.dtype), dropout_p)
    output = weights.reshape(batch, kv_heads, grouped_query.shape[2], keys) @ value
    return output.view(batch, heads, length, value.shape[3]), weights


def masked(scores: Tensor, mask: Tensor | None, is_causal: bool, window_size: tuple[int, int] | None = None) -> Tensor:
    """The scores and what is added to them, with -inf where nothing is to be seen."""
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        if window_size is not None:
            hidden = hidden | torch.ones_like(hidden).tril(-window_size[0] - 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
