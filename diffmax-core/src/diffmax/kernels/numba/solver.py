"""Solves for the threshold of a row, or of one row per place of a vector (docs/theory.md, section 16)."""

import math

import numpy as np
from numba.core import types

from diffmax.kernels.numba.functions import (
    LOG2_E,
    TINY,
    WHOLE,
    exp2,
    exp_m1,
    integer_power,
    inverse,
    ln,
    powers,
    powers_by_table,
    smallest_normal,
)
from diffmax.kernels.numba.parts import jitable, part
from diffmax.kernels.numba.simd import about_inverse, bits, larger, load, maximum, places, select, smaller, splat, store, total

# Entries whose sum is taken in the computing dtype, before it is added to the others in double precision.
SUMMED = 1024
# Entries of the longest list that joins a group. A group's lists then take half of a cache of 32 KiB.
LISTED = 128
# Entries of a longer row in a group that are added up before they are added to the others: roundings do not pile up.
ADDED = 16
# The first iterate comes from the entries with z above one of these (Eq. 52): in a list from the better of two, in a longer row
# from those above the larger, the first of which is times sqrt(e). About there normally distributed rows have what matters.
STARTS_OF_LISTS = (-0.7, -0.35)
START_OF_ROWS = (-0.7, -0.28)
# How much of the variance's part it takes. A row that begins with S > 1 may need no other evaluation.
SPREAD_OF_LISTS, SPREAD_OF_ROWS = 1.0, 0.7


@jitable
def sweep(z, p, other, start, stop, step, delta, k, k_log2, integer):
    """p = [z - t]^k for the vectors of z at start, start + step, ...; returns S, S_1 and S_2, lane by lane.

    S_2 is the sum of [z - t]^(k-2), which Halley's step needs. Of `other` see `powers`.
    """
    if 0 < integer <= WHOLE:
        return products(z, p, start, stop, step, delta, k, integer)
    s0 = s1 = s2 = splat(z, 0.0)
    if integer == 0:
        powers(z, p, other, start, stop, step, delta, k, k_log2)
    else:
        powers_by_table(z, p, other, start, stop, step, delta, integer)
    for i in range(start, stop, step):
        weight, reciprocal = load(p, i), about_inverse(larger(load(z, i) - delta + 1.0, TINY))
        slope = weight * reciprocal
        s0, s1, s2 = s0 + weight, s1 + slope, s2 + slope * reciprocal
    return s0, s1, s2


@jitable
def products(z, p, start, stop, step, delta, k, integer):
    """`sweep` where k is `integer`, one of those that `integer_power` knows."""
    s0 = s1 = s2 = splat(z, 0.0)
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
def tally(v, tallies, start):
    """Add the entries v above `start` to the tallies: how many they are, their sum, and that of their squares."""
    count, sum_z, squares = tallies
    above = v > start
    some = select(above, v, 0.0)
    return count + select(above, v * 0.0 + 1.0, 0.0), sum_z + some, squares + some * some


@jitable
def started(tallies, e, k, spread):
    """From tallies of any entries: what delta is about (Eq. 52), and a lower bound of it (Eq. 26).

    The sum is rounded: the bound is a little less.
    """
    count, sum_z, squares = tallies
    count = larger(count, 1.0)
    mean = sum_z / count
    log = ln(count)
    below = exp_m1(0.0 - e * log)
    variance = larger(squares / count - mean * mean, 0.0) / ((below + 1.0) * (below + 1.0))
    more = ln(variance * (k * (k - 1.0) * (0.5 * spread)) + 1.0)
    return mean - exp_m1(0.0 - e * (log + more)), mean * (1.0 + 2.0**-10) - below


@jitable
def bounded(about, low, count):
    """The first delta, and its bounds. The upper one is 1 - c^-e for the number c of candidates with e taken as 1."""
    high = 1.0 - 1.0 / larger(count, 1.0)
    low = smaller(larger(low, 0.0), high)
    return smaller(larger(about, low), high), low, high


@jitable
def nudge(weight, reciprocal, d, k):
    """weight (1 - d reciprocal)^k to second order in d (Eq. 29), bounded beside a small [z - t], where that says nothing."""
    y = larger(smaller(reciprocal * (k * d), 1.0), -1.0)
    return select(weight > 0.0, weight * ((y * (0.5 - 0.5 / k) - 1.0) * y + 1.0), 0.0)


