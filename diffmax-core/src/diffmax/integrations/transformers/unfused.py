"""Unfused attention that returns its weights, for `output_attentions=True`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmax.operators.attention import scores as rules
from diffmax.operators.rows.api import diffmax_bisect
from diffmax.plugin import AttentionCall
from diffmax.reference.attention import Whole


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
    """`diffmax.attention` unfused, and the weights (B, H, L, S). Dropout drops other weights than the fused kernels.

    Query heads that share a key head are stacked along the queries: one product per key head, and no key is repeated.
    """
    keys, e = key.shape[2], 1 - alpha
    call = _call(mask, is_causal, window_size, 1 / math.sqrt(query.shape[3]) if scale is None else scale, e, softcap, sink)
    grouped = query.reshape(*key.shape[:2], -1, query.shape[3])
    scores = (grouped @ key.transpose(2, 3) * call.scale).view(*query.shape[:3], keys)
    scores = rules.apply(scores, call, Whole.of(query, key, call))
    weights = diffmax_bisect(scores, alpha.reshape(-1, 1, 1) if isinstance(alpha, Tensor) else alpha)[..., :keys]
    weights = nn.functional.dropout(weights.to(value.dtype), dropout_p)
    output = weights.reshape(*key.shape[:2], grouped.shape[2], keys) @ value
    return output.view(*query.shape[:3], value.shape[3]), weights


def masked(scores: Tensor, mask: Tensor | None, is_causal: bool, window_size: tuple[int, int] | None = None) -> Tensor:
    """The scores (B, H, L, S) plus the floating mask, with -inf at masked entries."""
    call = _call(mask, is_causal, window_size, 1.0, 1.0)
    return rules.apply(scores, call, Whole(scores.shape[-2], scores.shape[-1], call, scores.device))


def _call(
    mask: Tensor | None,
    is_causal: bool,
    window_size: tuple[int, int] | None,
    scale: float,
    e: float | Tensor,
    softcap: float = 0.0,
    sink: Tensor | None = None,
) -> AttentionCall:
    """The options of the scores. A window applies only to causal calls, as in transformers' masks."""
    boolean = mask is not None and mask.dtype == torch.bool
    return AttentionCall(
        scale=scale,
        e=e,
        mask=mask if boolean else None,
        bias=None if boolean else mask,
        left=window_size[0] if is_causal and window_size is not None else -1,
        right=0 if is_causal else -1,
        softcap=softcap,
        sink=sink,
    )
