"""Decoding with bounds, compiled: a thread takes a key head of a sequence and does everything for it.

For a few queries at a time: what the scores of all keys are about, from the keys in 4 bits, and how far they may lie from that;
or, from the boxes of pages, what they are at most. For each query: the keys that would have a weight by that, their own scores,
and the threshold of those alone, which is a lower bound of tau; then the own scores of all other keys that can lie above it,
the weights, and the values of those that have one (docs/decoding.md).
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from diffmax.kernels.numba import scores as rules
from diffmax.kernels.numba.attention_forward import supported
from diffmax.kernels.numba.jobs import finish, keep, take
from diffmax.kernels.numba.one_row import fill, listed, tallied, top_of, write, write_nudged
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.products import bytes_of, copy_rows, gather_rows, multiply_directly, write_row
from diffmax.kernels.numba.simd import (
    append,
    array_at,
    fetch_add,
    has_avx512,
    is_nan,
    larger,
    load,
    places,
    prefetch,
    select,
    splat,
    store,
    total,
    unpacked_product_of,
)
from diffmax.kernels.numba.solver import solve_alone
from diffmax.operators.common.numerics import MIN_E
from diffmax.reference.decoding import LEVELS

# Queries whose scores are computed together: the codes are unpacked once for all of them.
TOGETHER = 4
# Iterations for the threshold of rounded keys, which only says which keys to begin with.
FIRST_STEPS = 2
# Where more than this share of the keys that a query sees, and more than LEAST, can have a weight, all are read in order.
SHARE, LEAST = 0.25, 64
# Keys or values that are converted at once.
SOME = 64
# Bytes of a line of the cache, and of the codes of a page that are asked for ahead of time.
LINE, BEGUN = 64, 512

# Vectors of codes that are multiplied together, with one query and with several: sums and unpacked codes stay in registers.
WITH_ONE, WITH_MORE = (4, 2) if has_avx512() else (2, 1)
_one_by_many, _one_by_one = unpacked_product_of(1, WITH_ONE), unpacked_product_of(1, 1)
_three_by_many, _three_by_one = unpacked_product_of(3, WITH_MORE), unpacked_product_of(3, 1)
_four_by_many, _four_by_one = unpacked_product_of(TOGETHER, WITH_MORE), unpacked_product_of(TOGETHER, 1)

_Words = namedtuple(
    "_Words",
    """
    next done stop chunk
    slots slot_bytes memory checks old
    kv_heads group length head_dim value_dim head_step value_step kind page_size pages row_pages stride
    query query_batch query_row query_head
    key key_block key_row key_head
    value value_block value_row value_head
    new_key new_key_batch new_key_row new_key_head
    new_value new_value_batch new_value_row new_value_head
    low high codes
    starts held ends rows blocks blocks_step
    before after integer steps
    e alibi alibi_batch sink
    out m delta support pages_read
    scale e_value softcap
    scores errors z weights other exact index found
    queries factors lows highs some_rows some_weights some sums left right read
    """,
)
N_WORDS = len(_Words._fields)
Word = _Words(*range(N_WORDS))
"""Places of a job's words: those of the call, from scale on numbers, from scores on the parts of the scratch memory."""


@jitable
def numbers_at(words, memory, part, count, computing):
    """A part of the scratch memory."""
    return array_at(memory + words[part], count, computing)


@jitable
def places_of_rows(words, memory):
    """Where rows of a product begin, on the left and in the result."""
    return (
        array_at(memory + words[Word.left], TOGETHER, np.int64),
        array_at(memory + words[Word.right], TOGETHER, np.int64),
    )


@jitable
def block_of(words, b, page):
    """Where what is kept of a page lies, counted in pages, and the row or page of the cache that holds it."""
    if words[Word.blocks] != 0:
        step = words[Word.blocks_step]
        block = array_at(words[Word.blocks] + 4 * (b * step + page), 1, np.int32)[0]
        return block, block
    row = array_at(words[Word.rows], b + 1, np.int64)[b]
    return row * words[Word.row_pages] + page, row


@jitable
def address_of(words, tensor, b, g, position, itemsize):
    """Address of the key or value of a token."""
    page = position // words[Word.page_size]
    _, row = block_of(words, b, page)
    inside = position - page * words[Word.page_size] if words[Word.blocks] != 0 else position
    return words[tensor] + itemsize * (row * words[tensor + 1] + inside * words[tensor + 2] + g * words[tensor + 3])


@jitable
def bounds_at(words, b, g, page, kind, array):
    """Where the bounds of a page lie, counted in bytes from the first page's."""
    place, _ = block_of(words, b, page)
    return (place * words[Word.kv_heads] + g) * words[Word.head_dim] * bytes_of(kind, array)