@jitable
def solve_group(z, p, other, longest, count, e, integer, steps):
    """Solve one row per lane: entry j of each is in the vector at j * width. Returns delta and S.

    p and `other` are as `sweep` leaves them.
    """
    width = places(z)
    k = 1.0 / e
    k_log2 = k * LOG2_E
    zero = splat(z, 0.0)
    candidates, first, second = zero, (zero, zero, zero), (zero, zero, zero)
    for i in range(0, longest * width, width):
        v = load(z, i)
        candidates = candidates + select(v > -1.0, zero + 1.0, zero)
        first, second = tally(v, first, STARTS_OF_LISTS[0]), tally(v, second, STARTS_OF_LISTS[1])
    about_1, low_1 = started(first, e, k, SPREAD_OF_LISTS)
    about_2, low_2 = started(second, e, k, SPREAD_OF_LISTS)
    delta, low, high = bounded(larger(about_1, about_2), larger(low_1, low_2), candidates)
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
            part = sweep(z, p, other, block, end, width, delta, k, k_log2, integer)
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
        part = lost = zero  # lost: by the roundings of the sum, which all go one way where weights are alike
        for i in range(block, min(block + size, stop), width):
            weight = nudge(load(p, i), inverse(larger(load(z, i) - delta + 1.0, TINY)), d, k)
            store(p, i, weight)
            more = part + weight
            lost = lost + (weight - (more - part))
            part = more
        s0 = s0 + (part + lost)
    return delta + d, s0


@jitable
def deep_sweep(z, p, r, start, stop, delta, k, k_log2):
    """As `sweep`, of a general exponent, with r = 1 / [z - t]; returns S, S_1, S_2, S_3 and S_4."""
    width = places(z)
    s0 = s1 = s2 = s3 = s4 = splat(z, 0.0)
    powers(z, p, r, start, stop, width, delta, k, k_log2)
    for i in range(start, stop, width):
        weight, reciprocal = load(p, i), 1.0 / larger(load(z, i) - delta + 1.0, TINY)
        store(r, i, reciprocal)
        first = weight * reciprocal
        second = first * reciprocal
        third = second * reciprocal
        s0, s1, s2, s3, s4 = s0 + weight, s1 + first, s2 + second, s3 + third, s4 + third * reciprocal
    return s0, s1, s2, s3, s4


@jitable
def deep_sweep_by_table(z, p, other, start, stop, delta, at):
    """As `deep_sweep`, by the table of k; S_1 to S_4 within 0.04 %."""
    width = places(z)
    s0 = s1 = s2 = s3 = s4 = splat(z, 0.0)
    powers_by_table(z, p, other, start, stop, width, delta, at)
    for i in range(start, stop, width):
        weight, reciprocal = load(p, i), about_inverse(larger(load(z, i) - delta + 1.0, TINY))
        first = weight * reciprocal
        second = first * reciprocal
        third = second * reciprocal
        s0, s1, s2, s3, s4 = s0 + weight, s1 + first, s2 + second, s3 + third, s4 + third * reciprocal
    return s0, s1, s2, s3, s4


@jitable
def sums_by_table(z, p, other, length, delta, at):
    """p = [z - t]^k by the table of k; returns S and S_1."""
    width = places(z)
    sum0, sum1 = 0.0, 0.0
    for block in range(0, length, SUMMED):
        stop = min(block + SUMMED, length)
        powers_by_table(z, p, other, block, stop, width, delta, at)
        s0 = s1 = splat(z, 0.0)
        for i in range(block, stop, width):
            weight = load(p, i)
            s0, s1 = s0 + weight, s1 + weight * inverse(larger(load(z, i) - delta + 1.0, TINY))
        sum0, sum1 = sum0 + total(s0), sum1 + total(s1)
    return sum0, sum1


