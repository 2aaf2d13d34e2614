"""A step of decoding: few queries read the state where it lies, and few keys are added on the way to where it is to lie.

A state is much larger than what a step computes with it, so its time is that of memory. Sums are whole vectors here, and
products have the queries as rows and the sums' columns as vectors.
"""

from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.power_parts import decay_until, dots, expand_slice, fill_levels, multiply, whole_decay
from diffmax.kernels.numba.power_words import COLUMNS, SLICE, Word, floats, to_lanes
from diffmax.kernels.numba.simd import array_at, load, places, splat, store


@jitable
def read_in_place(words, memory, head, lanes, computing):
    """Write the products of the lanes' monomials with the state before the first key to `result`."""
    stride, size, total = words[Word.stride], words[Word.value_dim], words[Word.monomials]
    levels = floats(words, memory, Word.levels, stride, computing)
    entries = floats(words, memory, Word.entries, SLICE * stride, computing)
    result = floats(words, memory, Word.result, (size + 1) * stride, computing)
    rows = floats(words, memory, Word.lane_rows, COLUMNS * size, computing)
    sums = array_at(words[Word.sums], (head + 1) * total * size, computing)
    norm = array_at(words[Word.norm], (head + 1) * total, computing)
    width = places(result)
    padded = (lanes + width - 1) // width * width
    fill_levels(words, levels, padded)
    for low in range(0, total, SLICE):
        high, at = min(low + SLICE, total), (head * total + low) * size
        expand_slice(words, levels, low, high, entries, True, padded)
        more = low > 0
        multiply(words, memory, entries, 0, 1, stride, lanes, sums, at, size, 0, size, high - low, rows, 0, size, more)
        for c in range(0, padded, width):
            found = load(result, size * stride + c) if more else splat(result, 0.0)
            for row in range(low, high):
                found = found + load(entries, (row - low) * stride + c) * norm[head * total + row]
            store(result, size * stride + c, found)
    to_lanes(rows, size, padded, size, result, stride)


@jitable
def enter_in_place(words, memory, head, count, computing):
    """Write the state behind `count` keys, all there are: the lanes' keys and `value_rows` are theirs."""
    stride, size, total = words[Word.stride], words[Word.value_dim], words[Word.monomials]
    levels = floats(words, memory, Word.levels, stride, computing)
    entries = floats(words, memory, Word.entries, SLICE * stride, computing)
    values = floats(words, memory, Word.value_rows, COLUMNS * words[Word.row_step], computing)
    found = floats(words, memory, Word.found, stride, computing)
    sums = array_at(words[Word.sums], (head + 1) * total * size, computing)
    norm = array_at(words[Word.norm], (head + 1) * total, computing)
    end_sums = array_at(words[Word.end_sums], (head + 1) * total * size, computing)
    end_norm = array_at(words[Word.end_norm], (head + 1) * total, computing)
    width = places(values)
    padded = (count + width - 1) // width * width
    until = decay_until(words, memory, 0, count, 0, count, padded, computing)
    decay = whole_decay(words, memory, 0, count, computing)
    fill_levels(words, levels, padded)
    for low in range(0, total, SLICE):
        high, first = min(low + SLICE, total), head * total + low
        expand_slice(words, levels, low, high, entries, False, padded)
        for i in range(first * size, (first + high - low) * size, width):
            store(end_sums, i, load(sums, i) * decay)
        step, at = words[Word.row_step], first * size
        multiply(words, memory, entries, 0, stride, 1, high - low, values, 0, step, 0, size, count, end_sums, at, size, True)
        for row in range(low, high, width):
            dots(until, 0, entries, (row - low) * stride, stride, padded, found, 0)
            for i in range(row, min(row + width, high)):
                end_norm[head * total + i] = norm[head * total + i] * decay + found[i - row]
