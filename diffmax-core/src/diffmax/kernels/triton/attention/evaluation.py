"""Sums and weights of attention's tiles of scores at a threshold, in few instructions per score.

A tile x holds products, if a score is `unit` times its product, or scores, with unit 1. With the constants of a row folded, a
base b = [e (unit x - m) - delta + 1]_+ is one fused multiply-add and one maximum: [x c - t]_+ with c = unit e and
t = e m + delta - 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import exp2_of, integer_power, log2_1p, log2_by_hardware

# How a power of a base is computed: by multiplications or the hardware logarithm; by a logarithm that keeps the digits
# of b - 1, which are those that count for a large k; by what e, read at run time, asks for
CHEAP = tl.constexpr(0)
DIGITS = tl.constexpr(1)
EITHER = tl.constexpr(2)

# A logarithm of the hardware suffices from this e on: `common.launch.SMALLEST_E_FOR_HARDWARE`
_SMALLEST_E = tl.constexpr(1 / 64)

# For a larger |m|, t would lose digits of delta that show in 16 bits: the difference to m comes first
_LARGEST_SHIFT = tl.constexpr(1024.0)


class Level(NamedTuple):
    """Thresholds of the rows of a tile.

    Attributes:
        unit: A score per entry of the tile.
        m: What z is relative to, finite.
        c, t: The base of a `shifted` entry x is [x c - t]_+, or if `digits` [x c - t + 1]_+.
        digits: Whether the logarithm has to keep the digits of b - 1: 1.0 or 0.0.
        far: Whether the difference to m comes first, because some m is large. Unless EXACT: then it always does.
    """

    unit: Any
    m: Any
    c: Any
    t: Any
    digits: Any
    far: Any


@triton.jit
def level_at(m, delta, unit, e, POWER: tl.constexpr, EXACT: tl.constexpr):
    """The level of rows whose threshold is delta relative to m."""
    m = tl.where(m == -float("inf"), 0.0, m)
    if POWER == EITHER:
        digits = tl.where(e < _SMALLEST_E, 1.0, 0.0)
        t = tl.where(e < _SMALLEST_E, delta, delta - 1.0)
    elif POWER == DIGITS:
        digits, t = 1.0, delta
    else:
        digits, t = 0.0, delta - 1.0
    if EXACT:
        return Level(unit, m, e, t, digits, False)
    else:
        far = any_of(tl.abs(m) > _LARGEST_SHIFT)
        return Level(unit, m, tl.where(far, e, unit * e), tl.where(far, t, e * m + t), digits, far)


@triton.jit
def any_of(rows):
    """Whether a (ROWS,) condition holds anywhere. Triton 3.6 and 3.7 do not compile it for sm100 if the axis is named."""
    return tl.max(rows.to(tl.int32)) > 0


@triton.jit
def shifted(x, m, level, EXACT: tl.constexpr):
    """x, or if `far` z / e; m broadcasts against x."""
    if EXACT:
        x = x * level.unit - m
    else:
        x = tl.where(level.far, x * level.unit - m, x)
    return x


@triton.jit
def is_dead(x, m, t, level, EXACT: tl.constexpr):
    """Whether the bases of these entries, largest ones of tiles, are 0; m and t broadcast against x. NaN is not dead."""
    return shifted(x, m, level, EXACT) * level.c - t <= -level.digits


@triton.jit
def positive(y):
    """[y]_+; NaN stays, on devices too."""
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger_or_nan(a, b):
    """The larger one, or NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def partial_sums(x, PARTIAL: tl.constexpr):
    """Sums over every PARTIAL-th entry of a row, (ROWS, PARTIAL): entries that a thread of the matrix units holds."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // PARTIAL, PARTIAL)), axis=1)


@triton.jit
def sums_of(x, level, k, K: tl.constexpr, POWER: tl.constexpr, PTX: tl.constexpr, PARTIAL: tl.constexpr):
    """S, S_1 and, for k >= 2, the sum of [z - t]^(k-2) of a `shifted` tile, each as `partial_sums`. k is a scalar."""
    y = x * level.c - level.t[:, None]
    if POWER == EITHER:
        if level.digits > 0.0:
            total, slope, curve = _sums_by_digits(y, k, PTX, PARTIAL)
        else:
            total, slope, curve = _sums_by_hardware(positive(y), k, PTX, PARTIAL)
    elif POWER == DIGITS:
        total, slope, curve = _sums_by_digits(y, k, PTX, PARTIAL)
    elif K > 0:
        total, slope, curve = _sums_by_products(positive(y), K, PARTIAL)
    else:
        total, slope, curve = _sums_by_hardware(positive(y), k, PTX, PARTIAL)
    return total, slope, curve


@triton.jit
def _sums_by_products(b, K: tl.constexpr, PARTIAL: tl.constexpr):
    if K == 2:
        few = tl.minimum(b, 2.0**-100)  # no comparison, whose predicates would cost more
        return partial_sums(b * b, PARTIAL), partial_sums(b, PARTIAL), partial_sums(few, PARTIAL) * 2.0**100
    else:
        r = integer_power(b, K - 2)
        return partial_sums(r * (b * b), PARTIAL), partial_sums(r * b, PARTIAL), partial_sums(r, PARTIAL)


@triton.jit
def _sums_by_hardware(b, k, PTX: tl.constexpr, PARTIAL: tl.constexpr):
    """b = 0 has the logarithm -inf, whose products with a positive exponent vanish: no comparison is needed."""
    log2_b = log2_by_hardware(b, PTX)
    if k >= 2.0:
        r = exp2_of(tl.maximum(k - 2.0, 1e-30) * log2_b, PTX)
        total, slope, curve = partial_sums(r * (b * b), PARTIAL), partial_sums(r * b, PARTIAL), partial_sums(r, PARTIAL)
    else:
        s = exp2_of(tl.maximum(k - 1.0, 1e-30) * log2_b, PTX)
        slope = partial_sums(s, PARTIAL)
        total, curve = partial_sums(s * b, PARTIAL), slope * 0.0
    return total, slope, curve


@triton.jit
def _sums_by_digits(u, k, PTX: tl.constexpr, PARTIAL: tl.constexpr):
    dead = u <= -1.0
    b = tl.where(dead, 0.0, u + 1.0)
    r = tl.where(dead, 0.0, exp2_of((k - 2.0) * log2_1p(u, False, PTX), PTX))
    s = r * b
    return partial_sums(s * b, PARTIAL), partial_sums(s, PARTIAL), partial_sums(r, PARTIAL)


@triton.jit
def weights_of(x, level, k, K: tl.constexpr, POWER: tl.constexpr, SLOPES: tl.constexpr, PTX: tl.constexpr):
    """The weights [z - t]^k of a `shifted` tile and, if SLOPES, [z - t]^(k-1)."""
    y = x * level.c - level.t[:, None]
    if K > 0:
        b = positive(y)
        if SLOPES:
            s = integer_power(b, K - 1)
            p = s * b
        else:
            p = integer_power(b, K)
            s = p
    elif SLOPES:
        b, s = _power(y, tl.maximum(k - 1.0, 1e-30), level, POWER, PTX)
        p = s * b
    else:
        _b, p = _power(y, k, level, POWER, PTX)
        s = p
    return s, p


@triton.jit
def _power(y, exponent, level, POWER: tl.constexpr, PTX: tl.constexpr):
    """The base and its power, with a positive exponent."""
    if POWER == EITHER:
        if level.digits > 0.0:
            b, power = _power_by_digits(y, exponent, PTX)
        else:
            b = positive(y)
            power = exp2_of(exponent * log2_by_hardware(b, PTX), PTX)
    elif POWER == DIGITS:
        b, power = _power_by_digits(y, exponent, PTX)
    else:
        b = positive(y)
        power = exp2_of(exponent * log2_by_hardware(b, PTX), PTX)
    return b, power


@triton.jit
def _power_by_digits(u, exponent, PTX: tl.constexpr):
    dead = u <= -1.0
    b = tl.where(dead, 0.0, u + 1.0)
    return b, tl.where(dead, 0.0, exp2_of(exponent * log2_1p(u, False, PTX), PTX))


@triton.jit
def support_of(x, level):
    """The number of weights of a `shifted` tile that are not 0, (ROWS,)."""
    y = x * level.c - level.t[:, None]
    return tl.sum((y > -level.digits).to(tl.int32), axis=1)
