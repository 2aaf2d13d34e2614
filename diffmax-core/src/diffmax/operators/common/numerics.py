"""Constants and formulas shared by all plain-PyTorch kernels (docs/theory.md, Eq. 2 to 6)."""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# For e = 1 - alpha below this, weights differ from softmax by less than float64 resolves at 1 (the relative difference is
# about e * l**2 / 2, where l = ln p). So the limit alpha -> 1 needs no branch: kernels raise e to this value.
MIN_E = 2.0**-60


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for narrower dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def newton_steps(n_iter: int, n: int, e: float, dtype: torch.dtype) -> int:
    """The number of Newton steps that are at least as accurate as `n_iter` bisection steps.

    The error after j Newton steps is at most (n^e - 1) n^e 4^-j, after j bisection steps (n^e - 1) n^-e 2^-j  (docs/theory.md,
    Eq. 9 and 10). `n_iter` is capped, because steps beyond the digits of `dtype` change nothing.
    """
    digits = 54 if dtype == torch.float64 else 26
    return math.ceil(min(n_iter, digits) / 2 + e * math.log2(max(n, 1)))


# Values of k = 1/e whose powers are computed by multiplications: alpha = 1/2, 2/3, 3/4, 4/5 and 9/10.
INTEGER_EXPONENTS = (2, 3, 4, 5, 10)


# Largest relative distance of e from 1/k: in float32, 1/e then rounds to k; in float64, the effect of rounding alpha
_WHOLE = {torch.float32: 2.0**-24, torch.float64: 2.0**-50}


def integer_exponent(e: float, dtype: torch.dtype) -> int:
    """k = 1/e if it is one of `INTEGER_EXPONENTS` in the precision of `dtype`, in which powers are computed; else 0."""
    k = round(1 / e) if e > 0.05 else 0
    return k if k in INTEGER_EXPONENTS and abs(k * e - 1) <= _WHOLE[dtype] else 0


def clamp_e(e: float | Tensor) -> float | Tensor:
    """e raised to MIN_E: the softmax limit. NaN stays NaN."""
    return e.clamp_min(MIN_E) if isinstance(e, Tensor) else max(e, MIN_E)


# Taylor coefficients of (exp(v) - 1 - v) / v^2: 1/2, 1/6, 1/24, ...; the remainder is below rounding for v < 1.
_PHI_SERIES = {torch.float32: tuple(1 / math.factorial(j + 2) for j in range(11))}
_PHI_SERIES[torch.float64] = tuple(1 / math.factorial(j + 2) for j in range(18))


def alpha_weight(p: Tensor, log_p: Tensor, e: float | Tensor) -> Tensor:
    """w = p * phi(ln p) of Eq. 6, with phi(l) = (exp(-e*l) - 1 + e*l) / e^2; log_p is 0 where p is 0.

    With v = -e*l, phi is (exp(v) - 1 - v) / e^2. For small v it is a series, so no digit is lost as alpha -> 1. It is computed
    from v instead of p^alpha, whose rounding error is alpha / e times larger. v = -ln [z - t] is at most 37 for any p.
    """
    v = -e * log_p
    small = v < 1
    v_small = torch.where(small, v, 0.0)
    highest, *lower = reversed(_PHI_SERIES[p.dtype])
    series = torch.full_like(v, highest)
    for coefficient in lower:
        series = series * v_small + coefficient
    far_e = torch.where(small, torch.ones_like(v), e)  # if the series is used, e^2 may be too small to divide by
    return p * torch.where(small, log_p.square() * series, (v.expm1() - v) / far_e**2)


def hides(added: Tensor) -> Tensor:
    """Where scores, or what is added to them, hide a key: -inf, or what others have in its place, the least number of a dtype.

    That of bfloat16 is not quite that of float32, and a score may have been added to it: half of it counts.
    """
    return added <= torch.finfo(added.dtype).min / 2
