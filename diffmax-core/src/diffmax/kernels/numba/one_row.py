"""One row: its maximum, its candidates, its output, and its solution where it has too many candidates for a group."""

from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.simd import (
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
    splat,
    store,
    total,
    transpose_square,
)
from diffmax.kernels.numba.solver import STARTS_OF_ROWS, nudge, solve_alone, tally

DEAD = -2.0  # z of an entry that weighs nothing

# Entries of the longest list that joins a group. A group's lists then take half of a cache of 32 KiB.
LISTED = 128
# A longer row is solved on its candidates alone where they are this share of it or less.
SPARSE_SHARE = 0.5


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
    count = 0
    for i in range(0, n, places(x)):
        count += count_bits(bits((load(x, i) - top) * e > -1.0))
    return count


@jitable
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


@jitable
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


@jitable
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
