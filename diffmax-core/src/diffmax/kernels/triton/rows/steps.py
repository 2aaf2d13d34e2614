"""What a program does with rows that it holds in registers, in as few instructions as that takes.

Scores are tiles (ROWS, BLOCK): y = x - max x. Values per row are vectors (ROWS,). The maximum of a row with NaN is NaN, so that
no other instruction has to keep it: `spoilt` asks for it. In float32 the values per row use the hardware's logarithm,
exponential and reciprocal: they are about as accurate as the sums they are computed from, and each step is checked by the next
evaluation. In float64 they are exact to rounding.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import (
    ABOVE_2,
    START_CUT,
    exp2_of,
    expm1_of,
    integer_power,
    log2_1p,
    log2_by_hardware,
)

_LN_2 = tl.constexpr(0.6931471805599453)
_LARGEST_HALLEY_K = tl.constexpr(512.0)


@triton.jit
def _nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def centred(x):
    """The largest score of each row, NaN if one is NaN, and the scores minus it; in a fully masked row these are -inf."""
    m = tl.reduce(x, 1, _nan_maximum)
    return m, x - tl.where(m == -float("inf"), 0.0, m)[:, None]


@triton.jit
def spoilt(m):
    """Whether a row holds NaN or +inf."""
    return (m != m) | (m == float("inf"))


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x for values per row."""
    if not PTX:  # noqa: SIM114
        return 1.0 / x
    elif x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def power_less_one(s, e, PTX: tl.constexpr):
    """s^-e - 1 for values per row: relative error 5e-6, and that of log2 s, 2^-22 absolute."""
    if s.dtype == tl.float64:
        return expm1_of(-e * tl.log(s))
    else:
        y2 = -e * log2_by_hardware(s, PTX)
        y = y2 * _LN_2
        series = y + y * y * (0.5 + y * (1.0 / 6.0 + y * (1.0 / 24.0)))
        return tl.where(tl.abs(y) < 0.0625, series, exp2_of(y2, PTX) - 1.0)


@triton.jit
def clipped(a, b, c, PTX: tl.constexpr):
    """a b + c between 0 and 1. One instruction on NVIDIA, where NaN becomes 0."""
    if not PTX:  # noqa: SIM114
        return tl.minimum(tl.maximum(a * b + c, 0.0), 1.0)
    elif a.dtype == tl.float64:
        return tl.minimum(tl.maximum(a * b + c, 0.0), 1.0)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def base(y, e, above, PTX: tl.constexpr):
    """[z - t]_+ for above = -t = 1 - delta, in one rounding. A step is subtracted from `above`, which is smaller than delta."""
    return clipped(e[:, None], y, above[:, None], PTX)


@triton.jit
def is_positive(b, PTX: tl.constexpr):
    """1 where b > 0, without a comparison, whose predicates would cost more."""
    return clipped(b, 2.0**100, 0.0, PTX)


@triton.jit
def first_delta(y, e, high, K: tl.constexpr, PTX: tl.constexpr):
    """The first iterate, and a lower bound of the root.

    The root for the entries with z > START_CUT, as if they were equal: y -> y^k is convex, so it bounds the row's root by
    Jensen's inequality, but for the rounding of the mean, which is more than all of delta where e is tiny. For k = 2 the first
    evaluation, at 1/2, takes this place: its step solves the row of the entries that it has seen.
    """
    if K == 2:
        return tl.zeros_like(high) + 0.5, tl.zeros_like(high)
    else:
        above = clipped(e[:, None], y, -START_CUT, PTX)
        count = tl.maximum(tl.sum(is_positive(above, PTX), axis=1), 1.0)
        mean = START_CUT + tl.sum(above, axis=1) * reciprocal(count, PTX)
        delta = tl.minimum(tl.maximum(mean - power_less_one(count, e, PTX), 0.0), high)
        rounding = 2.0**-50 if y.dtype == tl.float64 else 2.0**-21
        return delta, tl.maximum(delta - rounding, 0.0)


@triton.jit
def exact_power(y, delta, e, k, less, PTX: tl.constexpr):
    """b = [z - t]_+ and b^(k - less), 0 off the support: the logarithm has the digits of z - delta that b has lost."""
    u = e[:, None] * y - delta[:, None]
    power = exp2_of((k[:, None] - less) * log2_1p(u, False, PTX), PTX)
    return base(y, e, 1.0 - delta, PTX), tl.where(u <= -1.0, 0.0, power)


