"""Triton arithmetic of all operators: powers, the solver's step and stop, the weight of Eq. 6. Equations: docs/theory.md.
Symbols: docs/glossary.md.

Shapes: scores are tiles (ROWS, BLOCK), values per row are vectors (ROWS,). NaN needs no branch: it is never dead, so it
reaches the sum and from there the whole row.
"""

import triton
import triton.language as tl

# log2(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first; relative error 8e-9 before rounding
_C9 = tl.constexpr(-0.10749789327383041)
_C8 = tl.constexpr(0.18476033210754395)
_C7 = tl.constexpr(-0.19138838350772858)
_C6 = tl.constexpr(0.20485764741897583)
_C5 = tl.constexpr(-0.23960812389850616)
_C4 = tl.constexpr(0.28855255246162415)
_C3 = tl.constexpr(-0.36069655418395996)
_C2 = tl.constexpr(0.48089852929115295)
_C1 = tl.constexpr(-0.7213473320007324)
_C0 = tl.constexpr(1.4426950216293335)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# ln(2)^2 (e^v - 1 - v) / v^2 on [0, 1], highest power first; relative error 4e-9 before rounding. Terms for float64
_W6 = tl.constexpr(1.7627786291996017e-05)
_W5 = tl.constexpr(8.70394505909644e-05)
_W4 = tl.constexpr(0.0006730385939590633)
_W3 = tl.constexpr(0.004001768305897713)
_W2 = tl.constexpr(0.020019205287098885)
_W1 = tl.constexpr(0.08007548004388809)
_W0 = tl.constexpr(0.24022650718688965)
_TERMS = tl.constexpr(17)

# Smaller e are raised to it (softmax); see diffmax.operators.common.numerics
_MIN_E = tl.constexpr(2.0**-60)

# Number of Halley steps. Rows that are still unsolved take Newton steps, whose number is bounded (Eq. 9)
HALLEY_STEPS = tl.constexpr(8)
_LARGEST_HALLEY_K = tl.constexpr(512.0)

# The first iterate is the root for the entries above this score, as if they were equal: see `first_iterate`
START_CUT = tl.constexpr(-0.35)

# Use of the hardware logarithm: nowhere, in the first evaluation, everywhere
HARDWARE_NONE = tl.constexpr(0)
HARDWARE_FIRST = tl.constexpr(1)
HARDWARE_ALL = tl.constexpr(2)

# Values of K for an exponent given at run time: any, or above 2
ANY_K = tl.constexpr(0)
ABOVE_2 = tl.constexpr(-1)


@triton.jit
def hardware_log2(w):
    """log2(w), for which the compiler may use a hardware instruction."""
    return tl.log2(w)


