"""The matched scale: the factor of the scores with which a model that was trained with softmax loses least under diffmax."""

from __future__ import annotations

import math
import numbers
from typing import Any, overload

import torch
from torch import Tensor

from diffmax.operators.common.checks import _readable, check_alpha, one_minus_alpha

__all__ = ["matched_scale"]


@overload
def matched_scale(alpha: float, weight: float = 1 / 16) -> float: ...


@overload
def matched_scale(alpha: Tensor, weight: float = 1 / 16) -> Tensor: ...


@overload
def matched_scale(alpha: float | Tensor, weight: float = 1 / 16) -> float | Tensor: ...


def matched_scale(alpha: float | Tensor, weight: float = 1 / 16) -> float | Tensor:
    """The factor of a softmax model's scores with which diffmax has softmax's slope at one weight.

    s = weight^(1 - alpha)   (Eq. 35)

    A row of 1 / weight equal scores then has the weights and the derivatives of softmax. Without the factor, weights below 1
    change faster with their scores than those of softmax, and a model that was trained with softmax is far too sharp.

    Args:
        alpha: Shape parameter, 0 < alpha < 1. A float, or a tensor of any shape, which may hold 0 and 1 themselves.
        weight: Where the slopes agree, 0 < weight <= 1. A smaller weight gives a smaller scale, and fewer zeros. 1/16 is near
            the best for language models; for short rows, of tens of keys, 1/4 may be better (docs/choosing.md).
    Returns:
        The scale, in (0, 1]: a float, or a tensor of alpha's shape with a gradient, in float32 or float64. 1 at alpha = 1.
    Raises:
        TypeError: An argument has the wrong type, or alpha is a tensor of integers.
        ValueError: An argument is out of range. The values of an alpha that lives on an accelerator are not read.
    Source: docs/theory.md, section 18. Written for diffmax.
    Example:
        >>> matched_scale(0.75)
        0.5
        >>> matched_scale(torch.tensor([0.5, 0.75, 1.0]))
        tensor([0.2500, 0.5000, 1.0000])
    """
    if not isinstance(weight, numbers.Real) or isinstance(weight, bool):
        raise TypeError(f"matched_scale: weight must be a number, got {weight!r} of type {type(weight).__name__}")
    if not 0 < weight <= 1:
        raise ValueError(f"matched_scale: weight must satisfy 0 < weight <= 1, got {weight}")
    if isinstance(alpha, Tensor):
        check_alpha("matched_scale", alpha)
        return torch.exp(math.log(weight) * (1 - alpha.to(torch.promote_types(alpha.dtype, torch.float32))))
    return float(weight) ** one_minus_alpha("matched_scale", torch.empty(1, device="cpu"), alpha, 0)[0]


def check_scale(name: str, scale: Any, or_else: str = "") -> None:
    """Check a factor of the scores: "match", a positive number, or, where `or_else` names them, a tensor or a function."""
    if isinstance(scale, str) and scale == "match":
        return
    if or_else and isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(f"{name}: scale must be of a floating dtype, got {scale.dtype}")
        if _readable(scale) and not ((scale > 0) & (scale < math.inf)).all():
            raise ValueError(f"{name}: scale must be positive and finite, got {scale.tolist()}")
        return
    if or_else and callable(scale):
        return
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise TypeError(f'{name}: scale must be "match" or a positive number{or_else}, got {scale!r}')
    if not 0 < float(scale) < math.inf:
        raise ValueError(f"{name}: scale must be positive and finite, got {scale}")


def rescaled(
    factor: float | Tensor, query: Tensor, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, float | None, Tensor | None]:
    """Query (..., H, L, D), scale and mask of an attention call for `factor` times its scores: one factor, or (H,)."""
    if mask is not None and mask.dtype != torch.bool:
        mask = _times(mask, factor)
    if isinstance(factor, Tensor):
        return _times(query, factor), scale, mask
    if factor != 1:
        scale = factor * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return query, scale, mask


def _times(t: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return (t * factor.to(t.device).view(-1, 1, 1)).to(t.dtype)  # rounded once
    return t if factor == 1 else t * factor
