"""Attention's forward kernel: for each tile of queries the products with the keys, rules, rows, and the values' sums.

Rows are solved as the row operator's are: short lists of candidates side by side, long ones alone. A row of few weights
gathers the values of those; the others are multiplied with all values that they see.
"""

import math

import numpy as np

from diffmax.kernels.numba.attention_words import (
    Sequence,
    Word,
    apply_rules,
    exponent_of,
    floats,
    in_one_page,
    integer_of,
    integer_of_rows,
    keep_factor,
    own_memory,
    place,
    place_rows,
    row_places,
    rows_into,
    rows_of,
    sequence_of,
    sink_of,
    table_of,
    token_place,
    tokens_into,
    whole_numbers,
    words_of,
)
from diffmax.kernels.numba.functions import TINY, WHOLE
from diffmax.kernels.numba.gradient import slopes_and_weights
from diffmax.kernels.numba.jobs import finish, keep, take
from diffmax.kernels.numba.one_row import (
    DEAD,
    LISTED,
    candidates,
    fill,
    join,
    listed,
    one_by_one,
    scaled,
    side_by_side,
    tallied,
    top_of,
    write,
    write_nudged,
)
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.products import (
    DEPTH,
    ROWS,
    bytes_of,
    gather_rows,
    multiply_directly,
    multiply_panels,
    multiply_rows,
    pack,
    pack_panel,
    panel_width,
    write_row,
)
from diffmax.kernels.numba.simd import (
    array_at,
    bits,
    count_bits,
    larger,
    load,
    places,
    select,
    splat,
    store,
    total,
)
from diffmax.kernels.numba.solver import solve_alone, solve_group
from diffmax.operators.common.numerics import MIN_E
from diffmax.plugin import TILE

# A row with candidates among more than this share of its scores is multiplied with all values.
GATHERED_SHARE = 0.4
# Keys of the longest rows that are solved side by side, where 1 / (1 - alpha) is an integer; LISTED otherwise. Of n keys, that
# pays from a share of sqrt(n / GROUPED) times GATHERED_SHARE on: a list costs about as much, however few keys it leaves out.
# Not where a key is hidden: rows are multiplied with values that they do not see, of which one may be NaN.
GROUPED = 512
WORD_BITS = 32


@jitable
def slopes_of(z, weights, slopes, length, delta, e, integer):
    """Write p^alpha of a row; returns their sum.

    For small exponents from z, as the backward does: a weight's small error is a large one beside a small [z - t].
    """
    width, result = places(z), 0.0
    for block in range(0, length, 1024):
        part, stop = splat(z, 0.0), min(block + 1024, length)
        if not 0 < integer <= WHOLE and e < 0.25:
            for i in range(block, stop, width):
                w = load(z, i) - delta
                slope = select(w > -1.0, load(weights, i) / larger(w + 1.0, TINY), 0.0)
                store(slopes, i, slope)
                part = part + slope
        else:
            exponent = splat(z, e)
            k = 1.0 / exponent
            for i in range(block, stop, width):
                slope = slopes_and_weights(load(z, i) - delta, exponent, k, integer)[0]
                store(slopes, i, slope)
                part = part + slope
        result += total(part)
    return result


@jitable
def supported(z, length, delta):
    """How many entries have z > delta - 1."""
    result = 0
    for i in range(0, length, places(z)):
        result += count_bits(bits(load(z, i) - delta > -1.0))
    return result