@triton.jit
def log2_by_hardware(w, PTX: tl.constexpr):
    """log2(w) of float32 by the special-function unit, to 2^-22 absolute; -inf for 0."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [w], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return hardware_log2(w)


@triton.jit
def log2_1p(u, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """log2(1 + u) for u > -1; unless HARDWARE, it keeps the digits of u that 1 + u loses."""
    w = 1.0 + u
    if u.dtype == tl.float64:
        return (tl.log(w) + (u - (w - 1.0)) / w) * _LOG2_E
    elif HARDWARE:
        return log2_by_hardware(w, PTX)
    else:
        # 1 + u = 2^j (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1]; the fused multiply-add leaves f one rounding
        j = (w.to(tl.int32, bitcast=True) - 0x3F3504F3) & -8388608
        scale = (0x3F800000 - j).to(tl.float32, bitcast=True)
        return _log2_of_parts(j, tl.fma(u, scale, scale - 1.0))


@triton.jit
def log2_of(w):
    """log2(w) for w > 0; for subnormal w a number near -127."""
    if w.dtype == tl.float64:
        return tl.log(w) * _LOG2_E
    else:
        j = (w.to(tl.int32, bitcast=True) - 0x3F3504F3) & -8388608
        scale = (0x3F800000 - j).to(tl.float32, bitcast=True)
        return _log2_of_parts(j, tl.fma(w, scale, -1.0))


@triton.jit
def _log2_of_parts(j, f):
    y = tl.fma(f, _C9, _C8)
    y = tl.fma(f, y, _C7)
    y = tl.fma(f, y, _C6)
    y = tl.fma(f, y, _C5)
    y = tl.fma(f, y, _C4)
    y = tl.fma(f, y, _C3)
    y = tl.fma(f, y, _C2)
    y = tl.fma(f, y, _C1)
    y = tl.fma(f, y, _C0)
    return tl.fma(f, y, j.to(tl.float32) * 1.1920928955078125e-07)  # j holds the exponent times 2^23


@triton.jit
def exp2_of(y, PTX: tl.constexpr):
    """2^y; on NVIDIA in float32 the bare instruction, which flushes subnormal results to 0."""
    if not PTX:  # noqa: SIM114  (Triton 3.2, the version of Triton-Ascend, does not compile `or` of the two)
        return tl.exp2(y)
    elif y.dtype == tl.float64:
        return tl.exp2(y)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def once(x, MOVE: tl.constexpr, REGISTERS: tl.constexpr):
    """x of float32, by an instruction MOVE unless it is None: the compiler may not compute x again for another layout."""
    if MOVE is None:
        return x
    else:
        return tl.inline_asm_elementwise(MOVE, REGISTERS, [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def expm1_of(y):
    """e^y - 1 per row, without cancellation: Newton's lower bound is valid only as far as this is exact."""
    TERMS: tl.constexpr = 15 if y.dtype == tl.float64 else 8
    small = tl.abs(y) < 0.5
    x = tl.where(small, y, 0.0)
    series = tl.full(y.shape, 1.0, y.dtype)
    # y (1 + y/2 (1 + y/3 (1 + ...)))
    for j in tl.static_range(TERMS):
        series = 1.0 + series * x * (1.0 / (TERMS + 1 - j))
    return tl.where(small, y * series, tl.exp(y) - 1.0)


@triton.jit
def checked_e(e):
    """e = 1 - alpha raised to the softmax limit; NaN where it lies outside [0, 1]."""
    return tl.where((e >= 0.0) & (e <= 1.0), tl.maximum(e, _MIN_E), float("nan"))


@triton.jit
def clamped_e(e):
    """e raised to the softmax limit; NaN stays."""
    return tl.where(e < _MIN_E, _MIN_E, e)


@triton.jit
def bounded_e(e, CHECKED: tl.constexpr):
    """`checked_e` if CHECKED, for a forward; else `clamped_e`, for a backward."""
    if CHECKED:
        return checked_e(e)
    else:
        return clamped_e(e)


@triton.jit
def scaled_scores(x, m, e):
    """z = e (x - max x); in a fully masked row every z is -inf."""
    return e[:, None] * (x - tl.where(m == -float("inf"), 0.0, m)[:, None])


@triton.jit
def sums_near_top(z):
    """Sum and number of the entries with z > START_CUT, each (ROWS,)."""
    near = z > START_CUT
    return tl.sum(tl.where(near, z, 0.0), axis=1), tl.sum(near.to(z.dtype), axis=1)


