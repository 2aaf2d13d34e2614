"""One row: its maximum, candidates, output, and its solution where it has too many for a group. And groups of short rows."""

import math

from diffmax.kernels.numba.functions import TINY, WHOLE, inverse
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.simd import (
    append,
    bits,
    count_bits,
    get,
    is_nan,
    larger,
    load,
    lowest_bit,
    maximum,
    places,
    put,
    select,
    splat,
    store,
    total,
    transpose_square,
)
from diffmax.kernels.numba.solver import LISTED, START_OF_ROWS, nudge, solve_alone, tally

DEAD = -2.0  # z of an entry that weighs nothing

# Longer rows, up to this, are collected and solved whole in groups if more than this share of their entries are candidates and
# 1 / (1 - alpha) is an integer, whose powers are products. That is found out of each row alone, so that its bits do not depend
# on its neighbours.
GROUPED, GROUPED_SHARE = 256, 0.4
# A group of short rows is solved whole unless its longest list, expected to hold LONGEST times what one row has, leaves out
# more entries than EMPTY: the second where 1 / (1 - alpha) is an integer, whose powers are products.
LONGEST, EMPTY = 1.5, (12, 44)
# So many candidates of four vectors are listed one by one.
FEW = 2
# A longer row is solved on its candidates alone where they are this share of it or less; the second where 1 / (1 - alpha) is an
# integer.
SPARSE_SHARES = 0.7, 0.5


@jitable
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


@jitable
def candidates(x, n, top, e):
    """How many scores of a row have z > -1."""
    counts, one = splat(x, 0.0), splat(x, 1.0)
    for i in range(0, n, places(x)):
        counts = counts + select((load(x, i) - top) * e > -1.0, one, 0.0)
    return int(total(counts))


@jitable
def candidate_share(x, n, top, e):
    """The share of candidates in a row of a vector or more, about: the end that fills no vector is left out."""
    whole = n // places(x) * places(x)
    return candidates(x, whole, top, e) / whole


@jitable
def sparse_share(integer):
    """The share of a row that its candidates may be, so that it is solved on them alone."""
    return SPARSE_SHARES[1] if 0 < integer <= WHOLE else SPARSE_SHARES[0]


