"""The row operator for CPUs, compiled by Numba: what runs on each row. `kernels.numba.rows` is the way in.

A row whose list of candidates (entries with z > -1, Eq. 2) is short joins a group: the lists of as many rows as a vector has
places are solved together, one row per place. A longer one is solved alone, its entries side by side. Equations are those of
docs/theory.md; what each step costs stands in docs/performance.md.
"""

import functools
import math
from struct import Struct

import numpy as np
import torch
from numba import cfunc
from numba.core import types
from numba.core.ccallback import CFunc
from numba.core.extending import overload, register_jitable

from diffmax.kernels.numba.cache import compile_cached
from diffmax.kernels.numba.simd import (
    BYTES,
    array_at,
    bits,
    count_bits,
    fetch_add,
    get,
    horner,
    is_nan,
    larger,
    load,
    lowest_bit,
    maximum,
    nearest_integer,
    put,
    round_shifted,
    select,
    smaller,
    splat,
    split_exponent,
    square_root,
    store,
    times_power,
    total,
)
from diffmax.operators.common.numerics import MIN_E

LOG2_E = 1 / math.log(2)
LN_2 = math.log(2)
TINY = 2.0**-60
DEAD = -2.0  # z of an entry that weighs nothing

# Entries of the longest list that joins a group. A group's lists then take half of a cache of 32 KiB.
LISTED = 128
PAGE = 4096  # bytes: what the low bits of an address tell apart
# A longer row is solved on its candidates alone where they are this share of it or less.
SPARSE_SHARE = 0.5
# Entries whose sum is taken in the computing dtype, before it is added to the others in double precision.
SUMMED = 1024
# The first iterate comes from the entries with z above one of these (Eq. 26), whichever is better: about where rows that are
# normally distributed have the entries that matter; in short lists alpha is small, in long ones large.
STARTS_OF_LISTS = (-0.55, -0.35)
STARTS_OF_ROWS = (-0.32, -0.18)

# Minimax polynomials on [sqrt(1/2) - 1, sqrt(2) - 1] and [-1/2, 1/2], highest power first, fitted by Remez's algorithm;
# tests/test_numba.py measures their errors.
LN_SINGLE = (
    0.0892738476395607,
    -0.1434476375579834,
    0.14871077239513397,
    -0.1656622588634491,
    0.19966071844100952,
    -0.25001731514930725,
    0.3333383798599243,
)  # (ln(1+f) - f + f^2/2) / f^3
LN_DOUBLE = (
    0.13087952782511061,
    0.13268637477942022,
    0.1538624515244538,
    0.18181795531586203,
    0.2222222239282366,
    0.28571428570798213,
    0.40000000000000885,
    0.6666666666666666,
)  # (ln(1+f) - 2s) / s^3 in s^2, where s = f / (2 + f)
EXP2_SINGLE = (
    0.00015476277621928602,
    0.0013400234747678041,
    0.009618003852665424,
    0.055503278970718384,
    0.24022650718688965,
    0.6931471824645996,
)  # (2^f - 1) / f
EXP2_DOUBLE = (
    2.574172811494457e-11,
    4.456665824660387e-10,
    7.054888313927745e-09,
    1.0178051262926064e-07,
    1.3215486832869844e-06,
    1.5252733856102098e-05,
    0.00015403530393341358,
    0.001333355814639059,
    0.009618129107628494,
    0.0555041086648217,
    0.24022650695910072,
    0.6931471805599453,
)
PHI_SINGLE = tuple(1 / math.factorial(j) for j in range(12, 1, -1))
PHI_DOUBLE = tuple(1 / math.factorial(j) for j in range(19, 1, -1))
RECIPROCAL = (0.8612282276153564, -1.1224395036697388, 1.0195624828338623, -0.9969961643218994, 0.9997742176055908)  # 1/(1+f)


def ln_1p(f):
    """ln(1 + f) for f between sqrt(1/2) - 1 and sqrt(2) - 1."""


@overload(ln_1p)
def _ln_1p(f):
    if f.element == types.float32:
        return lambda f: f + f * f * (f * horner(f, LN_SINGLE) - 0.5)

    def double(f):
        s = f / (f + 2.0)
        square = s * s
        return 2.0 * s + s * square * horner(square, LN_DOUBLE)

    return double


def exp2_m1(f):
    """2^f - 1 for f between -1/2 and 1/2."""


