"""Alpha maps: from a free parameter beta > 0 to alpha, for a learned alpha."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["AlphaMap", "ExpMap", "HillMap", "TanhMap"]

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)

# Every h(u) has reached 1 here, even in float64. A larger u could overflow, and its derivative would be 0 * inf.
_MAX_U = 1e30


@dataclass(frozen=True)
class AlphaMap:
    """alpha = 1 - c * h(beta / beta0), where h rises from 0 at 0 to 1 at infinity: a larger beta gives a smaller alpha.

    Args:
        c: Width of the range, 0 < c <= 1: alpha lies in (1 - c, 1).
        beta0: Scale of beta, > 0.
    Raises:
        TypeError: c or beta0 is not a number.
        ValueError: c or beta0 is out of range.
    """

    c: float
    beta0: float = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for argument in ("c", "beta0"):
            _check_number(name, argument, getattr(self, argument))
        if not 0 < self.c <= 1:
            raise ValueError(f"{name}: c must satisfy 0 < c <= 1, got {self.c}")
        if not 0 < self.beta0 < math.inf:
            raise ValueError(f"{name}: beta0 must be positive and finite, got {self.beta0}")

    def __call__(self, beta: FloatOrTensor) -> FloatOrTensor:
        """alpha for beta >= 0, a float or a tensor."""
        return 1 - self.one_minus_alpha(beta)

    def one_minus_alpha(self, beta: FloatOrTensor) -> FloatOrTensor:
        """e = 1 - alpha = c * h(beta / beta0), with full relative accuracy for alpha near 1."""
        if not isinstance(beta, Tensor):
            _check_number(type(self).__name__, "beta", beta)
            if not beta >= 0:
                raise ValueError(f"{type(self).__name__}: beta must not be negative, got {beta}")
            return float(self.one_minus_alpha(torch.tensor(beta, dtype=torch.float64, device="cpu")))
        return self.c * self._h((beta / self.beta0).clamp(max=_MAX_U))

    def one_minus_alpha_of_log(self, log_beta: Tensor) -> Tensor:
        """e = 1 - alpha as a function of ln beta: finite, with finite gradients, for every ln beta."""
        return self.c * self._h((log_beta - math.log(self.beta0)).clamp(max=math.log(_MAX_U)).exp())

    def inverse(self, alpha: FloatOrTensor) -> FloatOrTensor:
        """The beta for which the map returns `alpha`, a float or a tensor.

        Raises:
            TypeError: alpha is neither a number nor a tensor.
            ValueError: alpha lies outside (1 - c, 1). A tensor on the device "meta" has no values to check.
        """
        if not isinstance(alpha, Tensor):
            _check_number(type(self).__name__, "alpha", alpha)
            return float(self.inverse(torch.tensor(alpha, dtype=torch.float64, device="cpu")))
        e = 1 - alpha
        if not e.is_meta and not bool(((e > 0) & (e < self.c)).all()):
            got = f"{alpha.item():g}" if alpha.numel() == 1 else f"values from {alpha.min():g} to {alpha.max():g}"
            raise ValueError(
                f"{type(self).__name__}: alpha must lie in ({1 - self.c:g}, 1), the range of c = {self.c:g}, got {got}"
            )
        return self.beta0 * self._h_inverse(e / self.c)

    def _h(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _h_inverse(self, share: Tensor) -> Tensor:
        raise NotImplementedError


def _check_number(name: str, argument: str, number: object) -> None:
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        raise TypeError(f"{name}: {argument} must be a number, got {number!r} of type {type(number).__name__}")


class HillMap(AlphaMap):
    """alpha = 1 - c u / (1 + u), u = beta / beta0.

    Example:
        >>> HillMap(c=0.3)(1.0)
        0.85
    """

    def _h(self, u: Tensor) -> Tensor:
        return u / (1 + u)

    def _h_inverse(self, share: Tensor) -> Tensor:
        return share / (1 - share)


class TanhMap(AlphaMap):
    """alpha = 1 - c tanh(u), u = beta / beta0.

    Example:
        >>> round(TanhMap(c=1.0)(0.5), 4)
        0.5379
    """

    def _h(self, u: Tensor) -> Tensor:
        return u.tanh()

    def _h_inverse(self, share: Tensor) -> Tensor:
        return share.atanh()


class ExpMap(AlphaMap):
    """alpha = 1 - c (1 - exp(-u)), u = beta / beta0.

    Example:
        >>> round(ExpMap(c=1.0)(0.5), 4)
        0.6065
    """

    def _h(self, u: Tensor) -> Tensor:
        return -torch.expm1(-u)

    def _h_inverse(self, share: Tensor) -> Tensor:
        return -torch.log1p(-share)