@triton.jit
def cheap_base(z, delta):
    """[z - t]_+ if a power is cheap (K > 0 or HARDWARE > 0): then k is small, and this rounding no worse than the weight's.

    One rounding per entry; the rounding of 1 - delta is the same for a whole row.
    """
    return tl.maximum(z + (1.0 - delta)[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sums(b, r):
    """S, S_1 and the sum of [z - t]^(k-2), each (ROWS,)."""
    slopes = r * b
    return tl.sum(slopes * b, axis=1), tl.sum(slopes, axis=1), tl.sum(r, axis=1)


@triton.jit
def integer_power(b, N: tl.constexpr):
    """b^N by multiplications, for N from 1 to 5 and 8 to 10: the values of k, k - 1 and k - 2 for `INTEGER_EXPONENTS`."""
    square = b * b
    if N == 1:
        power = b
    elif N == 2:
        power = square
    elif N == 3:
        power = square * b
    elif N == 4:
        power = square * square
    elif N == 5:
        power = square * square * b
    else:
        power = square * square
        power = power * power
        if N == 9:
            power = power * b
        elif N == 10:
            power = power * square
    return power


@triton.jit
def cheap_powers(z, delta, k, K: tl.constexpr, PTX: tl.constexpr):
    """`powers` if a power is cheap."""
    b = cheap_base(z, delta)
    if K == 2:
        r = tl.minimum(b * 2.0**100, 1.0)  # no comparison, whose predicates would cost more
    elif K > 0:
        r = integer_power(b, K - 2)
    else:
        r = exp2_of((k[:, None] - 2.0) * log2_by_hardware(b, PTX), PTX)
        if K != ABOVE_2:  # the logarithm of 0 may give 0
            r = tl.where(b <= 0.0, 0.0, r)
    return b, r


@triton.jit
def powers(z, delta, k, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """b = [z - t]_+ and r = b^(k-2), 0 off the support. r*b is the term of the slope, r*b*b the weight.

    K is k if its powers are computed by multiplications, else `ANY_K` or `ABOVE_2`.
    """
    if K > 0 or HARDWARE > 0:
        return cheap_powers(z, delta, k, K, PTX)
    else:
        u = z - delta[:, None]
        dead = u <= -1.0
        b = tl.where(dead, 0.0, u + 1.0)
        r = tl.where(dead, 0.0, exp2_of((k[:, None] - 2.0) * log2_1p(u, False, PTX), PTX))
        return b, r


@triton.jit
def sums_at(z, delta, k, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """`sums` of a tile at a threshold."""
    b, r = powers(z, delta, k, K, HARDWARE, PTX)
    return sums(b, r)


@triton.jit
def with_sink(total, slope, curve, sink, m, delta, e, k, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """`sums` with one more score per row, the sink (ROWS,)."""
    own, own_slope, own_curve = sums_at(scaled_scores(sink[:, None], m, e), delta, k, K, HARDWARE, PTX)
    return total + own, slope + own_slope, curve + own_curve


@triton.jit
def first_iterate(z_sum, count, e):
    """The delta that solves a row of `count` equal entries with the sum `z_sum`; 0 if there are none.

    y -> y^k is convex, so unequal entries have a larger sum: the delta of the row is not smaller (Jensen's inequality).
    """
    count = tl.maximum(count, 1.0)
    return tl.maximum(z_sum / count - expm1_of(-e * tl.log(count)), 0.0)


@triton.jit
def overshoot(total, slope):
    """c = (S - 1) / S_1: to first order, k times the distance of t from its root."""
    return (total - 1.0) / slope


@triton.jit
def rounding_in_sum(total, slope, curve, CUT: tl.constexpr):
    """Whether the sum stays 1 after the linear step (`weights`), which changes it by half of this, or more if it cuts off."""
    c = overshoot(total, slope)
    return c * c * curve <= 2.0 * CUT * CUT


@triton.jit
def unsolved(total, slope, curve, delta, e, k, size, CUT: tl.constexpr):
    """Whether the weights would have an error above rounding after one linear step.

    For k >= 2 that step leaves an error of b^(k-2) c^2 / 2 in a weight: it must be small compared with the largest weight
    (1 - delta)^k, and in the sum. To the right of the root (c < 0), entries may be missing from the sums, each less than
    (e c)^k. For k < 2 there is no such bound as b -> 0, and c itself must be as small as the last digit of delta.
    """
    c = overshoot(total, slope)
    far = (tl.abs(c) > CUT * (1.0 - delta)) | (rounding_in_sum(total, slope, curve, CUT) == 0)
    far = far | ((c < 0.0) & (size * e * c * e * c > 2.0 * CUT * CUT))
    return tl.where(k >= 2.0, far, tl.abs(c) > 2.0 * CUT * CUT + 2.0**-52) & (total > 0.0)


@triton.jit
def next_iterate(delta, low, high, total, slope, curve, e, k, bends):
    """One step towards S = 1 from either side: delta and the certified lower bound of its root.

    Newton's step on the norm (Eq. 2) ends left of the root from any start, because the norm is convex. Halley's step on the
    norm is longer; it may pass the root, and is restricted to [low, high].
    """
    excess = expm1_of(-e * tl.log(total))  # S^-e - 1; S - S^alpha = -S expm1(-e ln S) has no cancellation
    newton = -total * excess / slope
    low = tl.maximum(low, delta + newton)
    bend = -0.5 * (k - 1.0) * excess * (curve * total / (slope * slope) - 1.0)
    bend = tl.minimum(tl.maximum(bend, -0.5), 0.5)
    bend = tl.where((k >= 2.0) & (k <= _LARGEST_HALLEY_K) & bends, bend, 0.0)
    return tl.minimum(tl.maximum(delta + newton / (1.0 - bend), low), high), low


@triton.jit
def finishing(delta, total, slope, curve, e, k, size, CUT: tl.constexpr, ENSURE_SUM_ONE: tl.constexpr):
    """The conversion of the last b and r to weights: the remaining step in t, a scale, and delta for the backward.

    Division by the sum changes all weights by one factor, although the error is in the small ones. So it is used only for rows
    that are not solved, or whose many small weights the step would move below 0.
    """
    near = (unsolved(total, slope, curve, delta, e, k, size, CUT) == 0) & rounding_in_sum(total, slope, curve, CUT)
    small = near & (total > 0.0)
    step = tl.where(small, e * overshoot(total, slope), 0.0)
    if ENSURE_SUM_ONE:
        scale = tl.where(small | (total == 0.0), 1.0, 1.0 / total)
    else:
        scale = tl.where(total != total, total, 1.0)
    # explicit NaN, because the maximum with NaN is NaN in the interpreter, but a number on devices
    return step, scale, tl.where(total != total, total, tl.maximum(delta + step, 0.0))


@triton.jit
def weights_at(z, delta, k, scale, K: tl.constexpr, PTX: tl.constexpr):
    """p = [z - t]^k at the last threshold, if a power is cheap."""
    b = cheap_base(z, delta)
    if K <= 0:
        return exp2_of(k[:, None] * log2_by_hardware(b, PTX), PTX) * scale[:, None]
    return integer_power(b, K) * scale[:, None]


@triton.jit
def weights(z, delta, r, k, step, scale, CHEAP: tl.constexpr):
    """p from the last r and the results of `finishing`: [b - dt]^k without another power.

    This is b^k - k b^(k-1) dt plus a term in dt^2, which makes it exact for k = 2 and, for small k, accurate where b is about
    dt: there the slope p^alpha of the backward is steep. A step to the left revives dead entries, with b > dt.

    CHEAP: r comes from `cheap_powers`. k multiplies the rounding error of a threshold: for k = 10, if the step were added to
    the threshold, float32 weights would be off by 5 ulp, all in one direction.
    """
    if CHEAP:
        b = z + (1.0 - delta)[:, None]
    else:
        b = z - delta[:, None] + 1.0
    near = tl.maximum(b - step[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    far = tl.maximum(b - ((k - 1.0) * step)[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    dead_r = tl.exp2((k - 2.0) * tl.log2(tl.maximum(tl.abs(step), 1e-30)))
    r = tl.where(b <= 0.0, dead_r[:, None], r)
    return r * near * far * scale[:, None]


@triton.jit
def alpha_weight(p, log2_p, e, PTX: tl.constexpr):
    """w = p phi(ln p) of Eq. 6: with v = -e ln p, a series for v < 1, else as written. log2 p is 0 where p is 0."""
    v2 = -e[:, None] * log2_p
    v = v2 * _LN_2
    far = p * ((exp2_of(v2, PTX) - 1.0) - v) * (1.0 / (e * e))[:, None]  # e^2 is at least 2^-120
    return tl.where(v < 1.0, _near_alpha_weight(p, v, log2_p), far)


@triton.jit
def _near_alpha_weight(p, v, log2_p):
    """p ln(p)^2 (1/2 + v/6 + v^2/24 + ...) for v < 1."""
    if v.dtype == tl.float64:
        series = v * 0.0 + 1.0
        for j in tl.static_range(_TERMS):
            series = 1.0 + series * v * (1.0 / (_TERMS + 2 - j))
        return p * (log2_p * log2_p) * series * (0.5 * _LN_2 * _LN_2)
    else:
        series = tl.fma(v, _W6, _W5)
        series = tl.fma(v, series, _W4)
        series = tl.fma(v, series, _W3)
        series = tl.fma(v, series, _W2)
        series = tl.fma(v, series, _W1)
        return p * (log2_p * log2_p) * tl.fma(v, series, _W0)