@overload(exp2_m1)
def _exp2_m1(f):
    if f.element == types.float32:
        return lambda f: f * horner(f, EXP2_SINGLE)
    return lambda f: f * horner(f, EXP2_DOUBLE)


def lowest_exponent(y):
    """The least y with 2^y a normal number."""


@overload(lowest_exponent)
def _lowest_exponent(y):
    lowest = -126.0 if y.element == types.float32 else -1022.0
    return lambda y: lowest


@register_jitable
def exp2(y):
    """2^y for y <= 0.5; below the normal numbers the least of them."""
    y = larger(y, lowest_exponent(y))
    i, shifted = round_shifted(y)
    return times_power(exp2_m1(y - i) + 1.0, shifted)


@register_jitable
def exp_m1(x):
    """e^x - 1 for x <= 0, with all digits near 0."""
    x = larger(x, lowest_exponent(x) * LN_2)
    i, scale = nearest_integer(x * LOG2_E)
    return (scale - 1.0) + scale * exp2_m1(x * LOG2_E - i)  # fused, so x log2(e) is not rounded


@register_jitable
def ln(a):
    """ln a for a > 0."""
    j, scale = split_exponent(a)
    return j * LN_2 + ln_1p(a * scale - 1.0)


@register_jitable
def power(w, k, k_log2):
    """[1 + w]^k, 0 for w <= -1, and about 1 / (1 + w), to 0.03 %."""
    inside = larger(w, -1.0)
    j, scale = split_exponent(larger(inside + 1.0, TINY))
    f = inside * scale + (scale - 1.0)
    y = k_log2 * ln_1p(f) + k * j
    return select(w > -1.0, exp2(y), 0.0), scale * horner(f, RECIPROCAL)


def refined(about, u):
    """1 / u by Newton's method from something within 0.03 % of it."""


@overload(refined)
def _refined(about, u):
    if u.element == types.float32:
        return lambda about, u: about * (2.0 - about * u)

    def double(about, u):
        about = about * (2.0 - about * u)
        return about * (2.0 - about * u)

    return double


@register_jitable
def integer_power(u, k):
    """u^(k - 2) for k = 2, 3, 4, 5 or 10."""
    if k == 2:
        return select(u > 0.0, u * 0.0 + 1.0, 0.0)
    if k == 3:
        return u
    square = u * u
    if k == 4:
        return square
    if k == 5:
        return square * u
    fourth = square * square
    return fourth * fourth


@register_jitable
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


@register_jitable
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


@overload(tolerance)
def _tolerance(array):
    bound = float(np.finfo(np.float64).eps if array.dtype == types.float64 else 4 * np.finfo(np.float32).eps)
    return lambda array: bound


def reach(array):
    """Up to this S the series of `shift` is long enough for the dtype."""


@overload(reach)
def _reach(array):
    bound = 1.01 if array.dtype == types.float64 else 2.2
    return lambda array: bound


def nudged(array):
    """Up to this |S - 1| the last step's second order is enough for the dtype."""


@overload(nudged)
def _nudged(array):
    bound = 1e-7 if array.dtype == types.float64 else 2e-3
    return lambda array: bound


def places(array):
    """How many elements of the array a vector holds."""


@overload(places)
def _places(array):
    width = BYTES // (8 if array.dtype == types.float64 else 4)
    return lambda array: width


@register_jitable
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


@register_jitable
def bound_of(count, sum_z, e):
    """Lower bound of delta from the number and the sum of any entries (Eq. 26). The sum is rounded: take a little less."""
    count = larger(count, 1.0)
    return sum_z / count * (1.0 + 2.0**-10) - exp_m1(0.0 - e * ln(count))


@register_jitable
def first_bounds(tallies, e):
    """Lower and upper bound of delta from the tallies. The upper one is 1 - c^-e with e taken as 1."""
    count, count_1, sum_1, count_2, sum_2 = tallies
    high = 1.0 - 1.0 / larger(count, 1.0)
    low = larger(bound_of(count_1, sum_1, e), bound_of(count_2, sum_2, e))
    return smaller(larger(low, 0.0), high), high


@register_jitable
def nudge(weight, reciprocal, d, k):
    """weight (1 - d reciprocal)^k to the second order in d (Eq. 29)."""
    y = reciprocal * (k * d)
    return select(weight > 0.0, weight * ((y * (0.5 - 0.5 / k) - 1.0) * y + 1.0), 0.0)