@jitable
def load_bounds(words, b, g, page, low, high):
    """Copy the bounds of a page; returns where they lie, as `bounds_at` does."""
    depth, step, kind = words[Word.head_dim], words[Word.head_step], words[Word.kind]
    at = bounds_at(words, b, g, page, kind, low)
    copy_rows(words[Word.low] + at, kind, depth, 1, depth, 1.0, low, step)
    copy_rows(words[Word.high] + at, kind, depth, 1, depth, 1.0, high, step)
    return at


@jitable
def codes_at(words, b, g, page):
    """The codes of a page, and how many lie behind each other."""
    place, _ = block_of(words, b, page)
    half, size = (words[Word.head_dim] + 1) // 2, words[Word.page_size]
    return array_at(words[Word.codes] + (place * words[Word.kv_heads] + g) * half * size, half * size, np.uint8), half


@jitable
def fetch(address, size):
    """Have some bytes read that will be needed soon: they lie where no processor would look by itself."""
    for at in range(0, size, LINE):
        prefetch(address + at)
    prefetch(address + size - 1)


@jitable
def copy_new(words, tensor, new, b, g, token, position, size, row, step):
    """Write a new token's key or value into the cache; it stands in `row` too."""
    kind = words[Word.kind]
    itemsize = bytes_of(kind, row)
    at = words[new] + itemsize * (b * words[new + 1] + token * words[new + 2] + g * words[new + 3])
    copy_rows(at, kind, size, 1, size, 1.0, row, step)
    write_row(address_of(words, tensor, b, g, position, itemsize), kind, size, row, row.dtype.type(1.0))


@jitable
def round_key(codes, half, size, at, key, depth, low, high):
    """Write the codes of a key, the token `at` of its page."""
    for i in range(half):
        byte = 0
        for part in range(2):
            d = part * half + i
            if d < depth:
                share = (key[d] - low[d]) / ((high[d] - low[d]) * key.dtype.type(1.0 / LEVELS))
                code = 0
                if share > 0.5:
                    code = LEVELS if share > LEVELS - 0.5 else int(share + 0.5)
                byte |= code << (4 * part)
        codes[i * size + at] = byte