@triton.jit
def evaluated(y, delta, e, k, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """r = [z - t]^(k-2), 0 off the support, and S, S_1 and the sum of r."""
    if K > 0:
        b = base(y, e, 1.0 - delta, PTX)
        r = is_positive(b, PTX) if K == 2 else integer_power(b, K - 2)
        slopes = b if K == 2 else r * b
    elif HARDWARE > 0:
        b = base(y, e, 1.0 - delta, PTX)
        r = exp2_of((k[:, None] - 2.0) * log2_by_hardware(b, PTX), PTX)
        if K != ABOVE_2:  # the logarithm of 0 may give 0
            r = tl.where(b <= 0.0, 0.0, r)
        slopes = r * b
    else:
        b, r = exact_power(y, delta, e, k, 2.0, PTX)
        slopes = r * b
    return r, tl.sum(slopes * b, axis=1), tl.sum(slopes, axis=1), tl.sum(r, axis=1)


@triton.jit
def sloped(y, delta, e, k, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """[z - t]^(k-1), the slopes of the weights, S, and S_1."""
    if K > 0:
        b = base(y, e, 1.0 - delta, PTX)
        slopes = integer_power(b, K - 1)
    elif HARDWARE > 0:
        b = base(y, e, 1.0 - delta, PTX)
        slopes = exp2_of((k[:, None] - 1.0) * log2_by_hardware(b, PTX), PTX)
        if K != ABOVE_2:  # the logarithm of 0 may give 0
            slopes = tl.where(b <= 0.0, 0.0, slopes)
    else:
        b, slopes = exact_power(y, delta, e, k, 1.0, PTX)
    return slopes, tl.sum(slopes * b, axis=1), tl.sum(slopes, axis=1)


@triton.jit
def linear_weights(y, delta, slopes, c, e, k, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """p one linear step of t from `delta`, c / k: b^k - c b^(k-1); for small k, p at the new threshold."""
    if K > 0 and K < 5:
        return integer_power(base(y, e, tl.minimum(1.0 - delta - e * c, 1.0), PTX), K)
    elif K > 0 or HARDWARE > 0:
        return slopes * base(y, e, 1.0 - delta - c, PTX)
    else:
        return slopes * tl.maximum(e[:, None] * y - delta[:, None] + (1.0 - c)[:, None], 0.0)


@triton.jit
def exact_weights(y, delta, r, e, k, step, scale, K: tl.constexpr, PTX: tl.constexpr):
    """p from the last r, one step of t from `delta`: r (b - dt) (b - (k - 1) dt), as `numerics.weights`.

    A step to the left revives dead entries, with r = |dt|^(k-2). For k >= 2 this may be the least r of all: a step to the right
    cuts off entries with a smaller one. The second factor may exceed 1, and is halved.
    """
    near = base(y, e, 1.0 - delta - step, PTX)
    far = clipped((0.5 * e)[:, None], y, (0.5 * (1.0 - delta - (k - 1.0) * step))[:, None], PTX)
    least = tl.exp2((k - 2.0) * tl.log2(tl.maximum(tl.abs(step), 1e-30)))
    if K == 0:
        r = tl.where(r <= 0.0, least[:, None], r)
    else:
        r = tl.maximum(r, least[:, None])
    return r * near * far * (2.0 * scale)[:, None]


@triton.jit
def is_far(total, slope, e, k, size, K: tl.constexpr, FAR: tl.constexpr, PTX: tl.constexpr):
    """Whether 16-bit weights would be off by more than rounding after a linear step; and c as in `is_unsolved`.

    The step leaves c^2 / 2 in a weight, and less than |S - 1| / 2 in the sum. To the right of the root (c < 0), entries may be
    missing from the sums. For k < 2, weights near the threshold are so steep that t must be accurate to its last digits.
    """
    c = (total - 1.0) * reciprocal(slope, PTX)
    far = (tl.abs(total - 1.0) > FAR) | ((c < 0.0) & (size * e * c * e * c > FAR * FAR))
    if K == 0:
        far = tl.where(k >= 2.0, far, tl.abs(c) > 8e-6)
    return far & (total > 0.0), c


@triton.jit
def is_unsolved(total, slope, curve, delta, e, k, size, K: tl.constexpr, CUT: tl.constexpr, PTX: tl.constexpr):
    """`numerics.unsolved`, and c = (S - 1) / S_1, to first order k times the distance of t from its root."""
    c = (total - 1.0) * reciprocal(slope, PTX)
    far = (tl.abs(c) > CUT * (1.0 - delta)) | (c * c * curve > 2.0 * CUT * CUT)
    far = far | ((c < 0.0) & (size * e * c * e * c > 2.0 * CUT * CUT))
    if K == 0:
        far = tl.where(k >= 2.0, far, (tl.abs(c) > 2.0 * CUT * CUT + 2.0**-52) | (c * c * curve > 2.0 * CUT * CUT))
    return far & (total > 0.0), c


@triton.jit
def ends_far(total, slope, curve, e, k, K: tl.constexpr, CUT: tl.constexpr, PTX: tl.constexpr):
    """Whether the next step is predicted to end where `is_unsolved` holds.

    Newton's step on the norm leaves about (S - 1)^2 of the curvature in S, Halley's |S - 1|^3 e of it.
    """
    inverse = reciprocal(slope, PTX)
    h = tl.abs(total - 1.0)
    left = h * h * (curve * total * inverse * inverse - 1.0)
    if K == 0:
        left *= tl.where(k >= 2.0, h * e, 1.0)
    else:
        left *= h * e
    return (left > CUT) & (total > 0.0)


@triton.jit
def next_delta(delta, low, high, total, slope, curve, e, k, bends, K: tl.constexpr, PTX: tl.constexpr):
    """One step towards S = 1 from either side: delta and the lower bound of its root.

    Newton's step on the norm (Eq. 2) ends left of the root from any start, because the norm is convex. The longer step may pass
    the root, and is restricted to [low, high]: Halley's step on the norm, and for k = 2, if it exists, the root while no entry
    enters or leaves the support.
    """
    excess = power_less_one(total, e, PTX)
    inverse = reciprocal(slope, PTX)
    newton = -total * excess * inverse
    low = tl.maximum(low, delta + newton)
    bend = -0.5 * (k - 1.0) * excess * (curve * total * inverse * inverse - 1.0)
    bend = tl.where(bends, tl.minimum(tl.maximum(bend, -0.5), 0.5), 0.0)
    if K <= 0:
        bend = tl.where((k >= 2.0) & (k <= _LARGEST_HALLEY_K), bend, 0.0)
    longer = newton * reciprocal(1.0 - bend, PTX)
    if K == 2:
        square = slope * slope - curve * (total - 1.0)
        root = (total - 1.0) * reciprocal(slope + tl.sqrt(tl.maximum(square, 0.0)), PTX)
        longer = tl.where((square > 0.0) & bends, root, longer)
    return tl.minimum(tl.maximum(delta + longer, low), high), low