@register_jitable
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
    plain = near = delta < -1.0
    enough = larger(smaller(exp2(e * math.log2(tolerance(z) / 2.0)), 400.0 * tolerance(z)), tolerance(z))
    step = 0
    while True:
        s0, s1, s2 = sweep(z, p, 0, longest * width, width, delta, k, k_log2, integer, (zero, zero, zero))
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
    for i in range(0, longest * width, width):
        weight = nudge(load(p, i), 1.0 / larger(load(z, i) - delta + 1.0, TINY), d, k)
        store(p, i, weight)
        s0 = s0 + weight
    return delta + d, s0


@register_jitable
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


@register_jitable
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


@register_jitable
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
            live = (y < 1.0) & (weight > 0.0)  # elsewhere r means nothing, and may have become infinite
            shifted = select(live, weight + weight * change, 0.0)
            store(p, i, shifted)
            part, slopes = part + shifted, slopes + select(live, shifted * reciprocal, 0.0)
        s, slope = s + total(part), slope + total(slopes)
    return s, slope


@register_jitable
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


@register_jitable
def first_aligned(array, beside):
    """Index of the first element at a line of the cache a quarter of a page behind one that `beside` may have (see `apart`).

    A vector that starts there lies in one line.
    """
    return ((beside // BYTES + 16) * BYTES - array.ctypes.data) % PAGE // array.itemsize


# one row: its maximum, its candidates, its output


@register_jitable
def top_of(x, n):
    """The largest entry, and whether one is NaN."""
    width = places(x)
    top = get(x, 0)
    bad = top != top
    if n < width:
        for i in range(1, n):
            value = get(x, i)
            bad |= value != value
            top = value if value > top else top
        return top, bad
    first = load(x, n - width)
    second = first
    nan = is_nan(first)
    for i in range(0, n - 2 * width + 1, 2 * width):
        a, b = load(x, i), load(x, i + width)
        first, second = larger(a, first), larger(b, second)
        nan = nan | is_nan(a) | is_nan(b)
    rest = load(x, max(n - 2 * width, 0))
    first, nan = larger(rest, first), nan | is_nan(rest)
    return maximum(larger(first, second)), bits(nan) != 0


@register_jitable
def listed(x, n, top, e, z, index, lane):
    """Append the row's candidates to the lane of z, and their positions to index; returns their number, -1 if too many."""
    width = places(z)
    count = 0
    at = 0
    while at < n:
        word = 0
        covered = 4 * width
        if at + covered <= n:
            for part in range(4):
                word |= bits((load(x, at + part * width) - top) * e > -1.0) << (part * width)
            if (count + count_bits(word)) * n > 4 * LISTED * (at + covered) and n > LISTED:
                return -1  # at this rate there will be far too many
        elif at + width <= n:
            covered = width
            word = bits((load(x, at) - top) * e > -1.0)
        else:
            covered = n - at
            for place in range(covered):
                word |= int((get(x, at + place) - top) * e > -1.0) << place
        if count + count_bits(word) > LISTED:
            return -1
        while word != 0:
            position = at + lowest_bit(word)
            z[count * width + lane] = (get(x, position) - top) * e
            index[lane * LISTED + count] = position
            count += 1
            word &= word - 1
        at += covered
    return count


@register_jitable
def scaled(x, n, top, e, z):
    """Write the row's z, padded to whole vectors; returns its tallies."""
    width = places(z)
    padded = (n + width - 1) // width * width
    store(z, padded - width, splat(z, DEAD))
    whole = n // width * width
    for i in range(whole, n):
        value = (get(x, i) - top) * e
        z[i] = value if value > DEAD else DEAD
    zero = splat(z, 0.0)
    tallies = (zero, zero, zero, zero, zero)
    for i in range(0, whole, width):
        v = larger((load(x, i) - top) * e, DEAD)
        store(z, i, v)
        tallies = tally(v, tallies, STARTS_OF_ROWS)
    if whole < n:
        tallies = tally(load(z, whole), tallies, STARTS_OF_ROWS)
    c, c1, s1, c2, s2 = tallies
    return total(c), total(c1), total(s1), total(c2), total(s2)


@register_jitable
def compacted(z, n, index):
    """Move the candidates of z to its front, padded to whole vectors, and their positions to index; returns their number."""
    width = places(z)
    count = 0
    for at in range(0, n, width):
        word = bits(load(z, at) > -1.0)
        while word != 0:
            position = at + lowest_bit(word)
            z[count] = z[position]
            index[count] = position
            count += 1
            word &= word - 1
    for i in range(count, (count + width - 1) // width * width):
        z[i] = DEAD
    return count


@register_jitable
def fill(row, n, value, z):
    """row[:n] = value."""
    width = places(z)
    v = splat(z, value)
    whole = n // width * width
    for i in range(0, whole, width):
        store(row, i, v)
    for i in range(whole, n):
        put(row, i, value)


@register_jitable
def write(row, n, p, factor):
    """row[:n] = p * factor."""
    width = places(p)
    whole = n // width * width
    for i in range(0, whole, width):
        store(row, i, load(p, i) * factor)
    for i in range(whole, n):
        put(row, i, p[i] * factor)


@register_jitable
def write_nudged(row, n, p, r, d, k):
    """row[:n] = p (1 - d r)^k for a d that changes no weight by more than a thousandth."""
    width = places(p)
    whole = n // width * width
    for i in range(0, whole, width):
        store(row, i, nudge(load(p, i), load(r, i), d, k))
    if whole < n:
        store(p, whole, nudge(load(p, whole), load(r, whole), d, k))
    for i in range(whole, n):
        put(row, i, p[i])


@register_jitable
def row_alone(x, p, n, top, e, integer, steps, normalise, z, weights, reciprocals, index):
    """Solve and write a row that has too many candidates for a group; returns delta."""
    tallies = scaled(x, n, top, e, z)
    width = places(z)
    dense = tallies[0] > n * SPARSE_SHARE
    kept = n if dense else compacted(z, n, index)
    length = (kept + width - 1) // width * width
    delta, s, d = solve_alone(z, weights, reciprocals, length, tallies, e, integer, steps)
    factor = 1.0 / s if normalise else 1.0
    if dense and d != 0.0:
        write_nudged(p, n, weights, reciprocals, d, 1.0 / e)
    elif dense:
        write(p, n, weights, factor)
    else:
        if d != 0.0:
            write_nudged(weights, length, weights, reciprocals, d, 1.0 / e)
        fill(p, n, 0.0, z)
        for i in range(kept):
            put(p, index[i], weights[i] * factor)
    return delta


# backward


@register_jitable
def power_of_two(j, log_f, factor):
    """2^(factor (j + log_f / ln 2)) for a result below 1. The exponent is fused, so that only its fraction is rounded."""
    by_log = factor * LOG2_E
    rounded = log_f * by_log + j * factor
    i, shifted = round_shifted(larger(rounded, lowest_exponent(log_f)))
    return times_power(exp2_m1(larger(log_f * by_log + (j * factor - i), -0.5)) + 1.0, shifted)


@register_jitable
def slopes_from_weights(weights, e):
    """s = p^alpha, and ln p as j and log_f with ln p = j ln 2 + log_f; where p is 0, s is 0 and ln p finite."""
    normal = larger(weights, smallest_normal(weights))
    j, scale = split_exponent(normal)
    log_f = ln_1p(normal * scale - 1.0)
    return select(weights > 0.0, power_of_two(j, log_f, 1.0 - e), 0.0), j, log_f


def smallest_normal(v):
    """The least positive number that is not subnormal."""


@overload(smallest_normal)
def _smallest_normal(v):
    least = float(np.finfo(np.float32 if v.element == types.float32 else np.float64).tiny)
    return lambda v: least


@register_jitable
def slopes_from_scores(w, e, k):
    """s, p, and ln p as `slopes_from_weights`, from w = z - delta, for weights that p's own dtype has flushed to zero."""
    inside = larger(w, -1.0)
    j, scale = split_exponent(larger(inside + 1.0, TINY))
    j, log_f = j * k, ln_1p(inside * scale + (scale - 1.0)) * k
    live = w > -1.0
    return (
        select(live, power_of_two(j, log_f, 1.0 - e), 0.0),
        select(live, power_of_two(j, log_f, e * 0.0 + 1.0), 0.0),
        j,
        log_f,
    )


def phi_series(v):
    """(exp(v) - 1 - v) / v^2 for 0 <= v <= 1."""


@overload(phi_series)
def _phi_series(v):
    if v.element == types.float32:
        return lambda v: horner(v, PHI_SINGLE)
    return lambda v: horner(v, PHI_DOUBLE)


@register_jitable
def alpha_weight(p, j, log_f, e):
    """w = p phi(ln p) (Eq. 6): a series where v = -e ln p is small, so that no digit is lost as alpha -> 1."""
    log_p = j * LN_2 + log_f
    v = 0.0 - log_p * e
    i, scale = nearest_integer(0.0 - v * LOG2_E)
    exp_v = (1.0 + exp2_m1((i - j * e) - log_f * (e * LOG2_E))) / scale
    far = (exp_v - 1.0 - v) / (e * e)
    return p * select(v < 1.0, log_p * log_p * phi_series(smaller(v, 1.0)), far)


@register_jitable
def slope_sums(p, g, s, start, stop, e, square_roots):
    """Write s for the vectors from start to stop; returns the sums of s and s g, lane by lane."""
    width = places(s)
    zero = splat(s, 0.0)
    sums, products = zero, zero
    for i in range(start, stop, width):
        weights = load(p, i)
        slopes = zero
        if bits(weights > 0.0) != 0:
            slopes = square_root(weights) if square_roots else slopes_from_weights(weights, e)[0]
            sums, products = sums + slopes, products + slopes * load(g, i)
        store(s, i, slopes)
    return sums, products


@register_jitable
def slope_and_alpha_sums(p, g, s, w, start, stop, e):
    """As `slope_sums`, and writes w of Eq. 6."""
    width = places(s)
    zero = splat(s, 0.0)
    sums, products = zero, zero
    for i in range(start, stop, width):
        weights = load(p, i)
        slopes = of_alpha = zero
        if bits(weights > 0.0) != 0:
            slopes, j, log_f = slopes_from_weights(weights, e)
            of_alpha = alpha_weight(weights, j, log_f, e)
            sums, products = sums + slopes, products + slopes * load(g, i)
        store(s, i, slopes)
        store(w, i, of_alpha)
    return sums, products


@register_jitable
def score_sums(x, g, s, w, start, stop, e, top, delta):
    """As `slope_and_alpha_sums`, from the scores: for weights that p's own dtype has flushed to zero."""
    width = places(s)
    sums = products = splat(s, 0.0)
    k = 1.0 / e
    for i in range(start, stop, width):
        slopes, weights, j, log_f = slopes_from_scores((load(x, i) - top) * e - delta, e, k)
        sums, products = sums + slopes, products + slopes * load(g, i)
        store(s, i, slopes)
        store(w, i, alpha_weight(weights, j, log_f, e))
    return sums, products


@register_jitable
def weights_again(x, p, s, start, stop, e, top, delta, integer, wants_alpha):
    """Write p and s for the vectors of scores from start to stop, and w of Eq. 6 over the scores if that is wanted."""
    width = places(x)
    k, zero = 1.0 / e, e * 0.0
    for i in range(start, stop, width):
        w = (load(x, i) - top) * e - delta
        slopes = weights = of_alpha = zero
        if bits(w > -1.0) != 0:
            if integer == 0:
                slopes, weights, j, log_f = slopes_from_scores(w, e, k)
                if wants_alpha:
                    of_alpha = select(w > -1.0, alpha_weight(weights, j, log_f, e), 0.0)
            else:
                inside = larger(w, -1.0)
                u = inside + 1.0
                slopes = integer_power(u, integer) * u
                weights = slopes * (u + (inside - (u - 1.0)) * k)
        store(p, i, weights)
        store(s, i, slopes)
        if wants_alpha:
            store(x, i, of_alpha)


@register_jitable
def centred(s, g, grad_x, n, mean):
    """grad_x = s (g - mean)."""
    width = places(s)
    whole = n // width * width
    for i in range(0, whole, width):
        store(grad_x, i, load(s, i) * (load(g, i) - mean))
    for i in range(whole, n):
        put(grad_x, i, s[i] * (get(g, i) - mean))


@register_jitable
def centred_sum(w, g, n, mean, rounded):
    """The sum of w (g - mean), where `rounded` is the mean in the computing dtype."""
    width = places(w)
    whole = n // width * width
    result, weight = 0.0, 0.0
    for block in range(0, whole, SUMMED):
        part = parts = splat(w, 0.0)
        for i in range(block, min(block + SUMMED, whole), width):
            v = load(w, i)
            part, parts = part + v * (load(g, i) - rounded), parts + v
        result, weight = result + total(part), weight + total(parts)
    for i in range(whole, n):
        result, weight = result + w[i] * (get(g, i) - rounded), weight + w[i]
    return result - (mean - rounded) * weight


# kernels: they are C functions of one address, where a job stands as words of 8 bytes. They return how many rows they did. Any
# number of threads may run one job: each takes the next chunk of rows that none has taken. A job that is one chunk is for one
# thread and is read only. Strides and sizes are in elements; what is not there has address 0.

# The first words of every job: the next row to take, rows done, all rows, and how many are taken at a time.
NEXT, DONE, STOP, CHUNK = range(4)
FORWARD_JOB = Struct("=15qd")  # then x, x_stride, p, m, delta, e, e_stride, n, integer, steps, normalise, e_value
BACKWARD_JOB = Struct(
    "=17qd"
)  # then grad, its stride, p, its stride, x, its stride, m, delta, grad_x, grad_e, e, e_stride, n, e_value
AGAIN_JOB = Struct("=14qd")  # then scores, p, s, m, delta, e, e_stride, n, integer, wants_alpha, e_value
KERNEL = types.int64(types.intp)


@register_jitable
def apart(size, width):
    """At least `size`, so that arrays which follow each other at this distance do not share the low bits of their addresses.

    A processor takes a load for one of what it has just stored where the last twelve bits are those, and waits.
    """
    page = PAGE // BYTES * width
    return (size + page - 1) // page * page + page // 3 // width * width


@register_jitable
def next_chunk(words):
    """The first row of a chunk that no other thread does; past the last row if there is none."""
    return fetch_add(words, NEXT, words[CHUNK])


@register_jitable
def keep(at, row, value, computing):
    """Write a number of a row, if there is somewhere to."""
    if at != 0:
        array_at(at, row + 1, computing)[row] = value


def _forward(dtype, computing):
    """The forward kernel for scores whose bits are `dtype` (see simd.py), computed in `computing`."""
    itemsize, line = np.dtype(dtype).itemsize, BYTES // np.dtype(computing).itemsize

    def forward(job):
        words, numbers = array_at(job, 16, np.int64), array_at(job, 16, np.float64)
        stop, chunk = words[STOP], words[CHUNK]
        x_at, x_stride, p_at, m_at, delta_at, e_at, e_stride, n = (
            *(words[4], words[5], words[6], words[7]),
            *(words[8], words[9], words[10], words[11]),
        )
        integer, steps, normalise, e_value = words[12], words[13], words[14] != 0, numbers[15]
        e_rows = array_at(e_at, stop, computing)
        width = line
        long = apart(n + width, width) if n > LISTED else 0
        lists = min(n, LISTED) * width
        memory = np.empty(2 * lists + 3 * long + 4 * width + PAGE // itemsize, computing)
        scratch = memory[first_aligned(memory, x_at) :]
        acc = scratch[:width]
        lane_count, lane_e, lane_delta, lane_factor = acc, scratch[width:], scratch[2 * width :], scratch[3 * width :]
        z, weights = scratch[4 * width :], scratch[4 * width + lists :]
        long_z = scratch[4 * width + 2 * lists :]
        long_weights, long_reciprocals = long_z[long:], long_z[2 * long :]
        indices = np.empty(LISTED * width + long // 2, np.int32)
        index, long_index = indices[: LISTED * width], indices[LISTED * width :]
        shared = chunk < stop
        done, start = 0, next_chunk(words) if shared else 0
        while start < stop:
            end = min(start + chunk, stop)
            for base in range(start, end, width):
                rows = min(width, end - base)
                longest = 0
                fill(z, lists, DEAD, acc)
                fill(lane_count, width, 0.0, acc)
                fill(lane_e, width, 0.5, acc)
                for lane in range(rows):
                    row = base + lane
                    x = array_at(x_at + row * x_stride * itemsize, n, dtype)
                    p = array_at(p_at + row * n * itemsize, n, dtype)
                    e = e_rows[row * e_stride] if e_at != 0 else computing(e_value)
                    top, bad = top_of(x, n)
                    if bad or top == math.inf or not 0.0 <= e <= 1.0:
                        keep(m_at, row, math.nan if bad else top, computing)
                        keep(delta_at, row, math.nan, computing)
                        fill(p, n, math.nan, acc)
                        continue
                    keep(m_at, row, top, computing)
                    if top == -math.inf:
                        keep(delta_at, row, 0.0, computing)
                        fill(p, n, 0.0, acc)
                        continue
                    e = max(e, computing(MIN_E))
                    lane_e[lane] = e
                    count = listed(x, n, top, e, z, index, lane)
                    if count < 0:
                        delta = row_alone(
                            x, p, n, top, e, integer, steps, normalise, long_z, long_weights, long_reciprocals, long_index
                        )
                        keep(delta_at, row, delta, computing)
                    else:
                        lane_count[lane] = count
                        longest = max(longest, count)
                if longest == 0:
                    continue
                deltas, sums = solve_group(z, weights, longest, load(lane_count, 0), load(lane_e, 0), integer, steps)
                store(lane_delta, 0, deltas)
                store(lane_factor, 0, 1.0 / sums if normalise else sums * 0.0 + 1.0)
                for lane in range(rows):
                    count = int(lane_count[lane])
                    if count == 0:
                        continue
                    row = base + lane
                    keep(delta_at, row, lane_delta[lane], computing)
                    p = array_at(p_at + row * n * itemsize, n, dtype)
                    fill(p, n, 0.0, acc)
                    for i in range(count):
                        put(p, index[lane * LISTED + i], weights[i * width + lane] * lane_factor[lane])
            done += end - start
            start = next_chunk(words) if shared else stop
        if shared:
            fetch_add(words, DONE, done)
        return done

    return forward


def _backward(dtype, computing):
    """The backward kernel."""
    itemsize, line = np.dtype(dtype).itemsize, BYTES // np.dtype(computing).itemsize

    def backward(job):
        words, numbers = array_at(job, 18, np.int64), array_at(job, 18, np.float64)
        stop, chunk = words[STOP], words[CHUNK]
        grad_at, grad_stride, p_at, p_stride, x_at, x_stride = words[4], words[5], words[6], words[7], words[8], words[9]
        m_at, delta_at, grad_x_at, grad_e_at = words[10], words[11], words[12], words[13]
        e_at, e_stride, n, e_value = words[14], words[15], words[16], numbers[17]
        m, delta, e_rows = array_at(m_at, stop, computing), array_at(delta_at, stop, computing), array_at(e_at, stop, computing)
        width = line
        wants_alpha, from_scores = grad_e_at != 0, x_at != 0
        padded = (n + width - 1) // width * width
        second = padded if wants_alpha or from_scores else 0
        memory = np.empty(padded + second + 2 * width + PAGE // itemsize, computing)
        scratch = memory[first_aligned(memory, p_at) :]
        last, last_g = scratch[:width], scratch[width:]
        acc, s, w = last, scratch[2 * width :], scratch[2 * width + (padded if second else 0) :]
        whole = n // width * width
        square_roots = e_at == 0 and e_value == 0.5
        shared = chunk < stop
        done, start = 0, next_chunk(words) if shared else 0
        while start < stop:
            end = min(start + chunk, stop)
            for row in range(start, end):
                p, g = (
                    array_at(p_at + row * p_stride * itemsize, n, dtype),
                    array_at(grad_at + row * grad_stride * itemsize, n, dtype),
                )
                x = array_at(x_at + row * x_stride * itemsize, n, dtype)
                grad_x = array_at(grad_x_at + row * n * itemsize, n, dtype)
                if get(p, 0) != get(p, 0) or m[row] == -math.inf:  # rows are NaN as a whole; fully masked ones are 0
                    lost = math.nan if m[row] != -math.inf else 0.0
                    fill(grad_x, n, lost, acc)
                    keep(grad_e_at, row, lost, computing)
                    continue
                e = splat(acc, max(e_rows[row * e_stride] if e_at != 0 else computing(e_value), computing(MIN_E)))
                sum_s, sum_sg = 0.0, 0.0
                for block in range(0, n, SUMMED):
                    stop_at = min(block + SUMMED, whole)
                    if from_scores:
                        sums, products = score_sums(x, g, s, w, block, stop_at, e, m[row], delta[row])
                    elif wants_alpha:
                        sums, products = slope_and_alpha_sums(p, g, s, w, block, stop_at, e)
                    else:
                        sums, products = slope_sums(p, g, s, block, stop_at, e, square_roots)
                    sum_s, sum_sg = sum_s + total(sums), sum_sg + total(products)
                if whole < n:
                    source, beyond = (x, -math.inf) if from_scores else (p, 0.0)
                    for place in range(width):
                        inside = whole + place < n
                        last[place] = get(source, whole + place) if inside else beyond
                        last_g[place] = get(g, whole + place) if inside else 0.0
                    end_s, end_w = s[whole:], w[whole:]
                    if from_scores:
                        sums, products = score_sums(last, last_g, end_s, end_w, 0, width, e, m[row], delta[row])
                    elif wants_alpha:
                        sums, products = slope_and_alpha_sums(last, last_g, end_s, end_w, 0, width, e)
                    else:
                        sums, products = slope_sums(last, last_g, end_s, 0, width, e, square_roots)
                    sum_s, sum_sg = sum_s + total(sums), sum_sg + total(products)
                mean = sum_sg / sum_s if sum_s != 0.0 else 0.0
                centred(s, g, grad_x, n, computing(mean))
                if wants_alpha:
                    keep(grad_e_at, row, -centred_sum(w, g, n, mean, computing(mean)), computing)
            done += end - start
            start = next_chunk(words) if shared else stop
        if shared:
            fetch_add(words, DONE, done)
        return done

    return backward


def _again(dtype, computing):
    """The kernel that computes the weights and their slopes once more, from the scores and what solved them."""
    itemsize, width = np.dtype(dtype).itemsize, BYTES // np.dtype(computing).itemsize

    def again(job):
        words, numbers = array_at(job, 15, np.int64), array_at(job, 15, np.float64)
        stop, chunk = words[STOP], words[CHUNK]
        x_at, p_at, s_at, m_at, delta_at, e_at, e_stride = words[4], words[5], words[6], words[7], words[8], words[9], words[10]
        n, integer, wants_alpha, e_value = words[11], words[12], words[13] != 0, numbers[14]
        m, delta, e_rows = array_at(m_at, stop, computing), array_at(delta_at, stop, computing), array_at(e_at, stop, computing)
        scratch = np.empty(3 * width, computing)
        last, last_p, last_s = scratch[:width], scratch[width:], scratch[2 * width :]
        whole = n // width * width
        shared = chunk < stop
        done, start = 0, next_chunk(words) if shared else 0
        while start < stop:
            end = min(start + chunk, stop)
            for row in range(start, end):
                x, p, s = (
                    array_at(x_at + row * n * itemsize, n, dtype),
                    array_at(p_at + row * n * itemsize, n, dtype),
                    array_at(s_at + row * n * itemsize, n, dtype),
                )
                if delta[row] != delta[row]:
                    fill(p, n, math.nan, last)
                    fill(s, n, math.nan, last)
                    if wants_alpha:
                        fill(x, n, math.nan, last)
                    continue
                top = m[row] if m[row] != -math.inf else computing(0.0)
                e = splat(last, max(e_rows[row * e_stride] if e_at != 0 else computing(e_value), computing(MIN_E)))
                weights_again(x, p, s, 0, whole, e, top, delta[row], integer, wants_alpha)
                if whole < n:
                    for place in range(width):
                        last[place] = x[whole + place] if whole + place < n else -math.inf
                    weights_again(last, last_p, last_s, 0, width, e, top, delta[row], integer, wants_alpha)
                    for place in range(n - whole):
                        p[whole + place], s[whole + place] = last_p[place], last_s[place]
                        if wants_alpha:
                            x[whole + place] = last[place]
            done += end - start
            start = next_chunk(words) if shared else stop
        if shared:
            fetch_add(words, DONE, done)
        return done

    return again


# dtype -> what its bits are stored as, and what one computes in
_STORED = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.uint16, np.float32),
    torch.float16: (np.int16, np.float32),
}


@functools.cache
def compiled(name: str, dtype: torch.dtype) -> CFunc:
    """The kernel "forward", "backward" or "again" for a dtype, compiled now or read from the cache on disk."""
    make = {"forward": _forward, "backward": _backward, "again": _again}[name]
    kernel: CFunc = compile_cached(cfunc, KERNEL, error_model="numpy", function=make(*_STORED[dtype]))
    return kernel