@jitable
def step_on_log(s0, s1, s2, s3, s4, k):
    """From ln S and four derivatives: the d at which ln S(delta + d) = 0 (Eq. 29), and -d ln S / d delta there. All scalars."""
    inverse = 1.0 / s0
    a = k * s1 * inverse
    b = k * (k - 1.0) / 2.0 * s2 * inverse
    # S_j is no larger than the number of entries where k >= j; below, one entry near t may be all of it
    c = k * (k - 1.0) * (k - 2.0) / 6.0 * s3 * inverse if k >= 3.0 else 0.0
    f = k * (k - 1.0) * (k - 2.0) * (k - 3.0) / 24.0 * s4 * inverse if k >= 4.0 else 0.0
    # ln S - a d + second d^2 + third d^3 + fourth d^4 = 0, solved by reversion of the series
    square = a * a
    second = b - square / 2.0
    third = a * b - c - square * a / 3.0
    fourth = f - a * c - b * b / 2.0 + square * b - square * square / 4.0
    inverse = 1.0 / a
    y = math.log(s0) * inverse
    u, v = second * inverse * y, third * inverse * y * y
    d = y * (1.0 + u + (2.0 * u * u + v) + (5.0 * u * (u * u + v) + fourth * inverse * y * y * y))
    return d, a - d * (2.0 * second + d * (3.0 * third + d * 4.0 * fourth))


