"""Newton's method on rows, from torch's operators only: a fixed number of steps, without synchronization.

The device runs few operators on large tensors. The operators of a step use two buffers of the scores' size. Equations:
docs/theory.md; the number of steps: docs/decisions/0060.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffmax.kernels.tools import clamp_e, integer_exponent

# Bisection steps that float32 can resolve
DIGITS = 26

# A base up to this has weight 0; it only avoids a division by 0.
_TINY = 2.0**-60


class Solution(NamedTuple):
    """Rows and their solution.

    Attributes:
        p: The weights, like the scores.
        slopes: p^alpha times a constant per row: the weights of the values in Eq. 5.
        z: e * (score - m).
        m, delta: (..., 1), with tau = m - (1 - delta) / e. delta is NaN in a row that holds NaN or +inf, or whose e is out of
            range; so is p.
    """

    p: Tensor
    slopes: Tensor
    z: Tensor
    m: Tensor
    delta: Tensor


@lru_cache
def newton_steps(n_iter: int, n: int, e: float) -> int:
    """The number of Newton steps that are at least as accurate as `n_iter` bisection steps.

    The least J with (1 - n^(-e/J))^J <= n^-e 2^-n_iter, by the bound of decision 0060: the slope of Eq. 8 falls from at most
    n^e to at least 1, and a step that reduces it little reduces the error much. Eq. 9 alone requires up to four times as many.
    """
    log_n = e * math.log(max(n, 1))
    allowed = -log_n - min(n_iter, DIGITS) * math.log(2)
    steps = 1
    while log_n > 0 and steps * math.log(-math.expm1(-log_n / steps)) > allowed:
        steps += 1
    return steps


def solve(scores: Tensor, e: float | Tensor, n_iter: int, ensure_sum_one: bool, given_up: bool) -> Solution:
    """Weights along the last dimension, in float32.

    Args:
        scores: (..., n), n > 0, float32. With `given_up` its memory is overwritten.
        e: A float in (0, 1], or a tensor (..., 1) in float32 that broadcasts against the rows.
        n_iter, ensure_sum_one: As for `diffmax.reference.bisect`.
        given_up: Whether the caller no longer needs the scores.
    """
    row_e, k = clamp_e(e), 0 if isinstance(e, Tensor) else integer_exponent(e, torch.float32)
    m = scores.amax(-1, keepdim=True)
    # a fully masked row has m = -inf: subtract 0 there, so that every z is -inf and not NaN
    shift = m.masked_fill(m == -torch.inf, 0.0)
    z = torch.sub(scores, shift, out=scores if given_up else None).mul_(row_e)
    # maximum and clamp may drop NaN, depending on the hardware; a sum keeps it
    bad = z.sum(-1, keepdim=True).isnan()
    if isinstance(e, Tensor):
        bad = bad | ~((e >= 0) & (e <= 1))

    delta, minus_e = torch.zeros_like(m), -row_e
    a, b = torch.empty_like(z), torch.empty_like(z)
    for _ in range(newton_steps(n_iter, z.shape[-1], 1.0 if isinstance(e, Tensor) else e)):
        p, slopes = powers(z, delta, row_e, k, a, b)
        # At a lower bound of the root both sums are at least 1. In a solved row, and in a masked one, the first is not: raising
        # it to 1 makes the step 0. So solved rows need no check.
        total, slope = p.sum(-1, keepdim=True).clamp_min_(1.0), slopes.sum(-1, keepdim=True).clamp_min_(1.0)
        # S - S^alpha = -S expm1(-e ln S): the difference of two numbers near 1, without cancellation
        delta = delta - total.log().mul_(minus_e).expm1_().mul_(total).div_(slope)

    p, slopes = powers(z, delta, row_e, k, a, b)
    total = p.sum(-1, keepdim=True) if ensure_sum_one else torch.ones_like(m)
    total = total.masked_fill(total == 0, 1.0).masked_fill(bad, torch.nan)
    return Solution(p.div_(total), slopes, z, m, delta.masked_fill(bad, torch.nan))


def powers(z: Tensor, delta: Tensor, e: float | Tensor, k: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """[z - t]^(1/e) and [z - t]^(1/e - 1) with t = delta - 1, in the two buffers; k is 1/e if that is one of a few integers."""
    if k:
        return _integer_powers(z, delta, k, a, b)
    torch.sub(z, delta, out=a).clamp_min_(-1.0)
    torch.add(a, 1.0, out=b).clamp_min_(_TINY)
    a.log1p_()
    a = (a.div_(e) if isinstance(e, Tensor) else a.mul_(1 / e)).exp_()
    return a, torch.div(a, b, out=b)


def _integer_powers(z: Tensor, delta: Tensor, k: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    torch.sub(z, delta - 1, out=a).clamp_min_(0.0)
    torch.mul(a, a, out=b)
    if k == 2:
        return b, a
    if k == 10:
        b.mul_(b)
    if k >= 5:
        b.mul_(b)
    if k in (4, 10):
        b.mul_(a)
    return a.mul_(b), b


def logarithms(z: Tensor, delta: Tensor, e: float | Tensor) -> Tensor:
    """ln p, 0 off the support, for Eq. 6."""
    base = z - delta
    return torch.log1p(base.masked_fill_(base <= -1, 0.0)) / e
