"""A row of threshold attention, compiled: from scaled products to weights relu(u - theta)^p. Forward and backward share it."""

import math

from diffmax.kernels.numba.attention_words import Word, floats, hide, integer_of, whole_numbers
from diffmax.kernels.numba.functions import LOG2_E, exp2, lowest_exponent
from diffmax.kernels.numba.one_row import fill, listed, row_alone, sparse_share, top_of
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.products import DEPTH
from diffmax.kernels.numba.simd import (
    array_at,
    bits,
    count_bits,
    is_nan,
    load,
    lowest_bit,
    places,
    select,
    size_of,
    splat,
    store,
    total,
)

# Keys of a block: products leave out those in which no row of a tile of queries has a weight.
BLOCK = DEPTH
SCORES, SOFTMAX, DIFFMAX = range(3)
"""What thresholds are subtracted from: values of `Word.weighing`."""


@jitable
def theta_of(words, here, r, computing):
    """The threshold of a row."""
    row = here.query_at + here.first + r
    at = here.batch * words[Word.theta_batch] + here.head * words[Word.theta_head] + row * words[Word.theta_row]
    return array_at(words[Word.theta], at + 1, computing)[at]


@jitable
def reach(words, here, padded, row):
    """The keys from start to stop that a bias by distance is added to, and how far behind a key its entry stands."""
    position = row + here.shift
    start = max(position - words[Word.width] + 1, here.base)
    return start, min(min(position + 1, here.keys), here.base + padded), words[Word.width] - 1 - position


@jitable
def add_distances(words, x, here, padded, row, computing):
    """Add the bias by distance, whose table begins with the farthest."""
    if words[Word.distances] == 0:
        return
    start, stop, behind = reach(words, here, padded, row)
    width, base = words[Word.width], here.base
    table = array_at(words[Word.distances] + here.head * width * size_of(computing), width, computing)
    whole = start + (stop - start) // places(x) * places(x)
    for key in range(start, whole, places(x)):
        store(x, key - base, load(x, key - base) + load(table, key + behind))
    for key in range(max(start, whole), stop):
        x[key - base] += table[key + behind]


@jitable
def exponentials(x, n, top):
    """Write exp(x - top); returns the sum."""
    width = places(x)
    result = 0.0
    for block in range(0, n, 1024):
        part = splat(x, 0.0)
        for i in range(block, min(block + 1024, n), width):
            y = (load(x, i) - top) * LOG2_E
            v = select(y > lowest_exponent(y), exp2(y), 0.0)
            store(x, i, v)
            part = part + v
        result += total(part)
    return result


@jitable
def weigh(words, memory, x, here, padded, r, e, computing):
    """Write u over a row's scaled products, up to a factor, and -inf at hidden keys; returns the factor and the statistic."""
    row, kind = here.first + r, words[Word.weighing]
    add_distances(words, x, here, padded, row, computing)
    hide(words, x, here, here.base, padded, row, -math.inf)
    if kind == SCORES:
        return 1.0, 0.0
    top, bad = top_of(x, padded)
    factor, statistic = 1.0, math.nan
    if not bad and top == -math.inf:
        return 1.0, -math.inf
    if bad or top == math.inf or not 0.0 <= e <= 1.0:
        fill(x, padded, math.nan, x)
    elif kind == SOFTMAX:
        s = exponentials(x, padded, top)
        factor, statistic = 1.0 / s, top + math.log(s)
    else:
        stride = words[Word.stride]
        z = floats(words, memory, Word.z, 0, stride, computing)
        weights = floats(words, memory, Word.some_weights, 0, stride, computing)
        other = floats(words, memory, Word.other, 0, stride, computing)
        index = whole_numbers(words, memory, Word.some, 0, stride)
        integer, steps = integer_of(words, here.head, 0), words[Word.steps]
        count = listed(x, padded, top, e, z, index, sparse_share(integer))
        delta = row_alone(x, x, padded, count, top, e, integer, steps, True, z, weights, other, index)
        statistic = top - (1.0 - delta) / e
    hide(words, x, here, here.base, padded, row, -math.inf)
    return factor, statistic


@jitable
def rectify(words, numbers, x, w, n, factor, theta, keeps, touched, computing):
    """Write relu(u - theta)^p over w, where x holds u as `weigh` leaves it, and u over x if it is to be kept.

    Returns the sum of the weights and how many are not 0; marks the blocks that hold one.
    """
    width, kind, found, mass = places(x), words[Word.power_kind], 0, 0.0
    for block in range(0, n, BLOCK):
        part, before, stop = splat(x, 0.0), found, min(block + BLOCK, n)
        for i in range(block, stop, width):
            v = load(x, i)
            u = v * factor
            above = u - theta
            above = select((above <= 0.0) | (v <= -math.inf), 0.0, above)
            if keeps:
                store(x, i, select(v <= -math.inf, 0.0, u))
            if kind == 2:
                above = above * above
            store(w, i, above)
            found += width - count_bits(bits(above <= 0.0))
            part = part + above
        if found > before:
            touched[block // BLOCK] = 1
            if kind == 0:
                part = splat(x, 0.0)
                for i in range(block, stop):
                    if w[i] != 0.0:
                        w[i] = w[i] ** computing(numbers[Word.power])
                for i in range(block, stop, width):
                    part = part + load(w, i)
            mass += total(part)
    return mass, found


@jitable
def list_nonzero(row, n, touched, index, some):
    """Write where the row's blocks that are marked hold something else than 0, and what; returns how often."""
    width, count = places(row), 0
    for block in range(0, n, BLOCK):
        if touched[block // BLOCK] == 0:
            continue
        for i in range(block, min(block + BLOCK, n), width):
            v = load(row, i)
            word = bits((v < 0.0) | (v > 0.0) | is_nan(v))
            while word != 0:
                at = i + lowest_bit(word)
                index[count], some[count] = at, row[at]
                count += 1
                word &= word - 1
    return count
