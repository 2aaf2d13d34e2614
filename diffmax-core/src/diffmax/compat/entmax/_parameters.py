"""Checks of the arguments of entmax's functions: alpha, budgets, the size of a partial sort."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffmax.operators.common.checks import _readable, check_alpha_tensor
from diffmax.operators.common.numerics import accumulation_dtype


def order_minus_one(name: str, X: Tensor, alpha: float | Tensor, dim: int) -> tuple[float, Tensor | None]:
    """Check entmax's alpha and turn it into e = alpha - 1, a float or a tensor: diffmax's 1 - alpha.

    Raises:
        TypeError: alpha is neither a number nor a tensor.
        ValueError: alpha is not positive, or its shape does not fit. A tensor on an accelerator is not read.
    """
    alpha = number_or_rows(name, "alpha", X, alpha, dim)
    check_values(name, alpha, lambda t: (t > 0) & (t < math.inf), "alpha must be positive", "1 is softmax, 2 is sparsemax")
    if isinstance(alpha, Tensor):
        return 0.0, (alpha - 1).to(accumulation_dtype(X.dtype))
    return alpha - 1, None


def number_or_rows(name: str, what: str, X: Tensor, given: float | Tensor, dim: int) -> float | Tensor:
    """`given` as a float, or as a tensor on X's device that broadcasts against X's rows, in the accumulation dtype or wider."""
    if isinstance(given, Tensor):
        check_alpha_tensor(name, X, given, dim, what)
        return given.to(device=X.device, dtype=torch.promote_types(given.dtype, accumulation_dtype(X.dtype)))
    if not isinstance(given, numbers.Real) or isinstance(given, bool):
        raise TypeError(f"{name}: {what} must be a number or a tensor, got {given!r} of type {type(given).__name__}")
    return float(given)


def check_values(name: str, given: float | Tensor, allowed: Callable[[Any], Any], rule: str, action: str) -> None:
    """Raise ValueError unless every entry is allowed; a tensor that cannot be read without waiting is not checked."""
    wrong = wrong_value(given, allowed)
    if wrong is not None:
        raise ValueError(f"{name}: {rule}, got {wrong:g}\n{action}")


def wrong_value(given: float | Tensor, allowed: Callable[[Any], Any]) -> float | None:
    """The first entry that is not allowed; None if there is none, or a tensor cannot be read without waiting."""
    if not isinstance(given, Tensor):
        return None if allowed(given) else given
    if not _readable(given) or bool(allowed(given).all()):
        return None
    return given[~allowed(given)].flatten()[0].item()


def check_k(name: str, k: int | None) -> None:
    """Check entmax's size of a partial sort, which has no effect, because nothing is sorted."""
    if k is not None and (not isinstance(k, int) or isinstance(k, bool)):
        raise TypeError(f"{name}: k must be an int or None, got {k!r} of type {type(k).__name__}")
    if k is not None and k < 1:
        raise ValueError(f"{name}: k must be at least 1, got {k}")
