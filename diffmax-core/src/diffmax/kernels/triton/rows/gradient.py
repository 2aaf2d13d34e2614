"""Shared by the backward kernels: from a tile of weights or scores to s = p^alpha (Eq. 3)."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import exp2_of, log2_1p, log2_by_hardware, log2_of


@triton.jit
def slopes(p, x, m, delta, e, FROM_X: tl.constexpr, SHORT: tl.constexpr, PTX: tl.constexpr):
    """Weights, s = p^alpha, and log2 p; all three are 0 off the support, and NaN where p is NaN.

    FROM_X: recompute the weights from the scores, because p has lost small ones (float16).
    SHORT: p has 16 bits, for which the hardware's logarithm is accurate enough.
    """
    if FROM_X:
        spoilt = p != p
        u = e[:, None] * (x - tl.where(m == -float("inf"), 0.0, m)[:, None]) - delta[:, None]
        live = u > -1.0
        log_p = tl.where(live, log2_1p(u, False, PTX), 0.0) / e[:, None]
        weight = tl.where(spoilt, p, tl.where(live, exp2_of(log_p, PTX), 0.0))
        live = live | spoilt
        log_p = tl.where(spoilt, p, log_p)
    else:
        weight = p
        live = p != 0.0
        if SHORT:
            rough = tl.maximum(log2_by_hardware(p, PTX), -127.0, propagate_nan=tl.PropagateNan.ALL)  # -inf for subnormal p
        else:
            rough = log2_of(p)
        log_p = tl.where(live, rough, 0.0)
    return weight, tl.where(live, exp2_of((1.0 - e)[:, None] * log_p, PTX), 0.0), log_p
