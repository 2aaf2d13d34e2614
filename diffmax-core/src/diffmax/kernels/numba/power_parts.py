"""What power attention's compiled kernels are made of: monomials, products of matrices, decays, the state.

A token's monomials of each degree below p are in memory, `levels`, those of degree p one slice at a time: those that begin with
x_a are x_a times the end of those of the degree below (`operators.power.symmetric`), whole vectors of tokens.

One file, since forward, backward and steps of decoding are made of the same parts, and those of each other.
"""

import math

import numpy as np
from numba.core import types

from diffmax.kernels.numba.functions import LOG2_E, exp2_m1, lowest_exponent
from diffmax.kernels.numba.parts import jitable, part
from diffmax.kernels.numba.power_words import (
    COLUMNS,
    HIGH,
    LOW,
    MORE,
    POSITION,
    SINCE,
    SLICE,
    UNTIL,
    Word,
    firsts_of,
    floats,
    lane_numbers,
    level_at,
    zero,
)
from diffmax.kernels.numba.products import ROWS, VECTORS
from diffmax.kernels.numba.simd import (
    array_at,
    dots_of,
    is_nan,
    larger,
    load,
    places,
    product_of,
    round_shifted,
    select,
    smaller,
    splat,
    store,
    times_power,
)

_tile = product_of(ROWS, VECTORS, added_last=True)
_column = product_of(ROWS, 1, added_last=True)
_line = product_of(1, VECTORS, added_last=True)
_long_line = product_of(1, 4 * VECTORS, added_last=True)
_spot = product_of(1, 1, added_last=True)
dots = dots_of(ROWS * VECTORS // 2)


@jitable
def multiply(words, memory, a, a_at, a_row, a_step, rows, b, b_at, b_step, first, last, depth, c, c_at, c_row, more):
    """c[c_at + r c_row + j] = sum over k < depth of a[a_at + r a_row + k a_step] b[b_at + k b_step + j]; added if `more`.

    For r < rows and j from first to last, whole vectors of them.
    """
    width = places(c)
    across = VECTORS * width
    a_rows = array_at(memory + words[Word.left_rows], rows, np.int64)
    c_rows = array_at(memory + words[Word.right_rows], rows, np.int64)
    for r in range(rows):
        a_rows[r] = a_at + r * a_row
        c_rows[r] = c_at + r * c_row
    tiles = rows // ROWS * ROWS
    whole = first + (last - first) // across * across
    for j in range(first, whole, across):
        for r in range(0, tiles, ROWS):
            _tile(a, a_rows, a_step, b, b_at + j, b_step, depth, c, c_rows, j, r, more)
    for j in range(whole, last, width):
        for r in range(0, tiles, ROWS):
            _column(a, a_rows, a_step, b, b_at + j, b_step, depth, c, c_rows, j, r, more)
    for r in range(tiles, rows):
        long = first + (last - first) // (4 * across) * (4 * across)
        for j in range(first, long, 4 * across):
            _long_line(a, a_rows, a_step, b, b_at + j, b_step, depth, c, c_rows, j, r, more)
        for j in range(long, whole, across):
            _line(a, a_rows, a_step, b, b_at + j, b_step, depth, c, c_rows, j, r, more)
        for j in range(whole, last, width):
            _spot(a, a_rows, a_step, b, b_at + j, b_step, depth, c, c_rows, j, r, more)


# monomials


@jitable
def expand(words, levels, degree, low, high, target, target_at, count):
    """Write the monomials of `degree`, numbers low to high, of `count` tokens into rows of target from target_at on."""
    stride, width = words[Word.stride], places(levels)
    firsts, below = firsts_of(words, degree), firsts_of(words, degree - 1)
    base = level_at(words, degree - 1)
    for variable in range(words[Word.head_dim]):
        start, stop = max(firsts[variable], low), min(firsts[variable + 1], high)
        source = base + below[variable] - firsts[variable]
        for c in range(0, count, width):
            x = load(levels, variable * stride + c)
            for row in range(start, stop):
                v = x * load(levels, (source + row) * stride + c)
                store(target, (target_at + row - low) * stride + c, v)


@jitable
def fill_levels(words, levels, count):
    """The monomials of the degrees from 2 to p - 1."""
    for degree in range(2, words[Word.degree]):
        last = firsts_of(words, degree)[words[Word.head_dim]]
        expand(words, levels, degree, 0, last, levels, level_at(words, degree), count)


@jitable
def expand_slice(words, levels, low, high, entries, weighted, count):
    """A slice of the monomials of degree p, times their multinomial coefficients if `weighted`."""
    expand(words, levels, words[Word.degree], low, high, entries, 0, count)
    if weighted:
        weigh_slice(words, low, high, entries, count)


@jitable
def weigh_slice(words, low, high, entries, count):
    """Multiply rows of monomials by their coefficients."""
    stride = words[Word.stride]
    coefficients = array_at(words[Word.coefficients], high, entries.dtype)
    for row in range(low, high):
        c = coefficients[row]
        if c != 1.0:
            factor = splat(entries, c)
            for at in range((row - low) * stride, (row - low) * stride + count, places(entries)):
                store(entries, at, load(entries, at) * factor)


@jitable
def pull(words, levels, of_levels, degree, low, high, grad, grad_at, count):
    """Add the gradients for the variables and for the degree below, from those of monomials low to high of `degree`."""
    stride, width = words[Word.stride], places(levels)
    firsts, below = firsts_of(words, degree), firsts_of(words, degree - 1)
    base = level_at(words, degree - 1)
    for variable in range(words[Word.head_dim]):
        start, stop = max(firsts[variable], low), min(firsts[variable + 1], high)
        source = base + below[variable] - firsts[variable]
        if start >= stop:
            continue
        for c in range(0, count, width):
            x, own = load(levels, variable * stride + c), splat(levels, 0.0)
            for row in range(start, stop):
                g, at = load(grad, (grad_at + row - low) * stride + c), (source + row) * stride + c
                own = own + g * load(levels, at)
                store(of_levels, at, load(of_levels, at) + g * x)
            at = variable * stride + c
            store(of_levels, at, load(of_levels, at) + own)


@jitable
def pull_levels(words, levels, of_levels, count):
    """From the degrees below p down to the variables."""
    for degree in range(words[Word.degree] - 1, 1, -1):
        last = firsts_of(words, degree)[words[Word.head_dim]]
        pull(words, levels, of_levels, degree, 0, last, of_levels, level_at(words, degree), count)


# decays


def largest_exponent(y):
    """The largest y whose 2^y is finite, as a whole number."""


@part(largest_exponent)
def _largest_exponent(y):
    largest = 127.0 if y.element == types.float32 else 1023.0
    return lambda y: largest


def log2_parts(y):
    """log2(e) in two numbers."""


@part(log2_parts)
def _log2_parts(y):
    high = float(np.float32(LOG2_E)) if y.element == types.float32 else LOG2_E
    low = 1.9259629911266175e-8 if y.element == types.float32 else 2.0355273740931033e-17
    return lambda y: (high, low)


@jitable
def exp(x, more):
    """e^(x + more), where `more` is a rounding error of x: 0 below the normal numbers, infinite above them, NaN of NaN."""
    factor, rest = log2_parts(x)
    y = x * factor
    i, shifted = round_shifted(larger(smaller(y, largest_exponent(x)), lowest_exponent(x)))
    f = (x * factor - i) + (x * rest + more * factor)  # the first product is fused, and so exact
    found = times_power(exp2_m1(larger(smaller(f, 0.5), -0.5)) + 1.0, shifted)
    found = select(y < lowest_exponent(x), 0.0, select(largest_exponent(x) < y, math.inf, found))
    return select(is_nan(x), x, found)


@jitable
def exp_of_difference(high, low, of_high, of_low):
    """e^((high + low) - (of_high + of_low)), whose exponent keeps the digits that a difference of large numbers would lose."""
    x = high - of_high
    taken = x - high
    error = (high - (x - taken)) - (of_high + taken)
    return exp(x, error + (low - of_low))


@jitable
def begin_gates(words, memory, head, computing):
    """Sum a head's log gates from its first key on, in float64 as the reference does; keep what comes before each chunk."""
    if words[Word.gates] == 0:
        return
    span, many = words[Word.span], words[Word.many]
    chunks = (many + span - 1) // span
    gates = array_at(words[Word.gates], (head + 1) * many, computing)
    starts = array_at(memory + words[Word.starts], chunks, np.float64)
    g = 0.0
    for chunk in range(chunks):
        starts[chunk] = g
        for i in range(chunk * span, min((chunk + 1) * span, many)):
            g += gates[head * many + i]


@jitable
def cumulate_gates(words, memory, head, start, end, computing):
    """Sums of a chunk's log gates since its start."""
    if words[Word.gates] == 0:
        return
    at = head * words[Word.many]
    gates = array_at(words[Word.gates], at + end, computing)
    since = array_at(memory + words[Word.since], end - start, np.float64)
    before = array_at(memory + words[Word.starts], start // words[Word.span] + 1, np.float64)[start // words[Word.span]]
    g = before
    for i in range(end - start):
        g += gates[at + start + i]
        since[i] = g - before


@jitable
def place_lanes(words, memory, start, first, count, heads, padded, beyond, computing):
    """Positions and log gates of lanes: `count` tokens from `first` on, for each of some heads; then lanes of nothing."""
    positions = lane_numbers(words, memory, POSITION, computing)
    gated = words[Word.gates] != 0 and words[Word.many] > 0
    lane_high, lane_low = lane_numbers(words, memory, HIGH, computing), lane_numbers(words, memory, LOW, computing)
    since = array_at(memory + words[Word.since], first - start + count, np.float64)
    for t in range(count):
        place = first - start + t
        high, low = parts_of(since[place], computing) if gated else (computing(0.0), computing(0.0))
        for h in range(heads):
            c = h * count + t
            positions[c], lane_high[c], lane_low[c] = computing(place), high, low
    for c in range(heads * count, padded):
        positions[c], lane_high[c], lane_low[c] = computing(beyond), computing(0.0), computing(0.0)


@jitable
def decay_since(words, memory, padded, computing):
    """What lanes have lost since the chunk's start, into their numbers."""
    target = lane_numbers(words, memory, SINCE, computing)
    high, low = lane_numbers(words, memory, HIGH, computing), lane_numbers(words, memory, LOW, computing)
    for c in range(0, padded, places(target)):
        store(target, c, exp(load(high, c), load(low, c)))
    return target


@jitable
def decay_until(words, memory, start, end, first, count, padded, computing):
    """What tokens from `first` on lose until the chunk's end, into the lanes' numbers; 0 behind the last."""
    target = lane_numbers(words, memory, UNTIL, computing)
    since = array_at(memory + words[Word.since], end - start, np.float64)
    if words[Word.gates] != 0:
        more = lane_numbers(words, memory, MORE, computing)
        for t in range(count):
            target[t], more[t] = parts_of(since[end - start - 1] - since[first - start + t], computing)
        for t in range(count, padded):
            target[t], more[t] = computing(0.0), computing(0.0)
        for c in range(0, padded, places(target)):
            store(target, c, exp(load(target, c), load(more, c)))
    else:
        target[:count] = 1.0
    target[count:padded] = 0.0
    return target


@jitable
def whole_decay(words, memory, start, end, computing):
    """Of a chunk."""
    if words[Word.gates] == 0 or end == start:
        return computing(1.0)
    return computing(math.exp(array_at(memory + words[Word.since], end - start, np.float64)[end - start - 1]))


@jitable
def parts_of(g, computing):
    """A sum of log gates in two numbers, of which differences lose no digits."""
    high = computing(g)
    return high, computing(g - high)


@jitable
def weights_of(words, memory, scores, slopes, positions, first, rows, start, stop, by_lane, with_slopes, gated, computing):
    """Turn scores into weights, and slopes (which hold their gradients) into those of the scores, or leave those alone.

    `first` is the position of row 0. `by_lane`: lanes are queries and rows are keys, else the other way about. Lanes have
    `positions` and gates in the scratch memory, rows have those of the chunk.
    """
    stride, degree, width = words[Word.stride], words[Word.degree], places(scores)
    since = array_at(memory + words[Word.since], first + rows, np.float64)
    lane_high, lane_low = lane_numbers(words, memory, HIGH, computing), lane_numbers(words, memory, LOW, computing)
    more = degree // 2 - 1
    sign = computing(1.0) if by_lane else computing(-1.0)
    for r in range(rows):
        position = computing(first + r)
        high, low = parts_of(since[first + r], computing) if gated else (computing(0.0), computing(0.0))
        for c in range(start, stop, width):
            at = r * stride + c
            s = load(scores, at)
            square = s * s
            power = square
            for _ in range(more):
                power = power * square
            lane = load(positions, c)
            if gated:
                of_lane, of_lane_low = load(lane_high, c) * sign, load(lane_low, c) * sign
                decay = exp_of_difference(of_lane, of_lane_low, splat(scores, high * sign), splat(scores, low * sign))
            else:
                decay = splat(scores, 1.0)
            hidden = lane < position if by_lane else position < lane
            if with_slopes:
                below = splat(scores, 1.0)
                for _ in range(more):
                    below = below * square
                slope = below * s * decay * float(degree) * load(slopes, at)
                store(slopes, at, select(hidden, 0.0, slope))
            store(scores, at, select(hidden, 0.0, power * decay))


# the state: a row for each monomial, `state_step` apart, with the norm behind the sums


@jitable
def begin_state(words, memory, sums_at, norm_at, head, computing):
    """The state of a head from tensors, or zeros."""
    rows, size, step = words[Word.monomials], words[Word.value_dim], words[Word.state_step]
    state = floats(words, memory, Word.state, rows * step, computing)
    if sums_at == 0 and norm_at == 0:
        zero(state, 0, rows * step)
        return
    norm = array_at(norm_at, (head + 1) * rows, computing)
    sums = array_at(sums_at, (head + 1) * rows * size, computing)
    width = places(state)
    whole = size // width * width
    for row in range(rows):
        at, source = row * step, (head * rows + row) * size
        for j in range(0, whole, width):
            store(state, at + j, load(sums, source + j))
        for j in range(whole, size):
            state[at + j] = sums[source + j]
        for j in range(size, step - 1):
            state[at + j] = 0.0
        state[at + step - 1] = norm[head * rows + row]


@jitable
def end_state(words, memory, sums_at, norm_at, head, computing):
    """Write the state into tensors."""
    rows, size, step = words[Word.monomials], words[Word.value_dim], words[Word.state_step]
    state = floats(words, memory, Word.state, rows * step, computing)
    norm = array_at(norm_at, (head + 1) * rows, computing)
    sums = array_at(sums_at, (head + 1) * rows * size, computing)
    width = places(state)
    whole = size // width * width
    for row in range(rows):
        at, target = row * step, (head * rows + row) * size
        for j in range(0, whole, width):
            store(sums, target + j, load(state, at + j))
        for j in range(whole, size):
            sums[target + j] = state[at + j]
        norm[head * rows + row] = state[at + step - 1]


@jitable
def scale_state(words, memory, factor, computing):
    """Let the state decay."""
    count = words[Word.monomials] * words[Word.state_step]
    state = floats(words, memory, Word.state, count, computing)
    width = places(state)
    whole = count // width * width
    for i in range(0, whole, width):
        store(state, i, load(state, i) * factor)
    for i in range(whole, count):
        state[i] *= factor


@jitable
def copy_state(words, memory, address, number, computing):
    """Write the state where those of spans are."""
    count = words[Word.monomials] * words[Word.state_step]
    state = floats(words, memory, Word.state, count, computing)
    target = array_at(address, (number + 1) * count, computing)
    for i in range(count):
        target[number * count + i] = state[i]


@jitable
def join_state(words, memory, address, number, computing):
    """Let the state decay over a span, and add what that span adds."""
    count = words[Word.monomials] * words[Word.state_step]
    state = floats(words, memory, Word.state, count, computing)
    added = array_at(address, (number + 1) * count, computing)
    decay = computing(array_at(words[Word.decays], number + 1, np.float64)[number])
    for i in range(count):
        state[i] = state[i] * decay + added[number * count + i]


@jitable
def absorb(words, memory, tokens, padded, weighted, of_norm, computing):
    """Add tokens to the state: their monomials times `value_rows`, and for the norm times a number for each lane."""
    stride, step, row_step = words[Word.stride], words[Word.state_step], words[Word.row_step]
    total, size = words[Word.monomials], words[Word.value_step]
    state = floats(words, memory, Word.state, total * step, computing)
    levels = floats(words, memory, Word.levels, stride, computing)
    entries = floats(words, memory, Word.entries, SLICE * stride, computing)
    values = floats(words, memory, Word.value_rows, COLUMNS * row_step, computing)
    found = floats(words, memory, Word.found, stride, computing)
    width = places(state)
    fill_levels(words, levels, padded)
    for low in range(0, total, SLICE):
        high = min(low + SLICE, total)
        expand_slice(words, levels, low, high, entries, weighted, padded)
        multiply(
            words,
            memory,
            entries,
            0,
            stride,
            1,
            high - low,
            values,
            0,
            row_step,
            0,
            size,
            tokens,
            state,
            low * step,
            step,
            True,
        )
        for row in range(low, high, width):
            dots(of_norm, 0, entries, (row - low) * stride, stride, padded, found, 0)
            for i in range(min(width, high - row)):
                state[(row + i) * step + size] += found[i]


@jitable
def read_state(words, memory, padded, weighted, with_norm, computing):
    """Add the products of the lanes' monomials with the state to `result`."""
    stride, step = words[Word.stride], words[Word.state_step]
    total, size = words[Word.monomials], words[Word.value_step]
    state = floats(words, memory, Word.state, total * step, computing)
    levels = floats(words, memory, Word.levels, stride, computing)
    entries = floats(words, memory, Word.entries, SLICE * stride, computing)
    result = floats(words, memory, Word.result, (size + 1) * stride, computing)
    fill_levels(words, levels, padded)
    for low in range(0, total, SLICE):
        high = min(low + SLICE, total)
        expand_slice(words, levels, low, high, entries, weighted, padded)
        by_value(words, memory, state, low * step, step, entries, 0, padded, high - low, with_norm, result)


@jitable
def by_value(words, memory, a, a_at, a_step, b, first, last, depth, with_norm, result):
    """Add to `result` sums over rows: of values times lanes, and of what stands behind the values, the norm."""
    stride, size = words[Word.stride], words[Word.value_step]
    rows = words[Word.value_dim]
    multiply(words, memory, a, a_at, 1, a_step, rows, b, 0, stride, first, last, depth, result, 0, stride, True)
    if with_norm:
        at = size * stride
        multiply(words, memory, a, a_at + size, 1, a_step, 1, b, 0, stride, first, last, depth, result, at, stride, True)


@jitable
def pull_state(words, memory, padded, weighted, computing):
    """Add the gradients for the lanes' tokens, `of_levels`, from those for what they read of the state, `lanes_t`."""
    stride, step = words[Word.stride], words[Word.state_step]
    total, size = words[Word.monomials], words[Word.value_step]
    state = floats(words, memory, Word.state, total * step, computing)
    levels = floats(words, memory, Word.levels, stride, computing)
    of_levels = floats(words, memory, Word.of_levels, stride, computing)
    entries = floats(words, memory, Word.entries, SLICE * stride, computing)
    lanes_t = floats(words, memory, Word.lanes_t, (size + 1) * stride, computing)
    for low in range(0, total, SLICE):
        high = min(low + SLICE, total)
        multiply(
            words,
            memory,
            state,
            low * step,
            step,
            1,
            high - low,
            lanes_t,
            0,
            stride,
            0,
            padded,
            size + 1,
            entries,
            0,
            stride,
            False,
        )
        if weighted:
            weigh_slice(words, low, high, entries, padded)
        pull(words, levels, of_levels, words[Word.degree], low, high, entries, 0, padded)
    pull_levels(words, levels, of_levels, padded)
