"""Solves for the threshold of a row, or of one row per place of a vector (docs/theory.md, section 16)."""

import math

import numpy as np
from numba.core import types

from diffmax.kernels.numba.functions import LOG2_E, TINY, exp2, exp_m1, integer_power, ln, power, refined, smallest_normal
from diffmax.kernels.numba.parts import jitable, part
from diffmax.kernels.numba.simd import bits, larger, load, maximum, places, select, smaller, splat, store, total

# Entries whose sum is taken in the computing dtype, before it is added to the others in double precision.
SUMMED = 1024
# Entries of the longest list that joins a group. A group's lists then take half of a cache of 32 KiB.
LISTED = 128
# Entries of a longer row in a group that are added up before they are added to the others: roundings do not pile up.
ADDED = 16
# The first iterate comes from the entries with z above one of these (Eq. 26), whichever is better: about where rows that are
# normally distributed have the entries that matter; in short lists alpha is small, in long ones large.
STARTS_OF_LISTS = (-0.55, -0.35)
STARTS_OF_ROWS = (-0.32, -0.18)


@jitable
def sweep(z, p, start, stop, step, delta, k, k_log2, integer, moments):
    """p = [z - t]^k for the vectors of z at start, start + step, ...; returns S, S_1 and S_2, lane by lane.

    S_2 is the sum of [z - t]^(k-2), which Halley's step needs.
    """
    s0, s1, s2 = moments
    if integer == 0:
        for i in range(start, stop, step):
            weight, reciprocal = power(load(z, i) - delta, k, k_log2)
            store(p, i, weight)
            slope = weight * reciprocal
            s0, s1, s2 = s0 + weight, s1 + slope, s2 + slope * reciprocal
    else:
        for i in range(start, stop, step):
            w = larger(load(z, i) - delta, -1.0)
            u = w + 1.0
            curvature = integer_power(u, integer)
            slope = curvature * u
            weight = slope * (u + (w - (u - 1.0)) * k)  # what rounding took from u counts k times
            store(p, i, weight)
            s0, s1, s2 = s0 + weight, s1 + slope, s2 + curvature
    return s0, s1, s2


@jitable
def advance(s0, s1, s2, delta, low, high, e, k, plain):
    """The next delta and lower bound: Newton's step on the norm (Eq. 2), lengthened to Halley's where S >= 1 (Eq. 27).

    A lane in `plain` takes Newton's steps alone: from the first S < 1 on, after which they cannot pass the root again. The
    logarithm and the exponential of the step are rational bounds (Eq. 28): right to the order that Halley's step is, and safe
    for Newton's.
    """
    above = s0 > 1.0
    y = e * select(above, 2.0 * (s0 - 1.0) / (s0 + 1.0), (s0 - 1.0) / s0)  # at most e ln S
    scale = s0 / s1
    newton = scale * select(above, y / (y + 1.0), y - y * y)  # at most S/S_1 (1 - S^-e)
    # s1 is known to 0.03 %: a bound takes less of a step up, more of a step down
    bound = delta + newton * select(above, s0 * 0.0 + 0.999, 1.001)
    lower = select(above, larger(bound, low), select(low < delta, larger(bound, low), bound))
    h = scale * 2.0 * y / (y + 2.0)
    curved = (k - 1.0) * (s1 / s0 - s2 / s1) * h * 0.5 + 1.0
    ahead = smaller(larger(delta + h / larger(curved, 0.3), lower), high)
    return select(plain, larger(delta + newton, lower), ahead), lower


def tolerance(array):
    """Rounding leaves |S - 1| about here: a row is solved. After an S that was within 16 times of it, a row is so too."""


@part(tolerance)
def _tolerance(array):
    bound = float(np.finfo(np.float64).eps if array.dtype == types.float64 else 4 * np.finfo(np.float32).eps)
    return lambda array: bound


def reach(array):
    """Up to this S the series of `shift` is long enough for the dtype."""


@part(reach)
def _reach(array):
    bound = 1.01 if array.dtype == types.float64 else 2.2
    return lambda array: bound


def nudged(array):
    """Up to this |S - 1| the last step's second order is enough for the dtype."""


@part(nudged)
def _nudged(array):
    bound = 1e-7 if array.dtype == types.float64 else 2e-3
    return lambda array: bound


@jitable
def tally(v, tallies, starts):
    """Add the entries v to the tallies: the number of candidates; number and sum of those above each of two `starts`."""
    one, zero = v * 0.0 + 1.0, v * 0.0
    count, count_1, sum_1, count_2, sum_2 = tallies
    return (
        count + select(v > -1.0, one, zero),
        count_1 + select(v > starts[0], one, zero),
        sum_1 + select(v > starts[0], v, zero),
        count_2 + select(v > starts[1], one, zero),
        sum_2 + select(v > starts[1], v, zero),
    )