@jitable
def touch(p, here, touched):
    """Mark the tiles of keys in which a row of weights holds one."""
    width = places(p)
    for tile in range(here.low // TILE, (here.high + TILE - 1) // TILE):
        if touched[tile] == 0:
            at = (max(tile * TILE, here.low) - here.base) // width * width
            last = min((tile + 1) * TILE, here.high) - here.base
            while at < last and bits(load(p, at) > 0.0) == 0:
                at += width
            touched[tile] = 1 if at < last else 0


@jitable
def note(words, row, found):
    """Write the size of a row's support, if it is wanted."""
    if words[Word.support] != 0:
        array_at(words[Word.support], row + 1, np.int32)[row] = found


@jitable
def tiles_touched(words, memory):
    """Which tiles of keys hold a weight of the tile of queries."""
    return whole_numbers(words, memory, Word.touched, 0, words[Word.tile_words] * WORD_BITS)


@jitable
def is_to_be_solved(words, memory, r, top, bad, e, here, computing):
    """Whether a row is to be solved; what is known without, of rows that see nothing or are spoilt, is written."""
    spoilt = bad or top == math.inf or not 0.0 <= e <= 1.0
    keep(words[Word.m], here.out_row + r, math.nan if bad else top, computing)
    if not spoilt and top != -math.inf:
        return True
    value = computing(math.nan) if spoilt else computing(0.0)
    keep(words[Word.delta], here.out_row + r, value, computing)
    note(words, here.out_row + r, 0)
    rows, size = words[Word.rows], words[Word.value_step]
    sums = floats(words, memory, Word.sums, 0, 2 * rows * size, computing)
    fill(sums[r * size :], size, value, sums)
    if words[Word.u] != 0:
        fill(sums[(rows + r) * size :], size, value, sums)
        floats(words, memory, Word.norms, 0, rows, computing)[r] = 1.0
    if spoilt:
        tiles_touched(words, memory)[here.low // TILE : (here.high + TILE - 1) // TILE] = 1
    return False


@jitable
def finish_whole(words, numbers, memory, x, slopes, r, here, computing):
    """Mark the tiles of a row of weights, and drop some."""
    if words[Word.live] != 0:
        touch(x, here, tiles_touched(words, memory))
    if words[Word.least_word] != 0:
        for i in range(here.low - here.base, here.high - here.base):
            if x[i] != 0.0:
                factor = keep_factor(words, numbers, here.base + i, here.first + r, here, computing)
                x[i] *= factor
                if words[Word.u] != 0:
                    slopes[i] *= factor


@jitable
def converts_some(words):
    """Whether values are converted when they are needed: of few queries, most are not."""
    return words[Word.direct] != 0 and not in_place(words)


@jitable
def in_place(words):
    """Whether values are read where they lie."""
    return words[Word.kind] == 0 and words[Word.value_dim] == words[Word.value_step] and words[Word.blocks] == 0


@jitable
def values_into(words, here, key, count, target, step):
    """Copy the values of `count` keys from `key` on, as numbers that one computes with."""
    kv_head = here.head // words[Word.group]
    tokens_into(words, Word.value, here.key_batch, kv_head, here.key_at + key, count, words[Word.value_dim], target, step)


@jitable
def finish_some(words, numbers, memory, weights, slopes, index, found, step, norm, r, here, values, value_step, computing):
    """Add up the values of the weights that are not 0: `found` of them, `step` apart, for the columns in `index`."""
    keeps, marks, drops = words[Word.u] != 0, words[Word.live] != 0, words[Word.least_word] != 0
    stride, size, rows = words[Word.stride], words[Word.value_step], words[Word.rows]
    some = whole_numbers(words, memory, Word.some, 0, stride)
    some_weights = floats(words, memory, Word.some_weights, 0, stride, computing)
    some_slopes = floats(words, memory, Word.some_slopes, 0, stride, computing)
    touched = tiles_touched(words, memory)
    taken = 0
    for i in range(found):
        weight = weights[i * step] * norm
        if weight != 0.0 and index[i] < here.padded:
            key = here.base + index[i]
            factor = keep_factor(words, numbers, key, here.first + r, here, computing) if drops else computing(1.0)
            if marks:
                touched[key // TILE] = 1
            some[taken] = key
            some_weights[taken] = weight * factor
            if keeps:
                some_slopes[taken] = slopes[i * step] * factor
            taken += 1
    sums = floats(words, memory, Word.sums, 0, 2 * rows * size, computing)
    at_once = min(DEPTH, taken) if converts_some(words) else taken
    for at in range(0, max(1, taken), max(1, at_once)):
        count = min(at_once, taken - at)
        if converts_some(words):
            for i in range(at, at + count):
                values_into(words, here, some[i], 1, values[(i - at) * value_step :], value_step)
                some[i] = i - at
        index, more = some[at:], at > 0
        gather_rows(some_weights[at:], index, count, values, value_step, sums, r * size, size, more)
        if keeps:
            gather_rows(some_slopes[at:], index, count, values, value_step, sums, (rows + r) * size, size, more)


@jitable
def solve_row(words, numbers, memory, x, found, r, top, e, here, values, value_step, computing):
    """Solve a row of too many candidates for a group, `found` as `listed` left them or -1, and add up its values.

    True if that is left to the product with all.
    """
    n, stride, keeps = here.n, words[Word.stride], words[Word.u] != 0
    z = floats(words, memory, Word.z, 0, stride, computing)
    weights = floats(words, memory, Word.weights, 0, stride, computing)
    other = floats(words, memory, Word.other, 0, stride, computing)
    row_slopes = floats(words, memory, Word.row_slopes, 0, stride, computing)
    index = whole_numbers(words, memory, Word.index, 0, stride)
    width = places(z)
    whole = found < 0
    length = ((n if whole else found) + width - 1) // width * width
    tallies = scaled(x, n, top, e, z) if whole else tallied(z, length, e)
    integer = integer_of(words, here.head, here.first + r)
    delta, s, d = solve_alone(z, weights, other, length, tallies, e, integer, words[Word.steps])
    if d != 0.0:
        write_nudged(weights, length, weights, z, delta, d, 1.0 / e)
    else:
        write(weights, length, weights, 1.0 / s)
    keep(words[Word.delta], here.out_row + r, delta, computing)
    if keeps:
        norm = slopes_of(z, weights, row_slopes, length, delta, e, integer)
        floats(words, memory, Word.norms, 0, words[Word.rows], computing)[r] = norm
    if words[Word.support] != 0:
        in_sink = 1 if n > here.padded and (x[here.padded] - top) * e - delta > -1.0 else 0
        note(words, here.out_row + r, supported(z, length, delta) - in_sink)
    if whole:
        slopes = floats(words, memory, Word.slopes, r * stride, stride, computing)
        for i in range(0, n, width):
            store(x, i, load(weights, i))
            if keeps:
                store(slopes, i, load(row_slopes, i))
        finish_whole(words, numbers, memory, x, slopes, r, here, computing)
    else:
        finish_some(
            *(words, numbers, memory, weights, row_slopes, index, found, 1, computing(1.0), r, here, values, value_step),
            computing,
        )
    return whole


@jitable
def solve_lists(words, memory, lanes, first, some_rows, longest, here, computing):
    """Solve the rows whose lists stand side by side, of `longest` entries at most; the slopes are theirs in the end.

    `lanes` holds vectors with a number for each row: how many entries, e, and then delta, and what weights are multiplied by.
    """
    list_z = floats(words, memory, Word.list_z, 0, longest * places(lanes), computing)
    weights = floats(words, memory, Word.list_weights, 0, longest * places(lanes), computing)
    slopes = floats(words, memory, Word.list_slopes, 0, longest * places(lanes), computing)
    norms = floats(words, memory, Word.norms, 0, words[Word.rows], computing)
    width, keeps, integer = places(lanes), words[Word.u] != 0, integer_of_rows(words, here.head)
    deltas, totals = solve_group(
        list_z, weights, slopes, longest, load(lanes, 0), load(lanes, width), integer, words[Word.steps]
    )
    factors = 1.0 / totals
    store(lanes, 2 * width, deltas)
    store(lanes, 3 * width, factors)
    if keeps:
        totals, e = splat(lanes, 0.0), load(lanes, width)
        k = 1.0 / e
        for i in range(0, longest * width, width):
            slope = slopes_and_weights(load(list_z, i) - deltas, e, k, integer)[0]
            store(slopes, i, slope)
            totals = totals + slope
        store(lanes, 4 * width, totals)
    for lane in range(some_rows):
        if lanes[lane] > 0:
            keep(words[Word.delta], here.out_row + first + lane, lanes[2 * width + lane], computing)
            if keeps:
                norms[first + lane] = lanes[4 * width + lane]


@jitable
def attend_lists(words, numbers, memory, lanes, first, some_rows, longest, here, values, value_step, computing):
    """Solve rows whose candidates are listed, and add up their values."""
    width = places(lanes)
    size = LISTED * width
    list_z = floats(words, memory, Word.list_z, 0, size, computing)
    list_weights = floats(words, memory, Word.list_weights, 0, size, computing)
    list_slopes = floats(words, memory, Word.list_slopes, 0, size, computing)
    list_index = whole_numbers(words, memory, Word.list_index, 0, size)
    solve_lists(words, memory, lanes, first, some_rows, longest, here, computing)
    for lane in range(some_rows):
        found = int(lanes[lane])
        if found > 0:
            r = first + lane
            index = list_index[lane * LISTED :]
            if words[Word.support] != 0:
                supports = 0
                for i in range(found):
                    if list_z[i * width + lane] - lanes[2 * width + lane] > -1.0 and index[i] < here.padded:
                        supports += 1
                note(words, here.out_row + r, supports)
            finish_some(
                *(words, numbers, memory, list_weights[lane:], list_slopes[lane:], index, found, width),
                *(lanes[3 * width + lane], r, here, values, value_step, computing),
            )


@jitable
def attend_short(words, numbers, memory, lanes, first, some_rows, here, computing):
    """Solve rows of few keys, of which most are candidates: all their scores side by side."""
    n, keeps, stride, width = here.n, words[Word.u] != 0, words[Word.stride], places(lanes)
    list_z = floats(words, memory, Word.list_z, 0, n * width, computing)
    list_weights = floats(words, memory, Word.list_weights, 0, n * width, computing)
    list_slopes = floats(words, memory, Word.list_slopes, 0, n * width, computing)
    scores = floats(words, memory, Word.scores, first * stride, width * stride, computing)
    slopes = floats(words, memory, Word.slopes, first * stride, width * stride, computing)
    side_by_side(scores, stride, n, list_z, load(lanes, 5 * width), load(lanes, width))
    solve_lists(words, memory, lanes, first, some_rows, n, here, computing)
    deltas, supports, one = load(lanes, 2 * width), splat(lanes, 0.0), splat(lanes, 1.0)
    for i in range(0, here.padded * width, width):
        supports = supports + select(load(list_z, i) - deltas > -1.0, one, 0.0)
    store(lanes, 6 * width, supports)
    one_by_one(list_weights, scores, stride, n, load(lanes, 3 * width))
    if keeps:
        one_by_one(list_slopes, slopes, stride, n, one)
    for lane in range(some_rows):
        if lanes[lane] > 0:
            note(words, here.out_row + first + lane, int(lanes[6 * width + lane]))
            row, row_slopes = scores[lane * stride :], slopes[lane * stride :]
            finish_whole(words, numbers, memory, row, row_slopes, first + lane, here, computing)


@jitable
def add_each(words, memory, n_dense, left, values, at, value_step, column, count, right, more, computing):
    """Add up neighbouring values for each of a few rows: a product would compute as many as it has rows in registers."""
    stride, size, rows = words[Word.stride], words[Word.value_step], words[Word.rows]
    scores = floats(words, memory, Word.scores, 0, rows * stride, computing)
    sums = floats(words, memory, Word.sums, 0, (2 * rows + 1) * size, computing)
    index = whole_numbers(words, memory, Word.some, 0, stride)
    for i in range(count):
        index[i] = i
    for i in range(n_dense):
        gather_rows(scores[left[i] + column :], index, count, values[at:], value_step, sums, right[i], size, more)


@jitable
def multiply_dense(words, memory, n_dense, here, values, value_step, computing):
    """Multiply the rows that are left with all values that they see."""
    rows, stride, size = words[Word.rows], words[Word.stride], words[Word.value_step]
    dense = row_places(words, memory, Word.dense, rows)
    left, right = (
        row_places(words, memory, Word.left_rows, rows + ROWS),
        row_places(words, memory, Word.right_rows, rows + ROWS),
    )
    scores = floats(words, memory, Word.scores, 0, rows * stride, computing)
    sums = floats(words, memory, Word.sums, 0, (2 * rows + 1) * size, computing)
    together = (n_dense + ROWS - 1) // ROWS * ROWS
    for i in range(together):  # what fills up the last rows of a tile is written behind the others
        r = dense[min(i, n_dense - 1)]
        left[i] = r * stride + here.low - here.base
        right[i] = r * size if i < n_dense else 2 * rows * size
    slopes = floats(words, memory, Word.slopes, 0, rows * stride if words[Word.u] != 0 else 0, computing)
    if here.low == here.high:  # they see a sink alone
        for i in range(n_dense):
            fill(sums[right[i] :], size, 0.0, sums)
            if words[Word.u] != 0:
                fill(sums[rows * size + right[i] :], size, 0.0, sums)
        return
    at_once = DEPTH if converts_some(words) else here.high - here.low
    for first in range(here.low, here.high, at_once):
        count, at, more, column = min(at_once, here.high - first), first * value_step, first > here.low, first - here.low
        if converts_some(words):
            values_into(words, here, first, count, values, value_step)
            at = 0
        if n_dense < ROWS // 2 and words[Word.u] == 0:
            add_each(words, memory, n_dense, left, values, at, value_step, column, count, right, more, computing)
            continue
        multiply_rows(scores[column:], left, 1, together, values, at, value_step, count, sums, right, size, more)
        if words[Word.u] != 0:
            for i in range(n_dense):
                right[i] += rows * size
            multiply_rows(slopes[column:], left, 1, together, values, at, value_step, count, sums, right, size, more)
            for i in range(n_dense):
                right[i] -= rows * size


@jitable
def score_directly(words, memory, queries, left, scores, right, here, computing):
    """The products of `score_rows` with the keys as they lie, some at a time, which stay in the nearest cache."""
    step, depth, kind, key_row = words[Word.head_step], words[Word.head_dim], words[Word.kind], words[Word.key_row]
    across = panel_width(queries)
    copied = floats(words, memory, Word.pack_rows, 0, across * step, computing)
    kv_head, itemsize = here.head // words[Word.group], bytes_of(kind, queries)
    for first in range(here.base, here.high, across):
        count, token = min(across, here.high - first), here.key_at + first
        keys, key_step = copied, step
        if kind == 0 and depth == step and in_one_page(words, token, count) == count:
            at = token_place(words, Word.key, here.key_batch, kv_head, token, itemsize)
            keys, key_step = array_at(at, count * key_row + depth, computing), key_row
        else:
            tokens_into(words, Word.key, here.key_batch, kv_head, token, count, depth, copied, step)
        multiply_directly(queries, left, here.count, keys, key_step, count, step, scores, right, first - here.base)


@jitable
def pack_keys(words, batch, head, key_at, keys, panels, rows):
    """Write the keys of a sequence and a head as panels."""
    depth, step, kind = words[Word.head_dim], words[Word.head_step], words[Word.kind]
    if words[Word.blocks] == 0:
        at = place(words, Word.key, batch, head, key_at, bytes_of(kind, panels))
        pack(at, kind, words[Word.key_row], keys, depth, panels, rows, step)
        return
    across = panel_width(panels)
    for first in range(0, keys, across):
        some = min(across, keys - first)
        tokens_into(words, Word.key, batch, head, key_at + first, some, depth, rows, step)
        pack_panel(rows, some, depth, panels[first * depth :], step)


@jitable
def score_rows(words, numbers, memory, here, computing):
    """Scaled products of the rows' queries and the keys that they see."""
    step, depth, rows, stride = words[Word.head_step], words[Word.head_dim], words[Word.rows], words[Word.stride]
    queries = floats(words, memory, Word.query_rows, 0, rows * step, computing)
    panels = floats(words, memory, Word.panels, 0, words[Word.longest] * depth, computing)
    scores = floats(words, memory, Word.scores, 0, rows * stride, computing)
    query = here.query_at + here.first
    rows_into(words, Word.query, here.batch, here.head, query, here.count, depth, numbers[Word.scale], queries, step)
    together = (here.count + ROWS - 1) // ROWS * ROWS
    queries[here.count * step : together * step] = 0.0
    left = place_rows(words, memory, Word.left_rows, together, step)
    right = place_rows(words, memory, Word.right_rows, together, stride)
    if words[Word.direct] != 0:
        score_directly(words, memory, queries, left, scores, right, here, computing)
        return
    multiply_panels(queries, left, together, panels, depth, here.base, here.base + here.padded, scores, right)


@jitable
def attend_rows(words, numbers, memory, lanes, least_e, here, values, value_step, computing):
    """Everything for some rows of queries of one head."""
    width, stride, n, padded = places(lanes), words[Word.stride], here.n, here.padded
    if padded > 0:
        score_rows(words, numbers, memory, here, computing)
    dense = row_places(words, memory, Word.dense, words[Word.rows])
    nothing = floats(words, memory, Word.z, 0, 0, computing)
    more = floats(words, memory, Word.z, 0, stride, computing)
    z, index = floats(words, memory, Word.z, 0, stride, computing), whole_numbers(words, memory, Word.index, 0, stride)
    list_z = floats(words, memory, Word.list_z, 0, LISTED * width, computing)
    list_index = whole_numbers(words, memory, Word.list_index, 0, LISTED * width)
    n_dense, groups = 0, n <= (GROUPED if 0 < integer_of_rows(words, here.head) <= WHOLE else LISTED)
    hides = words[Word.left] >= 0 or words[Word.right] >= 0 or words[Word.mask] != 0 or words[Word.bias] != 0
    shared = GATHERED_SHARE * (1.0 if hides else math.sqrt(n / GROUPED))
    for first in range(0, here.count, width):
        some_rows = min(width, here.count - first)
        n_candidates, n_solved, longest = 0, 0, 0
        fill(lanes, 2 * width, 0.5, lanes)
        for lane in range(width):
            lanes[lane] = 0.0
        for lane in range(some_rows):
            r = first + lane
            x = floats(words, memory, Word.scores, r * stride, stride, computing)
            if padded > 0:
                apply_rules(words, numbers, x, nothing, more, here, here.base, padded, here.first + r, computing)
            if n > padded:
                fill(x[padded:], width, -math.inf, x)
                x[padded] = sink_of(words, here.head, here.first + r, computing)
            top, bad = top_of(x, n) if n > 0 else (computing(-math.inf), False)
            e = exponent_of(words, numbers, here.head, here.first + r, least_e, computing)
            if is_to_be_solved(words, memory, r, top, bad, e, here, computing):
                lanes[lane], lanes[width + lane], lanes[5 * width + lane] = 1.0, e, top
                n_solved += 1
                if groups:
                    n_candidates += candidates(x, n, top, e)
        if n_candidates > n_solved * n * shared:
            attend_short(words, numbers, memory, lanes, first, some_rows, here, computing)
            for lane in range(some_rows):
                if lanes[lane] > 0:
                    dense[n_dense] = first + lane
                    n_dense += 1
            continue
        fill(list_z, LISTED * width, DEAD, lanes)
        for lane in range(some_rows):
            if lanes[lane] > 0:
                r, e, top = first + lane, lanes[width + lane], lanes[5 * width + lane]
                x = floats(words, memory, Word.scores, r * stride, stride, computing)
                found = listed(x, n, top, e, z, index, GATHERED_SHARE)
                if 0 <= found <= LISTED:
                    join(found, z, index, list_z, list_index, lane)
                    lanes[lane] = found
                    longest = max(longest, found)
                    continue
                lanes[lane] = 0.0
                if solve_row(words, numbers, memory, x, found, r, top, e, here, values, value_step, computing):
                    dense[n_dense] = r
                    n_dense += 1
        if longest > 0:
            attend_lists(words, numbers, memory, lanes, first, some_rows, longest, here, values, value_step, computing)
    if n_dense > 0:
        multiply_dense(words, memory, n_dense, here, values, value_step, computing)


@jitable
def write_rows(words, memory, here, computing):
    """Write the rows' results."""
    kind, size, step, rows = words[Word.kind], words[Word.value_dim], words[Word.value_step], words[Word.rows]
    sums = floats(words, memory, Word.sums, 0, 2 * rows * step, computing)
    norms = floats(words, memory, Word.norms, 0, rows, computing)
    for r in range(here.count):
        at = (here.out_row + r) * size * bytes_of(kind, sums)
        write_row(words[Word.out] + at, kind, size, sums[r * step :], computing(1.0))
        if words[Word.u] != 0:
            share = 1.0 / norms[r] if norms[r] != 0.0 else computing(0.0)
            write_row(words[Word.u] + at, kind, size, sums[(rows + r) * step :], share)


@jitable
def write_live(words, tile, touched):
    """Write a tile of queries' bits."""
    count = words[Word.tile_words]
    live = array_at(words[Word.live] + 4 * tile * count, count, np.int32)
    for w in range(count):
        word = 0
        for i in range(WORD_BITS):
            word |= int(touched[w * WORD_BITS + i]) << i
        live[w] = np.int32(word)


def make_forward(computing):
    """The kernel for tensors that are computed in `computing`, whatever they are stored as."""
    least_e = computing(MIN_E)

    def forward(job):
        words, numbers = words_of(job)
        memory, table = own_memory(words), table_of(words)
        kv_heads, depth, size, value_step = (
            words[Word.kv_heads],
            words[Word.head_dim],
            words[Word.value_dim],
            words[Word.value_step],
        )
        panels = floats(words, memory, Word.panels, 0, words[Word.longest] * depth, computing)
        copied = floats(words, memory, Word.value_rows, 0, words[Word.longest] * value_step, computing)
        pack_rows = floats(words, memory, Word.pack_rows, 0, panel_width(panels) * words[Word.head_step], computing)
        lanes = floats(words, memory, Word.lanes, 0, 8 * places(panels), computing)
        touched = tiles_touched(words, memory)
        values, step = copied, value_step
        held = -1
        done, start, end = take(words, 0, 0, 0)
        while start < end:
            for task in range(start, end):
                sequence = sequence_of(table, words[Word.sequences], task)
                keys, key_batch, key_at = sequence[Sequence.keys], sequence[Sequence.key_batch], sequence[Sequence.key_at]
                local = task - sequence[Sequence.first_task]
                tiles = (sequence[Sequence.length] + TILE - 1) // TILE
                tile, head = local % tiles, local // tiles
                kv_head = head // words[Word.group]
                if held != sequence[Sequence.first_task] * kv_heads + kv_head:
                    held = sequence[Sequence.first_task] * kv_heads + kv_head
                    if words[Word.direct] == 0:
                        pack_keys(words, key_batch, kv_head, key_at, keys, panels, pack_rows)
                    if in_place(words):
                        step = words[Word.value_row]
                        at = place(words, Word.value, key_batch, kv_head, key_at, panels.itemsize)
                        values = array_at(at, keys * step + size, computing)
                    elif not converts_some(words):
                        tokens_into(words, Word.value, key_batch, kv_head, key_at, keys, size, copied, value_step)
                touched[:] = 0
                last = min((tile + 1) * TILE, sequence[Sequence.length])
                for first in range(tile * TILE, last, words[Word.rows]):
                    until = min(first + words[Word.rows], last)
                    here = rows_of(words, sequence, head, first, until, panel_width(panels), places(panels), 0)
                    attend_rows(words, numbers, memory, lanes, least_e, here, values, step, computing)
                    write_rows(words, memory, here, computing)
                if words[Word.live] != 0:
                    of_head = (sequence[Sequence.batch] * kv_heads * words[Word.group] + head) * words[Word.tiles]
                    write_live(words, of_head + sequence[Sequence.tile_at] + tile, touched)
            done, start, end = take(words, done, start, end)
        return finish(words, done)

    return forward