@jitable
def shift(z, p, r, length, ahead, d, k):
    """p = p (1 - d r)^k for a small d, which takes delta to `ahead`; returns the sum of p.

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
    s = 0.0
    for block in range(0, length, SUMMED):
        part = zero
        for i in range(block, min(block + SUMMED, length), width):
            weight = load(p, i)
            y = load(r, i) * d
            v = y * h
            # (1 - 0.86)^8 is above rounding: no weight above 0 gets lost
            change = larger((((((c6 * v + c5) * v + c4) * v + c3) * v + c2) * v - 1.0) * v, -0.86)
            change = change * (change + 2.0)  # (1 + change)^2 - 1: squares of numbers near 1 would lose digits
            change = change * (change + 2.0)
            change = change * (change + 2.0)
            # elsewhere no weight is left, or it was below the normal numbers, where `exp2` leaves the least of them: with a
            # large k the series would make it as large as any
            live = (load(z, i) - ahead > -1.0) & (weight > smallest_normal(weight))
            shifted = select(live, weight + weight * change, 0.0)
            store(p, i, shifted)
            part = part + shifted
        s += total(part)
    return s


@jitable
def solve_alone(z, p, r, length, tallies, e_value, integer, steps):
    """Solve one row whose entries z[:length] lie side by side, padded to whole vectors.

    Of a general exponent the last small steps are taken on the weights themselves, without powers. Returns delta, S, and the
    last d, which `write_nudged` is to apply to p. r is scratch memory.
    """
    e = splat(z, 0.0) + e_value
    k = 1.0 / e
    candidates, count, sum_z, squares = tallies
    zero = splat(z, 0.0)
    about, low = started((zero + count, zero + sum_z, zero + squares), e, k, SPREAD_OF_ROWS)
    first = bounded(about, low, zero + candidates)
    if 0 < integer <= WHOLE:
        return _by_products(z, p, length, first, e, k, integer, steps)
    if integer != 0:
        return _by_table(z, p, r, length, first, candidates, e, k, e_value, integer, steps)
    return _by_powers(z, p, r, length, first, candidates, e, k, e_value, steps)


@jitable
def _by_products(z, p, length, first, e, k, integer, steps):
    """`solve_alone` where k is `integer`; `first` is what `bounded` gives."""
    width, zero = places(z), splat(z, 0.0)
    delta, low, high = first
    plain = delta < -1.0
    near = False
    step = 0
    while True:
        sum0, sum1, sum2 = 0.0, 0.0, 0.0
        for block in range(0, length, SUMMED):  # float32 holds the sum of a block, not that of a long row
            s0, s1, s2 = products(z, p, block, min(block + SUMMED, length), width, delta, k, integer)
            sum0, sum1, sum2 = sum0 + total(s0), sum1 + total(s1), sum2 + total(s2)
        if step == steps or near or abs(sum0 - 1.0) <= tolerance(z):
            return maximum(delta), sum0, 0.0
        near = abs(sum0 - 1.0) <= 16.0 * tolerance(z)
        s0 = zero + sum0
        plain = plain | (s0 < 1.0)
        delta, low = advance(s0, zero + sum1, zero + sum2, delta, low, high, e, k, plain)
        step += 1


@jitable
def _by_powers(z, p, r, length, first, candidates, e, k, e_value, steps):
    """`solve_alone` of a general exponent."""
    zero = splat(z, 0.0)
    k_log2 = k * LOG2_E
    delta, low, high = first
    plain = delta < -1.0
    near = False
    step = 0
    while True:
        sum0, sum1, sum2, sum3, sum4 = 0.0, 0.0, 0.0, 0.0, 0.0
        for block in range(0, length, SUMMED):
            s0, s1, s2, s3, s4 = deep_sweep(z, p, r, block, min(block + SUMMED, length), delta, k, k_log2)
            sum0, sum1, sum2 = sum0 + total(s0), sum1 + total(s1), sum2 + total(s2)
            sum3, sum4 = sum3 + total(s3), sum4 + total(s4)
        if step == steps or near or abs(sum0 - 1.0) <= tolerance(z):
            return maximum(delta), sum0, 0.0
        if 1.0 < sum0 < reach(z):
            d, slope = step_on_log(sum0, sum1, sum2, sum3, sum4, 1.0 / e_value)
            # of entries that have less than 2 d left, the series gives the first digits alone: all d^k together must not count
            if d > 0.0 and math.log(d) < e_value * math.log(8.0 * tolerance(z) / candidates):
                delta = smaller(delta + d, high)
                s = shift(z, p, r, length, delta, d, 1.0 / e_value)
                if abs(s - 1.0) <= tolerance(z):
                    return maximum(delta), s, 0.0
                if abs(s - 1.0) <= nudged(z):
                    # where s - k d slope + k (k - 1) / 2 d^2 slope^2 / s, the sum of what `write_nudged` writes, is 1
                    d = (s - 1.0) / (slope * s)
                    d *= 1.0 + 0.5 * (1.0 - e_value) * (s - 1.0)
                    return maximum(delta) + d, 1.0, d
                step += 1
                continue
        near = abs(sum0 - 1.0) <= 16.0 * tolerance(z)
        s0 = zero + sum0
        plain = plain | (s0 < 1.0)
        delta, low = advance(s0, zero + sum1, zero + sum2, delta, low, high, e, k, plain)
        step += 1


@jitable
def _by_table(z, p, other, length, first, candidates, e, k, e_value, at, steps):
    """`solve_alone` of an exponent whose table begins at the address: what follows a step on ln S is computed anew."""
    zero = splat(z, 0.0)
    delta, low, high = first
    plain = delta < -1.0
    near = False
    step = 0
    while True:
        sum0, sum1, sum2, sum3, sum4 = 0.0, 0.0, 0.0, 0.0, 0.0
        for block in range(0, length, SUMMED):
            s0, s1, s2, s3, s4 = deep_sweep_by_table(z, p, other, block, min(block + SUMMED, length), delta, at)
            sum0, sum1, sum2 = sum0 + total(s0), sum1 + total(s1), sum2 + total(s2)
            sum3, sum4 = sum3 + total(s3), sum4 + total(s4)
        if step == steps or near or abs(sum0 - 1.0) <= tolerance(z):
            return maximum(delta), sum0, 0.0
        d = step_on_log(sum0, sum1, sum2, sum3, sum4, 1.0 / e_value)[0] if 1.0 < sum0 < reach(z) else 0.0
        if d > 0.0:
            delta = smaller(delta + d, high)
            s, slope = sums_by_table(z, p, other, length, delta, at)
            if abs(s - 1.0) <= tolerance(z):
                return maximum(delta), s, 0.0
            if abs(s - 1.0) <= 0.5 * nudged(z):
                # where s - k d S_1 + k (k - 1) / 2 d^2 S_1^2 / s, the sum of what `write_nudged` writes, is 1
                d = e_value * (s - 1.0) / slope * (1.0 + 0.5 * (1.0 - e_value) * (s - 1.0))
                # of entries that have less than d left, it writes nothing like d^k: all of them together must not count
                if math.log(abs(d)) < e_value * math.log(tolerance(z) / candidates):
                    return maximum(delta) + d, 1.0, d
        else:
            near = abs(sum0 - 1.0) <= 16.0 * tolerance(z)
            s0 = zero + sum0
            plain = plain | (s0 < 1.0)
            delta, low = advance(s0, zero + sum1, zero + sum2, delta, low, high, e, k, plain)
        step += 1