@jitable
def bound_of(count, sum_z, e):
    """Lower bound of delta from the number and the sum of any entries (Eq. 26). The sum is rounded: take a little less."""
    count = larger(count, 1.0)
    return sum_z / count * (1.0 + 2.0**-10) - exp_m1(0.0 - e * ln(count))


@jitable
def first_bounds(tallies, e):
    """Lower and upper bound of delta from the tallies. The upper one is 1 - c^-e with e taken as 1."""
    count, count_1, sum_1, count_2, sum_2 = tallies
    high = 1.0 - 1.0 / larger(count, 1.0)
    low = larger(bound_of(count_1, sum_1, e), bound_of(count_2, sum_2, e))
    return smaller(larger(low, 0.0), high), high


@jitable
def nudge(weight, reciprocal, d, k):
    """weight (1 - d reciprocal)^k to the second order in d (Eq. 29)."""
    y = reciprocal * (k * d)
    return select(weight > 0.0, weight * ((y * (0.5 - 0.5 / k) - 1.0) * y + 1.0), 0.0)


@jitable
def solve_group(z, p, longest, count, e, integer, steps):
    """Solve one row per lane: entry j of each is in the vector at j * width. Returns delta and S; p is as `sweep` leaves it."""
    width = places(z)
    k = 1.0 / e
    k_log2 = k * LOG2_E
    zero = splat(z, 0.0)
    tallies = (zero, zero, zero, zero, zero)
    for i in range(0, longest * width, width):
        tallies = tally(load(z, i), tallies, STARTS_OF_LISTS)
    low, high = first_bounds(tallies, e)
    delta = low
    solved = count < 0.5
    # Lists are added up entry by entry, so that those that weigh nothing change no bit; what is longer than a list, in blocks.
    stop = longest * width
    size = stop if longest <= LISTED else ADDED * width
    plain = near = delta < -1.0
    enough = larger(smaller(exp2(e * math.log2(tolerance(z) / 2.0)), 400.0 * tolerance(z)), tolerance(z))
    step = 0
    while True:
        s0, s1, s2 = zero, zero, zero
        for block in range(0, stop, size):
            end = min(block + size, stop)
            part = sweep(z, p, block, end, width, delta, k, k_log2, integer, (zero, zero, zero))
            s0, s1, s2 = s0 + part[0], s1 + part[1], s2 + part[2]
        distance = larger(s0 - 1.0, 1.0 - s0)
        solved = solved | near | (distance <= enough)
        if step == steps or bits(solved) == (1 << width) - 1:
            break
        near = distance <= 16.0 * tolerance(z)
        plain = plain | (s0 < 1.0)
        ahead, low = advance(s0, s1, s2, delta, low, high, e, k, plain)
        delta = select(solved, delta, ahead)
        step += 1
    # The last small step needs no powers. Of an entry with less than d left it gets wrong at most d^k: hence `enough`.
    d = select((distance <= enough) & (s1 > 0.0), (s0 - 1.0) / (s1 * k), 0.0)
    s0 = zero
    for block in range(0, stop, size):
        part = zero
        for i in range(block, min(block + size, stop), width):
            weight = nudge(load(p, i), 1.0 / larger(load(z, i) - delta + 1.0, TINY), d, k)
            store(p, i, weight)
            part = part + weight
        s0 = s0 + part
    return delta + d, s0


@jitable
def deep_sweep(z, p, r, start, stop, delta, k, k_log2):
    """As `sweep`, of a general exponent, with r = 1 / [z - t] kept to full precision; returns S, S_1, S_2 and S_3."""
    width = places(z)
    s0 = s1 = s2 = s3 = splat(z, 0.0)
    for i in range(start, stop, width):
        w = load(z, i) - delta
        weight, about = power(w, k, k_log2)
        reciprocal = refined(about, larger(w + 1.0, TINY))
        store(p, i, weight)
        store(r, i, reciprocal)
        first = weight * reciprocal
        second = first * reciprocal
        s0, s1, s2, s3 = s0 + weight, s1 + first, s2 + second, s3 + second * reciprocal
    return s0, s1, s2, s3


@jitable
def step_on_log(s0, s1, s2, s3, k):
    """The d at which ln S(delta + d) = 0 (Eq. 29), from the value and three derivatives of ln S. All are scalars."""
    inverse = 1.0 / s0
    a = k * s1 * inverse
    b = k * (k - 1.0) * s2 * inverse
    c = k * (k - 1.0) * (k - 2.0) * s3 * inverse
    # ln S - a d + second d^2 + third d^3 = 0, solved by reversion of the series
    second, third = (b - a * a) / 2.0, a * b / 2.0 - (c + 2.0 * a * a * a) / 6.0
    inverse = 1.0 / a
    d = math.log(s0) * inverse
    bend = second * inverse * d
    return d * (1.0 + bend + 2.0 * bend * bend + third * inverse * d * d)