@jitable
def is_old(words, memory, b, g, computing):
    """Whether the last key of a sequence, before the new ones, is not in the bounds of its page, or not near its code."""
    size, step, depth, kind = words[Word.page_size], words[Word.head_step], words[Word.head_dim], words[Word.kind]
    position = array_at(words[Word.held], b + 1, np.int64)[b] - 1
    if position < array_at(words[Word.starts], b + 1, np.int64)[b]:
        return False
    low, high = numbers_at(words, memory, Word.lows, step, computing), numbers_at(words, memory, Word.highs, step, computing)
    key = numbers_at(words, memory, Word.some_rows, step, computing)
    page = position // size
    load_bounds(words, b, g, page, low, high)
    copy_rows(address_of(words, Word.key, b, g, position, bytes_of(kind, key)), kind, depth, 1, depth, 1.0, key, step)
    for d in range(depth):
        if key[d] < low[d] or key[d] > high[d]:
            return True
    if words[Word.codes] == 0:
        return False
    codes, half = codes_at(words, b, g, page)
    least = np.finfo(computing).tiny * np.finfo(computing).eps  # what is smaller is 0
    for d in range(depth):
        code = codes[d % half * size + position - page * size] >> (d // half * 4) & 15
        extent = (high[d] - low[d]) * computing(1.0 / LEVELS)
        room = 0.51 * extent + 8.0 * (np.finfo(computing).eps * max(abs(low[d]), abs(high[d])) + least)
        if abs(key[d] - (low[d] + computing(code) * extent)) > room:
            return True
    return False


@jitable
def append_new(words, memory, b, g, computing):
    """Write the new keys and values of a sequence into its caches, and bring the bounds and codes of their pages up to date."""
    size, step, depth, kind = words[Word.page_size], words[Word.head_step], words[Word.head_dim], words[Word.kind]
    held, end = array_at(words[Word.held], b + 1, np.int64)[b], array_at(words[Word.ends], b + 1, np.int64)[b]
    low, high = numbers_at(words, memory, Word.lows, step, computing), numbers_at(words, memory, Word.highs, step, computing)
    row = numbers_at(words, memory, Word.some_rows, max(step, words[Word.value_step]), computing)
    position = held
    while position < end:
        page = position // size
        stop = min(end, (page + 1) * size)
        at = load_bounds(words, b, g, page, low, high)
        moved = position == page * size
        for i in range(position, stop):
            copy_new(words, Word.value, Word.new_value, b, g, i - held, i, words[Word.value_dim], row, words[Word.value_step])
            copy_new(words, Word.key, Word.new_key, b, g, i - held, i, depth, row, step)
            for d in range(depth):
                x = row[d]
                if i == page * size or x < low[d] or x != x:
                    low[d], moved = x, True
                if i == page * size or x > high[d] or x != x:
                    high[d], moved = x, True
        write_row(words[Word.low] + at, kind, depth, low, computing(1.0))
        write_row(words[Word.high] + at, kind, depth, high, computing(1.0))
        if words[Word.codes] != 0:
            codes, half = codes_at(words, b, g, page)
            for i in range(page * size if moved else position, stop):
                address = address_of(words, Word.key, b, g, i, bytes_of(kind, row))
                copy_rows(address, kind, depth, 1, depth, 1.0, row, step)
                round_key(codes, half, size, i - page * size, row, depth, low, high)
        position = stop


@jitable
def weigh(words, memory, b, g, page, count, computing):
    """Factors of the codes of a page for `count` queries, what the codes add to, and how far the scores may be off.

    The last two stand behind the factors: a number for each query, twice. Where the error is not finite it is infinite.
    """
    step, depth = words[Word.head_step], words[Word.head_dim]
    queries = numbers_at(words, memory, Word.queries, TOGETHER * step, computing)
    factors = numbers_at(words, memory, Word.factors, TOGETHER * (step + 2), computing)
    low = numbers_at(words, memory, Word.lows, step, computing)
    high = numbers_at(words, memory, Word.highs, step, computing)
    load_bounds(words, b, g, page, low, high)
    margin = computing((6 * depth + 64) * np.finfo(computing).eps)
    zero, width = splat(queries, 0.0), places(queries)
    base_0, base_1, base_2, base_3 = zero, zero, zero, zero
    off_0, off_1, off_2, off_3 = zero, zero, zero, zero
    for d in range(0, step, width):
        least, most = load(low, d), load(high, d)
        extent = (most - least) * (1.0 / LEVELS)
        # the error of a code is half a step; that of sums is a share of how large their terms can be
        room = extent * 0.5 + larger(larger(least, 0.0 - least), larger(most, 0.0 - most)) * margin
        base_0, off_0 = weigh_one(queries, factors, d, extent, least, room, base_0, off_0)
        if count > 1:
            base_1, off_1 = weigh_one(queries, factors, step + d, extent, least, room, base_1, off_1)
            base_2, off_2 = weigh_one(queries, factors, 2 * step + d, extent, least, room, base_2, off_2)
            base_3, off_3 = weigh_one(queries, factors, 3 * step + d, extent, least, room, base_3, off_3)
    begun, errors = factors[TOGETHER * step :], factors[TOGETHER * (step + 1) :]
    begun[0], errors[0] = total(base_0), total(off_0)
    if count > 1:
        begun[1], begun[2], begun[3] = total(base_1), total(base_2), total(base_3)
        errors[1], errors[2], errors[3] = total(off_1), total(off_2), total(off_3)
    for r in range(count):
        # `larger` gives the second where the first is NaN, but what is NaN in a bound is so in what is begun; sums may overflow
        off = errors[r] + computing(0.0) * (begun[r] + errors[r] * (computing(4.0) / margin))
        errors[r] = off if off < math.inf else computing(math.inf)


@jitable
def weigh_one(queries, factors, at, extent, least, room, base, off):
    """Some dimensions of a query: their factors are written, the sums returned."""
    query = load(queries, at)
    store(factors, at, query * extent)
    return base + query * least, off + larger(query, 0.0 - query) * room


@jitable
def rate_page(codes, size, half, factors, step, count, scores, stride, at):
    """Scores of the rounded keys of a page, for `count` queries: written for one, or for three, or for TOGETHER."""
    begun, width = factors[TOGETHER * step :], places(scores)
    whole, t = size // width * width, 0
    if count == 1:
        while t + WITH_ONE * width <= whole:
            _one_by_many(factors, step, begun, codes, t, size, half, scores, at + t, stride)
            t += WITH_ONE * width
    elif count <= 3:
        while t + WITH_MORE * width <= whole:
            _three_by_many(factors, step, begun, codes, t, size, half, scores, at + t, stride)
            t += WITH_MORE * width
    else:
        while t + WITH_MORE * width <= whole:
            _four_by_many(factors, step, begun, codes, t, size, half, scores, at + t, stride)
            t += WITH_MORE * width
    while t < whole:
        if count == 1:
            _one_by_one(factors, step, begun, codes, t, size, half, scores, at + t, stride)
        elif count <= 3:
            _three_by_one(factors, step, begun, codes, t, size, half, scores, at + t, stride)
        else:
            _four_by_one(factors, step, begun, codes, t, size, half, scores, at + t, stride)
        t += width


@jitable
def highest(words, memory, b, g, page, count, tops, computing):
    """Upper bounds of the scores of a page for TOGETHER queries, of which `count` count; infinite where there is none."""
    step, depth = words[Word.head_step], words[Word.head_dim]
    queries = numbers_at(words, memory, Word.queries, TOGETHER * step, computing)
    low = numbers_at(words, memory, Word.lows, step, computing)
    high = numbers_at(words, memory, Word.highs, step, computing)
    load_bounds(words, b, g, page, low, high)
    margin = computing((6 * depth + 64) * np.finfo(computing).eps)
    for r in range(count):
        bound = spoilt = splat(queries, 0.0)
        for d in range(0, step, places(queries)):
            query, least, most = load(queries, r * step + d), load(low, d), load(high, d)
            # the sums of a score are off by a share of how large their terms can be
            room = larger(larger(least, 0.0 - least), larger(most, 0.0 - most)) * margin
            bound = bound + larger(query * least, query * most) + larger(query, 0.0 - query) * room
            spoilt = spoilt + (least + most) * 0.0
        top = total(bound) + total(spoilt)  # the latter is 0, or NaN where the page has no bounds
        tops[r] = top if top < math.inf else computing(math.inf)


@jitable
def rate_by_boxes(words, memory, b, g, first, last, count, computing):
    """As `rate` where there are no codes: each key stands for the upper bound of its page, which is off by nothing."""
    size, stride = words[Word.page_size], words[Word.stride]
    scores = numbers_at(words, memory, Word.scores, TOGETHER * stride, computing)
    errors = numbers_at(words, memory, Word.errors, TOGETHER * words[Word.pages], computing)
    tops = numbers_at(words, memory, Word.factors, TOGETHER, computing)
    of_bounds = words[Word.head_dim] * bytes_of(words[Word.kind], scores)
    for page in range(first, last):
        if page + 1 < last:
            at = bounds_at(words, b, g, page + 1, words[Word.kind], scores)
            fetch(words[Word.low] + at, of_bounds)
            fetch(words[Word.high] + at, of_bounds)
        highest(words, memory, b, g, page, count, tops, computing)
        for r in range(count):
            errors[r * words[Word.pages] + page - first] = 0.0
            top = tops[r] if tops[r] < math.inf else computing(-math.inf)
            fill(scores[r * stride + (page - first) * size :], size, top, scores)


@jitable
def rate(words, memory, b, g, first, last, count, computing):
    """Scores of the rounded keys of the pages from first to last for `count` queries, -inf where they may be anything."""
    size, step, stride = words[Word.page_size], words[Word.head_step], words[Word.stride]
    factors = numbers_at(words, memory, Word.factors, TOGETHER * (step + 2), computing)
    scores = numbers_at(words, memory, Word.scores, TOGETHER * stride, computing)
    errors = numbers_at(words, memory, Word.errors, TOGETHER * words[Word.pages], computing)
    of_bounds = words[Word.head_dim] * bytes_of(words[Word.kind], scores)
    for page in range(first, last):
        if page + 1 < last:
            at = bounds_at(words, b, g, page + 1, words[Word.kind], scores)
            fetch(words[Word.low] + at, of_bounds)
            fetch(words[Word.high] + at, of_bounds)
            codes, half = codes_at(words, b, g, page + 1)
            fetch(codes.ctypes.data, min(half * size, BEGUN))  # the processor goes on by itself
        weigh(words, memory, b, g, page, count, computing)
        codes, half = codes_at(words, b, g, page)
        at = (page - first) * size
        rate_page(codes, size, half, factors, step, count, scores, stride, at)
        for r in range(count):
            for t in range(size // places(scores) * places(scores), size):
                score = factors[TOGETHER * step + r]
                for i in range(half):
                    code = codes[i * size + t]
                    score += computing(code & 15) * factors[r * step + i] + computing(code >> 4) * factors[r * step + half + i]
                scores[r * stride + at + t] = score
            error = factors[TOGETHER * (step + 1) + r]
            errors[r * words[Word.pages] + page - first] = error
            if error == math.inf:
                for t in range(size):
                    scores[r * stride + at + t] = -math.inf


@jitable
def dots(words, memory, b, g, r, low, index, count, exact, computing):
    """Scaled products of a query with the keys that stand index[:count] behind token `low`."""
    step, depth, kind = words[Word.head_step], words[Word.head_dim], words[Word.kind]
    queries = numbers_at(words, memory, Word.queries, TOGETHER * step, computing)
    rows = numbers_at(words, memory, Word.some_rows, SOME * step, computing)
    read = array_at(memory + words[Word.read], words[Word.pages], np.uint8)
    left, right = places_of_rows(words, memory)
    left[0], right[0] = r * step, 0
    for first in range(0, count, SOME):
        some = min(SOME, count - first)
        for i in range(some):
            fetch(address_of(words, Word.key, b, g, low + index[first + i], bytes_of(kind, rows)), depth * bytes_of(kind, rows))
        for i in range(some):
            position = low + index[first + i]
            read[position // words[Word.page_size]] = 1
            at = address_of(words, Word.key, b, g, position, bytes_of(kind, rows))
            copy_rows(at, kind, depth, 1, depth, 1.0, rows[i * step :], step)
        multiply_directly(queries, left, 1, rows, step, some, step, exact, right, first)


@jitable
def rule(words, numbers, exact, count, index, low, position, slope, computing):
    """Let softcap and ALiBi act on the products of a query with the keys in a list; there is room for a vector behind them."""
    softcap, width = computing(numbers[Word.softcap]), places(exact)
    if softcap > 0:
        store(exact, count, splat(exact, 0.0))
        rules.cap(exact, exact[:0], (count + width - 1) // width * width, softcap)
    if words[Word.alibi] != 0:
        for i in range(count):
            exact[i] -= slope * computing(abs(low + index[i] - position))


@jitable
def rule_row(words, numbers, scores, n, first, slope, rounded, computing):
    """The same for neighbouring keys, of which the first stands `first` behind the query; of rounded ones -inf stays."""
    softcap, nothing, width = computing(numbers[Word.softcap]), scores[:0], places(scores)
    padded = (n + width - 1) // width * width
    if softcap > 0:
        for i in range(0, padded, width):
            v = load(scores, i)
            rules.cap(scores[i:], nothing, width, softcap)
            if rounded:  # it has no meaning
                store(scores, i, select(v > -math.inf, load(scores, i), v))
    if words[Word.alibi] != 0:
        rules.subtract_distance(scores, padded, first, slope)


@jitable
def score_whole(words, memory, b, g, first, start, stop, r, count, computing):
    """Scaled products of the queries from r to count with all keys from start to stop, in place of their rounded scores."""
    size, step, depth, kind = words[Word.page_size], words[Word.head_step], words[Word.head_dim], words[Word.kind]
    stride, key_row = words[Word.stride], words[Word.key_row]
    queries = numbers_at(words, memory, Word.queries, TOGETHER * step, computing)
    copied = numbers_at(words, memory, Word.some_rows, SOME * step, computing)
    scores = numbers_at(words, memory, Word.scores, TOGETHER * stride, computing)
    left, right = places_of_rows(words, memory)
    for i in range(r, count):
        left[i - r], right[i - r] = i * step, i * stride
    position = start
    while position < stop:
        some = min(SOME, min(stop, (position // size + 1) * size) - position)
        at = address_of(words, Word.key, b, g, position, bytes_of(kind, queries))
        keys, key_step = copied, step
        if kind == 0 and depth == step:
            keys, key_step = array_at(at, some * key_row + depth, computing), key_row
        else:
            copy_rows(at, kind, key_row, some, depth, 1.0, copied, step)
        multiply_directly(queries, left, count - r, keys, key_step, some, step, scores, right, position - first * size)
        position += some


@jitable
def solved(words, memory, scores, n, top, e, steps, computing):
    """The candidates of scores whose maximum is finite, solved: how many, in whole vectors how many, delta, S, and the last d.

    They are listed in the scratch memory, with their weights as `solve_alone` leaves them.
    """
    stride, width = words[Word.stride], places(scores)
    z = numbers_at(words, memory, Word.z, stride, computing)
    weights = numbers_at(words, memory, Word.weights, stride, computing)
    other = numbers_at(words, memory, Word.other, stride, computing)
    count = listed(scores, n, top, e, z, array_at(memory + words[Word.found], stride, np.int32), 1.0)
    length = (count + width - 1) // width * width
    delta, s, d = solve_alone(z, weights, other, length, tallied(z, length, e), e, words[Word.integer], steps)
    return count, length, delta, s, d


@jitable
def root(words, memory, scores, n, e, steps, computing):
    """The threshold of scores: -inf of none, NaN of scores that have none."""
    top, bad = top_of(scores, n) if n > 0 else (computing(-math.inf), False)
    if bad or top == math.inf:
        return computing(math.nan)
    if top == -math.inf:
        return top
    delta = solved(words, memory, scores, n, top, e, steps, computing)[2]
    return top - (1.0 - delta) / e


@jitable
def with_sink(words, exact, count, head, computing):
    """Put the sink's score behind those of keys, if there is one; returns how many there are then."""
    if words[Word.sink] == 0:
        return count
    exact[count] = array_at(words[Word.sink], head + 1, computing)[head]
    return count + 1


@jitable
def choose(words, numbers, memory, b, g, r, low, n, shift, position, head, slope, e, computing):
    """List the keys of a query that can have a weight, by what they stand behind token `low`, with their own scores; how many.

    `n` keys are seen, whose rounded scores begin `shift` behind those of their first page. -1: so many that all had better be
    read.
    """
    size, stride, width = words[Word.page_size], words[Word.stride], places(numbers_at(words, memory, Word.z, 0, computing))
    scores = numbers_at(words, memory, Word.scores, (r + 1) * stride, computing)[r * stride + shift :]
    errors = numbers_at(words, memory, Word.errors, (r + 1) * words[Word.pages], computing)[r * words[Word.pages] :]
    exact = numbers_at(words, memory, Word.exact, stride, computing)
    index = array_at(memory + words[Word.index], stride, np.int32)
    eps, most = np.finfo(computing).eps, max(LEAST, int(SHARE * n))
    first = root(words, memory, scores, n, e, FIRST_STEPS, computing)
    # in the scores' own precision, so that a score is above it in vectors and alone, or in neither
    first = computing(first) if first == first else computing(math.inf)
    count = 0
    for i in range(0, n // width * width, width):
        v = load(scores, i)
        count = append(exact, index, count, v, v > first, i)
    for i in range(n // width * width, n):
        if scores[i] > first:
            index[count] = i
            count += 1
    if count > most:
        return -1
    dots(words, memory, b, g, r, low, index, count, exact, computing)
    rule(words, numbers, exact, count, index, low, position, slope, computing)
    bound = root(words, memory, exact, with_sink(words, exact, count, head, computing), e, words[Word.steps], computing)
    if bound > -math.inf:
        bound -= 8.0 * eps * (abs(bound) + 2.0 / e)
        if words[Word.alibi] != 0:  # its subtraction is rounded too
            bound -= 4.0 * eps * abs(slope) * computing(n + words[Word.length])
    else:  # there is none, or it is NaN
        bound = -math.inf
    bound = computing(bound)
    begun = count
    for at in range(-(shift % size), n, size):
        start, stop = max(at, 0), min(at + size, n)
        least = bound - errors[(shift + start) // size]
        whole = start + (stop - start) // width * width
        for i in range(start, whole, width):
            v = load(scores, i)
            # what lies above `first` is read already; ALiBi may have made NaN
            needed = ((v > least) & (v <= first)) | (v <= -math.inf) | is_nan(v)
            count = append(exact, index, count, v, needed, i)
        for i in range(whole, stop):
            score = scores[i]
            if least < score <= first or score == -math.inf or score != score:
                index[count] = i
                count += 1
    if count > most:
        return -1
    dots(words, memory, b, g, r, low, index[begun:], count - begun, exact[begun:], computing)
    rule(words, numbers, exact[begun:], count - begun, index[begun:], low, position, slope, computing)
    return count


@jitable
def add_values(words, memory, b, g, r, low, count, of_keys, computing):
    """The sum of a query's values with the weights of a list, of whose entries those of keys come before the sink's."""
    size, step, kind = words[Word.value_dim], words[Word.value_step], words[Word.kind]
    sums = numbers_at(words, memory, Word.sums, TOGETHER * step, computing)
    weights = numbers_at(words, memory, Word.weights, count, computing)
    index = array_at(memory + words[Word.index], words[Word.stride], np.int32)
    found = array_at(memory + words[Word.found], words[Word.stride], np.int32)
    rows = numbers_at(words, memory, Word.some_rows, SOME * step, computing)
    some_weights = numbers_at(words, memory, Word.some_weights, SOME, computing)
    some = array_at(memory + words[Word.some], SOME, np.int32)
    at = 0
    while at < count:
        for i in range(at, min(at + SOME, count)):
            if weights[i] != 0.0 and found[i] < of_keys:
                address = address_of(words, Word.value, b, g, low + index[found[i]], bytes_of(kind, sums))
                fetch(address, size * bytes_of(kind, sums))
        taken = 0
        while at < count and taken < SOME:
            if weights[at] != 0.0 and found[at] < of_keys:
                address = address_of(words, Word.value, b, g, low + index[found[at]], bytes_of(kind, sums))
                copy_rows(address, kind, size, 1, size, 1.0, rows[taken * step :], step)
                some[taken], some_weights[taken] = taken, weights[at]
                taken += 1
            at += 1
        gather_rows(some_weights, some, taken, rows, step, sums, r * step, step, True)


@jitable
def add_whole(words, memory, b, g, first, start, stop, r, count, computing):
    """Add the values of the keys from start to stop for the queries from r to count; weights stand in place of the scores."""
    size, step, dim, kind = words[Word.page_size], words[Word.value_step], words[Word.value_dim], words[Word.kind]
    stride = words[Word.stride]
    sums = numbers_at(words, memory, Word.sums, TOGETHER * step, computing)
    scores = numbers_at(words, memory, Word.scores, TOGETHER * stride, computing)
    rows = numbers_at(words, memory, Word.some_rows, SOME * step, computing)
    some_weights = numbers_at(words, memory, Word.some_weights, SOME, computing)
    some = array_at(memory + words[Word.some], SOME, np.int32)
    position = start
    while position < stop:
        many = min(SOME, min(stop, (position // size + 1) * size) - position)
        copied = False
        for i in range(r, count):
            weights = scores[i * stride + position - first * size :]
            taken = 0
            for j in range(many):
                if weights[j] != 0.0:
                    some[taken], some_weights[taken] = j, weights[j]
                    taken += 1
            if taken > 0:
                if not copied:
                    at = address_of(words, Word.value, b, g, position, bytes_of(kind, sums))
                    copy_rows(at, kind, words[Word.value_row], many, dim, 1.0, rows, step)
                    copied = True
                gather_rows(some_weights, some, taken, rows, step, sums, i * step, step, True)
        position += many


@jitable
def attend(words, memory, b, g, r, low, exact, count, all_of_them, head, row, e, computing):
    """The result of a query from the own scores of `count` keys; `row` counts statistics.

    Of listed keys the values are added up. If they are all that it sees, their weights take the place of the scores.
    """
    stride, step = words[Word.stride], words[Word.value_step]
    sums = numbers_at(words, memory, Word.sums, TOGETHER * step, computing)
    n = with_sink(words, exact, count, head, computing)
    top, bad = top_of(exact, n) if n > 0 else (computing(-math.inf), False)
    spoilt = bad or top == math.inf or not 0.0 <= e <= 1.0
    keep(words[Word.m], row, math.nan if bad else top, computing)
    missing = computing(math.nan) if spoilt else computing(0.0)
    fill(sums[r * step :], step, missing, sums)
    if spoilt or top == -math.inf:
        keep(words[Word.delta], row, missing, computing)
        if words[Word.support] != 0:
            array_at(words[Word.support], row + 1, np.int32)[row] = 0
        if all_of_them:
            fill(exact, count, 0.0, sums)
        return
    candidates, length, delta, s, d = solved(words, memory, exact, n, top, e, words[Word.steps], computing)
    weights = numbers_at(words, memory, Word.weights, stride, computing)
    if d != 0.0:
        write_nudged(weights, length, weights, numbers_at(words, memory, Word.z, stride, computing), delta, d, 1.0 / e)
    else:
        write(weights, length, weights, 1.0 / s)
    keep(words[Word.delta], row, delta, computing)
    if words[Word.support] != 0:
        in_sink = 1 if n > count and (exact[count] - top) * e - delta > -1.0 else 0
        z = numbers_at(words, memory, Word.z, stride, computing)
        array_at(words[Word.support], row + 1, np.int32)[row] = supported(z, length, delta) - in_sink
    if not all_of_them:
        add_values(words, memory, b, g, r, low, candidates, count, computing)
        return
    fill(exact, count, 0.0, sums)
    found = array_at(memory + words[Word.found], stride, np.int32)
    for i in range(candidates):
        if found[i] < count:
            exact[found[i]] = weights[i]


@jitable
def seen(words, b, i):
    """Position of a query, and the first key that it sees and the one behind the last."""
    start, end = array_at(words[Word.starts], b + 1, np.int64)[b], array_at(words[Word.ends], b + 1, np.int64)[b]
    position = end - words[Word.length] + i
    low = max(start, position - words[Word.before]) if words[Word.before] >= 0 else start
    high = min(end, position + words[Word.after] + 1) if words[Word.after] >= 0 else end
    return position, low, max(low, high)


@jitable
def exponent_of(words, numbers, head, least_e, computing):
    """e of a head: at least `least_e`, or outside [0, 1] as it stands."""
    e = array_at(words[Word.e], head + 1, computing)[head] if words[Word.e] != 0 else computing(numbers[Word.e_value])
    return least_e if 0.0 <= e <= least_e else e


@jitable
def slope_of(words, b, head, computing):
    """ALiBi's slope of a head."""
    at = b * words[Word.alibi_batch] + head
    return array_at(words[Word.alibi], at + 1, computing)[at] if words[Word.alibi] != 0 else computing(0.0)


@jitable
def attend_together(words, numbers, memory, b, g, begin, count, least_e, computing):
    """Everything for some of the queries that share a key head: those from `begin` on, in the order of heads."""
    length, group, size, step = words[Word.length], words[Word.group], words[Word.page_size], words[Word.head_step]
    queries = numbers_at(words, memory, Word.queries, TOGETHER * step, computing)
    kind, stride, heads = words[Word.kind], words[Word.stride], words[Word.kv_heads] * group
    start, stop = 1 << 62, 0
    fill(queries, TOGETHER * step, 0.0, queries)
    for r in range(count):
        head, i = g * group + (begin + r) // length, (begin + r) % length
        at = b * words[Word.query_batch] + i * words[Word.query_row] + head * words[Word.query_head]
        at = words[Word.query] + at * bytes_of(kind, queries)
        copy_rows(at, kind, words[Word.head_dim], 1, words[Word.head_dim], numbers[Word.scale], queries[r * step :], step)
        _, low, high = seen(words, b, i)
        if low < high:
            start, stop = min(start, low), max(stop, high)
    first = start // size
    if start < stop and words[Word.codes] == 0:
        rate_by_boxes(words, memory, b, g, first, (stop + size - 1) // size, count, computing)
    elif start < stop:
        rate(words, memory, b, g, first, (stop + size - 1) // size, count, computing)
    sums = numbers_at(words, memory, Word.sums, TOGETHER * words[Word.value_step], computing)
    scores = numbers_at(words, memory, Word.scores, TOGETHER * stride, computing)
    read = array_at(memory + words[Word.read], words[Word.pages], np.uint8)
    whole = count  # from this query on all keys are read
    for r in range(count):
        head, i = g * group + (begin + r) // length, (begin + r) % length
        position, low, high = seen(words, b, i)
        e, slope = exponent_of(words, numbers, head, least_e, computing), slope_of(words, b, head, computing)
        exact, n, shift = numbers_at(words, memory, Word.exact, stride, computing), high - low, low - first * size
        if n > 0 and r < whole:
            rule_row(words, numbers, scores[r * stride + shift :], n, low - position, slope, True, computing)
            found = -1
            if 0.0 <= e <= 1.0:
                found = choose(words, numbers, memory, b, g, r, low, n, shift, position, head, slope, e, computing)
            if found < 0:
                whole = r
                score_whole(words, memory, b, g, first, start, stop, r, count, computing)
            else:
                n = found
        if r >= whole:
            exact = scores[r * stride + shift :] if n > 0 else scores[r * stride :]
            if n > 0:
                rule_row(words, numbers, exact, n, low - position, slope, False, computing)
                read[low // size : (high + size - 1) // size] = 1
        row = (b * heads + head) * length + i
        attend(words, memory, b, g, r, low, exact, n, r >= whole, head, row, e, computing)
        if r >= whole:  # nothing beside what it sees has a weight
            before = low - start if n > 0 else stop - start
            fill(scores[r * stride + start - first * size :], before, 0.0, sums)
            if n > 0:
                fill(scores[r * stride + high - first * size :], stop - high, 0.0, sums)
    if whole < count:
        add_whole(words, memory, b, g, first, start, stop, whole, count, computing)
    for r in range(count):
        head, i = g * group + (begin + r) // length, (begin + r) % length
        at = ((b * length + i) * heads + head) * words[Word.value_dim] * bytes_of(kind, queries)
        write_row(words[Word.out] + at, kind, words[Word.value_dim], sums[r * words[Word.value_step] :], computing(1.0))


def make_bounded(computing):
    """The kernel for tensors that are computed in `computing`, whatever they are stored as."""
    least_e = computing(MIN_E)

    def bounded(job):
        words, numbers = array_at(job, N_WORDS, np.int64), array_at(job, N_WORDS, np.float64)
        memory = words[Word.memory] + fetch_add(words, Word.slots, 1) * words[Word.slot_bytes]
        rows = words[Word.group] * words[Word.length]
        read = array_at(memory + words[Word.read], words[Word.pages], np.uint8)
        done, start, end = take(words, 0, 0, 0)
        while start < end:
            for task in range(start, end):
                b, g = task // words[Word.kv_heads], task % words[Word.kv_heads]
                if words[Word.checks] != 0:
                    if is_old(words, memory, b, g, computing):
                        words[Word.old] = b + 1
                    continue
                read[:] = 0
                append_new(words, memory, b, g, computing)
                for begin in range(0, rows, TOGETHER):
                    count = min(TOGETHER, rows - begin)
                    attend_together(words, numbers, memory, b, g, begin, count, least_e, computing)
                if words[Word.pages_read] != 0:
                    many = 0
                    for page in range(words[Word.pages]):
                        many += read[page]
                    array_at(words[Word.pages_read], task + 1, np.int32)[task] = many
            done, start, end = take(words, done, start, end)
        return finish(words, done)

    return bounded