@jitable
def listed(x, n, top, e, z, index, share):
    """Write z of a row's candidates side by side, filled up to whole vectors, and their positions to index; returns how many.

    -1 if they are more than a list holds and than this share of the row: where its begin suggests that, the rest is counted.
    """
    width = places(x)
    most = max(LISTED, share * n)
    count = 0
    at = 0
    counted = False
    while at < n:
        covered, word, few = 4 * width, 0, False
        if at + covered <= n:
            for part in range(4):
                word |= bits((load(x, at + part * width) - top) * e > -1.0) << (part * width)
            few = count_bits(word) <= FEW
        else:
            covered = min(width, n - at)
        if few:
            while word != 0:
                position = at + lowest_bit(word)
                z[count] = (get(x, position) - top) * e
                index[count] = position
                count += 1
                word &= word - 1
        elif covered < width:
            for position in range(at, n):
                value = (get(x, position) - top) * e
                if value > -1.0:
                    z[count] = value
                    index[count] = position
                    count += 1
        else:
            so_far = count + count_bits(word)
            if n > LISTED and not counted and so_far > share * (at + covered) + 0.125 * covered:
                counted = True
                so_far += candidates(x[at + covered :], (n - at - covered) // width * width, top, e)
                if so_far > most:
                    return -1
            for i in range(at, at + covered, width):
                v = (load(x, i) - top) * e
                count = append(z, index, count, v, v > -1.0, i)
        at += covered
    if count > most:
        return -1
    store(z, count, splat(z, DEAD))
    return count


@jitable
def join(count, z, index, lists, positions, lane):
    """Copy a row's candidates into the lane of the lists of a group, and their positions into those of the lane."""
    width = places(lists)
    for i in range(count):
        lists[i * width + lane] = z[i]
        positions[lane * LISTED + i] = index[i]


@jitable
def tallied(z, length, e):
    """The number of candidates, and the tallies, of scores that stand side by side; their z are at most 0."""
    count = splat(z, 0.0)
    tallies = (count, count, count)
    start = max(START_OF_ROWS[0] * math.sqrt(e), START_OF_ROWS[1])
    for i in range(0, length, places(z)):
        count, tallies = tallied_with(load(z, i), count, tallies, start)
    return totals(count, tallies)


@jitable
def tallied_with(v, count, tallies, start):
    """With the entries v."""
    return count + select(v > -1.0, v * 0.0 + 1.0, 0.0), tally(v, tallies, start)


@jitable
def totals(count, tallies):
    """Those of a row from those of the places of its vectors."""
    return total(count), total(tallies[0]), total(tallies[1]), total(tallies[2])


@jitable
def side_by_side(rows, step, n, z, top, e):
    """Transpose as many rows as a vector has places, `step` apart, of n entries, and write z of each: one row per place."""
    width = places(z)
    for i in range(0, n, width):
        transpose_square(rows, i, step, z, i * width, width)
    for i in range(0, n * width, width):
        store(z, i, larger((load(z, i) - top) * e, DEAD))


@jitable
def one_by_one(weights, rows, step, n, factor):
    """The reverse for weights, which are multiplied by a factor for each row and given up."""
    width = places(weights)
    for i in range(0, n * width, width):
        store(weights, i, load(weights, i) * factor)
    for i in range(0, n, width):
        transpose_square(weights, i * width, width, rows, i, step)


@jitable
def scaled(x, n, top, e, z):
    """Write the row's z, padded to whole vectors; returns what `tallied` does."""
    width = places(z)
    padded = (n + width - 1) // width * width
    store(z, padded - width, splat(z, DEAD))
    whole = n // width * width
    for i in range(whole, n):
        value = (get(x, i) - top) * e
        z[i] = value if value > DEAD else DEAD
    count = splat(z, 0.0)
    tallies = (count, count, count)
    start = max(START_OF_ROWS[0] * math.sqrt(e), START_OF_ROWS[1])
    for i in range(0, whole, width):
        v = larger((load(x, i) - top) * e, DEAD)
        store(z, i, v)
        count, tallies = tallied_with(v, count, tallies, start)
    if whole < n:
        count, tallies = tallied_with(load(z, whole), count, tallies, start)
    return totals(count, tallies)


@jitable
def fill(row, n, value, z):
    """row[:n] = value."""
    width = places(z)
    v = splat(z, value)
    whole = n // width * width
    for i in range(0, whole, width):
        store(row, i, v)
    for i in range(whole, n):
        put(row, i, value)


@jitable
def write(row, n, p, factor):
    """row[:n] = p * factor."""
    width = places(p)
    whole = n // width * width
    for i in range(0, whole, width):
        store(row, i, load(p, i) * factor)
    if 0 < whole < n and row.ctypes.data != p.ctypes.data:  # the last vector ends with the row
        store(row, n - width, load(p, n - width) * factor)
    else:
        for i in range(whole, n):
            put(row, i, p[i] * factor)


@jitable
def write_nudged(row, n, p, z, delta, d, k):
    """row[:n] = p (1 - d / (z - t))^k for a d, the last part of `delta`, that changes no weight by more than a thousandth."""
    width, before = places(p), splat(z, delta - d)
    whole = n // width * width
    for i in range(0, whole, width):
        store(row, i, nudge(load(p, i), inverse(larger(load(z, i) - before + 1.0, TINY)), d, k))
    if whole < n:
        store(p, whole, nudge(load(p, whole), inverse(larger(load(z, whole) - before + 1.0, TINY)), d, k))
    for i in range(whole, n):
        put(row, i, p[i])


@jitable
def row_alone(x, p, n, count, top, e, integer, steps, normalise, z, weights, other, index):
    """Solve and write a row by itself, on the `count` candidates that `listed` left, or whole if that is -1; returns delta."""
    width = places(z)
    dense = count < 0
    length = ((n if dense else count) + width - 1) // width * width
    tallies = scaled(x, n, top, e, z) if dense else tallied(z, length, e)
    delta, s, d = solve_alone(z, weights, other, length, tallies, e, integer, steps)
    factor = 1.0 / s if normalise else 1.0
    if dense and d != 0.0:
        write_nudged(p, n, weights, z, delta, d, 1.0 / e)
    elif dense:
        write(p, n, weights, factor)
    else:
        if d != 0.0:
            write_nudged(weights, length, weights, z, delta, d, 1.0 / e)
        fill(p, n, 0.0, z)
        for i in range(count):
            put(p, index[i], weights[i] * factor)
    return delta


@jitable
def stand(x, x_step, n, z, count, e, top, least_e):
    """Write z of as many rows as a vector has places side by side; False if one of them is spoilt.

    `e` holds that of each row, and gets the one to compute with; `count` gets the numbers of candidates, `top` the maxima.
    """
    width = places(z)
    for i in range(0, n, width):
        first = min(i, n - width)  # the last square may repeat some of the one before
        transpose_square(x, first, x_step, z, first * width, width)
    highest, exponents = load(z, 0), load(e, 0)
    spoilt = is_nan(highest)
    for i in range(width, n * width, width):
        v = load(z, i)
        highest, spoilt = larger(v, highest), spoilt | is_nan(v)
    fine = (highest > -math.inf) & (highest < math.inf) & (0.0 - exponents <= 0.0) & (exponents <= 1.0)
    if bits(spoilt) != 0 or bits(fine) != (1 << width) - 1:
        return False
    exponents = larger(exponents, least_e)
    counts, one = splat(z, 0.0), splat(z, 1.0)
    for i in range(0, n * width, width):
        v = larger((load(z, i) - highest) * exponents, DEAD)
        counts = counts + select(v > -1.0, one, 0.0)
        store(z, i, v)
    store(count, 0, counts)
    store(e, 0, exponents)
    store(top, 0, highest)
    return True


@jitable
def write_each(weights, factor, p, n):
    """Write the rows whose weights stand side by side; the weights are multiplied by a factor for each row and given up."""
    width = places(weights)
    for i in range(0, n * width, width):
        store(weights, i, load(weights, i) * factor)
    for i in range(0, n, width):
        first = min(i, n - width)
        transpose_square(weights, first * width, width, p, first, n)


@jitable
def copy(to, source, n):
    """to[:n] = source[:n], of the same dtype."""
    for i in range(n):
        to[i] = source[i]
