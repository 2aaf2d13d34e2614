"""The argument checks of `diffmax.threshold_attention` and its relatives, which run before any backend is chosen."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from diffmax.operators.attention.checks import (
    _check_floating,
    check_alpha,
    check_heads,
    check_longest,
    check_mask,
    check_packing,
    check_scale,
    check_tensors,
    check_window,
)
from diffmax.operators.common.checks import _shape, broadcasts, to_float
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import ThresholdCall

WEIGHTS = ("scores", "softmax", "diffmax")


def build_call(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    weights: str,
    alpha: float | Tensor | None,
    power: float,
    bias: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window_size: tuple[int, int] | None,
    attn_mask: Tensor | None,
) -> ThresholdCall:
    """The call that the arguments mean; query, key and value are (B, H, L, D)."""
    check_tensors(name, query, key, value, "BHLD")
    check_heads(name, query.shape[1], key.shape[1], True)
    if weights not in WEIGHTS:
        raise ValueError(f"{name}: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    check_alpha_of(name, weights, alpha)
    e, e_tensor = check_alpha(name, query, 0.9 if alpha is None else alpha, query.shape[1])
    left, right = check_window(name, window_size, is_causal)
    mask = None if attn_mask is None else check_seen(name, query, key, attn_mask)
    return ThresholdCall(
        scale=check_scale(name, query, scale),
        theta=check_threshold(name, query, threshold),
        weights=weights,
        power=check_power(name, power),
        e=0.0 if weights != "diffmax" else e if e_tensor is None else e_tensor,
        bias=check_bias(name, query, bias),
        mask=mask,
        left=left,
        right=right,
    )


def check_alpha_of(name: str, weights: str, alpha: Any) -> None:
    """Refuse an alpha that nothing would use."""
    if alpha is not None and weights != "diffmax":
        got = f"a tensor of shape {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else repr(alpha)
        raise ValueError(f'{name}: weights must be "diffmax" with an alpha, got {weights!r} and {got}')


def check_seen(name: str, query: Tensor, key: Tensor, mask: Any) -> Tensor:
    """A boolean mask, with four dimensions."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name}: attn_mask must be a boolean tensor, True where a key is seen, got {got}\n"
            "of one that is 1 where seen and 0 elsewhere pass attn_mask.bool(), of one that is added pass attn_mask == 0; "
            "a bias that depends on the distance alone is passed as bias"
        )
    return check_mask(name, query, key, mask)


def packed(
    name: str, query: Tensor, key: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, longest: tuple[Any, Any]
) -> dict[str, Any]:
    """The fields of packed sequences; query and key are (1, H, T, D)."""
    longest_q, longest_k = (check_longest(name, what, each) for what, each in zip("qk", longest, strict=True))
    ends_q = check_packing(name, "q", cu_seqlens_q, longest_q, query.shape[2], query.device)
    ends_k = check_packing(name, "k", cu_seqlens_k, longest_k, key.shape[2], query.device)
    if ends_q.shape != ends_k.shape:
        counts = f"{ends_q.shape[0] - 1} and {ends_k.shape[0] - 1}"
        raise ValueError(f"{name}: cu_seqlens_q and cu_seqlens_k must count the same sequences, got {counts}")
    return {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}


def check_threshold(name: str, query: Tensor, threshold: Any, what: str = "threshold") -> Tensor:
    """theta as (B or 1, H, L), in the accumulation dtype."""
    acc, (batch, heads, length) = accumulation_dtype(query.dtype), query.shape[:3]
    if not isinstance(threshold, Tensor):
        if not isinstance(threshold, numbers.Real) or isinstance(threshold, bool):
            kind = type(threshold).__name__
            raise TypeError(f"{name}: {what} must be a float or a floating tensor, got {threshold!r} of type {kind}")
        return query.new_full((1, 1, 1), to_float(threshold), dtype=acc).expand(1, heads, length)
    _check_floating(name, what, threshold, query)
    given = threshold.to(acc)
    if given.ndim == 1:
        given = given.unsqueeze(1)
    if not broadcasts(given, (batch, heads, length)):
        hint = ""
        if threshold.ndim == 1 and threshold.shape[0] == length:
            hint = f"\nfor one per query, pass {what}.view(1, {length})"
        raise ValueError(
            f"{name}: {what} must be a float, or have shape (H,), (H, L) or (B, H, L) with (B, H, L) = "
            f"{(batch, heads, length)}, got {_shape(threshold)}{hint}"
        )
    given = given.view((1,) * (3 - given.ndim) + tuple(given.shape))
    return given.expand(given.shape[0], heads, length)


def check_power(name: str, power: Any, what: str = "power") -> float:
    """A positive number."""
    if isinstance(power, bool) or not isinstance(power, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: {what} must be a float, got {power!r} of type {type(power).__name__}")
    number = to_float(power)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: {what} must be positive and finite, got {power}")
    return number


def check_bias(name: str, query: Tensor, bias: Any) -> Tensor | None:
    """The bias (H, W) in the accumulation dtype."""
    if bias is None:
        return None
    _check_floating(name, "bias", bias, query)
    if bias.ndim != 2 or bias.shape[0] != query.shape[1]:
        raise ValueError(
            f"{name}: bias must have a number per head and distance, shape (H, W) with H = {query.shape[1]}, got {_shape(bias)}"
        )
    return bias.to(accumulation_dtype(query.dtype))  # type: ignore[no-any-return]