@jitable
def shift(p, r, length, d, k):
    """p = p (1 - d r)^k and r = r / (1 - d r) for a small d, which takes delta to delta + d; returns the sums of p and p r.

    The eighth power of (1 - d r)^(k/8), whose series needs few terms.
    """
    width = places(p)
    zero = splat(p, 0.0)
    h = k / 8.0
    f2 = (1.0 - 1.0 / h) / 2.0  # (1 - y)^h in powers of h y, whose coefficients stay small for any h
    f3 = f2 * (1.0 - 2.0 / h) / 3.0
    f4 = f3 * (1.0 - 3.0 / h) / 4.0
    f5 = f4 * (1.0 - 4.0 / h) / 5.0
    f6 = f5 * (1.0 - 5.0 / h) / 6.0
    c2, c3, c4, c5, c6 = zero + f2, zero - f3, zero + f4, zero - f5, zero + f6
    s = slope = 0.0
    for block in range(0, length, SUMMED):
        part = slopes = zero
        for i in range(block, min(block + SUMMED, length), width):
            weight = load(p, i)
            reciprocal = load(r, i)
            y = reciprocal * d
            reciprocal = reciprocal * (((y + 1.0) * y + 1.0) * y + 1.0)
            store(r, i, reciprocal)
            v = y * h
            change = larger((((((c6 * v + c5) * v + c4) * v + c3) * v + c2) * v - 1.0) * v, -0.999)
            change = change * (change + 2.0)  # (1 + change)^2 - 1: squares of numbers near 1 would lose digits
            change = change * (change + 2.0)
            change = change * (change + 2.0)
            # elsewhere r means nothing and may be infinite, or the weight is below the normal numbers, where `exp2` leaves the
            # least of them: with a large k the series would make it as large as any
            live = (y < 1.0) & (weight > smallest_normal(weight))
            shifted = select(live, weight + weight * change, 0.0)
            store(p, i, shifted)
            part, slopes = part + shifted, slopes + select(live, shifted * reciprocal, 0.0)
        s, slope = s + total(part), slope + total(slopes)
    return s, slope


@jitable
def solve_alone(z, p, r, length, tallies, e_value, integer, steps):
    """Solve one row whose entries z[:length] lie side by side, padded to whole vectors.

    Of a general exponent the last small steps are taken on the weights themselves, without powers. Returns delta, S, and the
    last d, which `write` is to apply to p with the reciprocals r.
    """
    width = places(z)
    zero = splat(z, 0.0)
    e = zero + e_value
    k = 1.0 / e
    k_log2 = k * LOG2_E
    c, c1, s1, c2, s2 = tallies
    low, high = first_bounds((zero + c, zero + c1, zero + s1, zero + c2, zero + s2), e)
    delta = low
    plain = delta < -1.0
    near = False
    step = 0
    while True:
        sum0, sum1, sum2, sum3 = 0.0, 0.0, 0.0, 0.0
        for block in range(0, length, SUMMED):  # float32 holds the sum of a block, not that of a long row
            stop = min(block + SUMMED, length)
            if integer == 0:
                s0, s1, s2, s3 = deep_sweep(z, p, r, block, stop, delta, k, k_log2)
                sum3 += total(s3)
            else:
                s0, s1, s2 = sweep(z, p, block, stop, width, delta, k, k_log2, integer, (zero, zero, zero))
            sum0 += total(s0)
            sum1 += total(s1)
            sum2 += total(s2)
        if step == steps or near or abs(sum0 - 1.0) <= tolerance(z):
            return maximum(delta), sum0, 0.0
        if integer == 0 and 1.0 < sum0 < reach(z):
            d = step_on_log(sum0, sum1, sum2, sum3, 1.0 / e_value)
            # of entries that have less than 2 d left, the series gives the first digits alone: all d^k together must not count
            if d > 0.0 and math.log(d) < e_value * math.log(8.0 * tolerance(z) / c):
                delta = smaller(delta + d, high)
                s, slope = shift(p, r, length, d, 1.0 / e_value)
                if abs(s - 1.0) > nudged(z):
                    d = (s - 1.0) / slope * e_value
                    delta = delta + d
                    s, slope = shift(p, r, length, d, 1.0 / e_value)
                if abs(s - 1.0) <= nudged(z):
                    # where s - k d slope + k (k - 1) / 2 d^2 slope^2 / s, the sum of what `write` writes, is 1
                    d = (s - 1.0) / slope * e_value
                    d *= 1.0 + 0.5 * (1.0 - e_value) * (s - 1.0)
                    return maximum(delta) + d, 1.0, d
                step += 1
                continue
        near = abs(sum0 - 1.0) <= 16.0 * tolerance(z)
        s0 = zero + sum0
        plain = plain | (s0 < 1.0)
        delta, low = advance(s0, zero + sum1, zero + sum2, delta, low, high, e, k, plain)
        step += 1
