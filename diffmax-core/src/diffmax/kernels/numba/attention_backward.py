"""Attention's backward kernel: a thread takes a head of keys, and for each tile of queries the tiles of keys with a weight.

Of these it computes the scores and the weights once more. Where many are not 0 the gradients are products of matrices;
where few are, sums over those weights alone. Eq. 5 and 6 of docs/theory.md.
"""

import math

import numpy as np

from diffmax.kernels.numba.attention_words import (
    Sequence,
    Word,
    apply_rules,
    exponent_of,
    floats,
    integer_of,
    keep_factor,
    own_memory,
    place,
    place_rows,
    rows_into,
    rows_of,
    sequence_of,
    sink_of,
    table_of,
    whole_numbers,
    words_of,
)
from diffmax.kernels.numba.gradient import weights_again
from diffmax.kernels.numba.jobs import finish, keep, take
from diffmax.kernels.numba.one_row import fill
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.products import (
    ROWS,
    bytes_of,
    copy_rows,
    gather_rows,
    multiply_panels,
    multiply_rows,
    pack,
    panel_width,
    scatter_rows,
    write_row,
)
from diffmax.kernels.numba.simd import array_at, bits, count_bits, load, places, size_of, splat, store, total
from diffmax.operators.common.numerics import MIN_E
from diffmax.plugin import TILE

# Below this share of weights that are not 0, sums over those alone are faster than products of matrices.
GATHERED_SHARE = 0.25
# Keys whose scores are computed at a time.
STRETCH = 2 * TILE
WORD_BITS = 32


@jitable
def dot(a, a_at, b, b_at, size):
    """The scalar product of `size` numbers, whole vectors of them."""
    width = places(a)
    result = splat(a, 0.0)
    for j in range(0, size, width):
        result = result + load(a, a_at + j) * load(b, b_at + j)
    return total(result)


@jitable
def is_finite(row, start, size):
    """Whether all of `size` numbers, whole vectors of them, are."""
    for j in range(start, start + size, places(row)):
        v = load(row, j)
        if bits((v - v) * (v - v) > -1.0) != (1 << places(row)) - 1:
            return False
    return True


@jitable
def rows_are_finite(words, memory, here, computing):
    """Whether all queries, and all gradients of their results, are."""
    step, value_step = words[Word.head_step], words[Word.value_step]
    queries = floats(words, memory, Word.query_rows, 0, here.count * step, computing)
    grads = floats(words, memory, Word.grad_rows, 0, here.count * value_step, computing)
    return is_finite(queries, 0, here.count * step) and is_finite(grads, 0, here.count * value_step)


@jitable
def read_rows(words, numbers, memory, here, computing):
    """Copy the rows' queries and gradients."""
    step, value_step, rows = words[Word.head_step], words[Word.value_step], words[Word.rows]
    depth, size = words[Word.head_dim], words[Word.value_dim]
    queries = floats(words, memory, Word.query_rows, 0, rows * step, computing)
    grads = floats(words, memory, Word.grad_rows, 0, rows * value_step, computing)
    means = floats(words, memory, Word.means, 0, rows, computing)
    sums = floats(words, memory, Word.sums, 0, rows * step, computing)
    query = here.query_at + here.first
    rows_into(words, Word.query, here.batch, here.head, query, here.count, depth, numbers[Word.scale], queries, step)
    rows_into(words, Word.grad, here.batch, here.head, query, here.count, size, 1.0, grads, value_step)
    together = (here.count + ROWS - 1) // ROWS * ROWS
    queries[here.count * step : together * step] = 0.0
    grads[here.count * value_step : together * value_step] = 0.0
    sums[: together * step] = 0.0
    return grads, means


@jitable
def live_until(words, tile_at, tile, stop):
    """Whether a tile of keys holds a weight, and where those end that follow it and do too: at `stop` at the latest."""
    if words[Word.live] == 0:
        return True, stop
    count = words[Word.tile_words]
    live = array_at(words[Word.live] + 4 * tile_at * count, count, np.int32)
    first = (live[tile // WORD_BITS] >> (tile % WORD_BITS)) & 1
    end = tile + 1
    while first and end < stop and (live[end // WORD_BITS] >> (end % WORD_BITS)) & 1:
        end += 1
    return first != 0, end


@jitable
def recompute(words, memory, place_of, r, e, here, n, computing):
    """Weights and slopes once more, of `n` scores in a row of the scratch memory that are row r's; False if they are NaN."""
    stride = words[Word.stride]
    x = floats(words, memory, Word.scores, place_of * stride, stride, computing)
    p = floats(words, memory, Word.weights, place_of * stride, stride, computing)
    s = floats(words, memory, Word.slopes, place_of * stride, stride, computing)
    row = here.out_row + r
    m, delta = array_at(words[Word.m], row + 1, computing)[row], array_at(words[Word.delta], row + 1, computing)[row]
    if delta != delta:
        for part in (p, s, x):
            fill(part, n, math.nan, x)
        return False
    top = m if m != -math.inf else computing(0.0)
    integer = integer_of(words, here.head, 0)
    weights_again(x, p, s, 0, n, splat(x, e), top, delta, integer, words[Word.grad_e] != 0)
    return True


@jitable
def weigh(words, memory, r, e, here, base, n, computing):
    """Compute a row's weights and slopes once more, from its scores; returns how many weights are not 0."""
    stride = words[Word.stride]
    p = floats(words, memory, Word.weights, r * stride, stride, computing)
    if not recompute(words, memory, r, r, e, here, n, computing):  # NaN for the keys that some row here sees
        first, last = max(here.low - base, 0), min(here.high - base, n)
        for kind in (Word.weights, Word.slopes, Word.scores):
            row = floats(words, memory, kind, r * stride, stride, computing)
            row[:first] = 0.0
            row[last:n] = 0.0
        return last - first
    count = 0
    for i in range(0, n, places(p)):
        count += count_bits(bits(load(p, i) > 0.0))
    return count


@jitable
def drop_some(words, numbers, memory, r, here, base, n, computing):
    """Let dropout act on a row's weights and on their gradients."""
    stride = words[Word.stride]
    p = floats(words, memory, Word.weights, r * stride, stride, computing)
    d_p = floats(words, memory, Word.gradients, r * stride, stride, computing)
    for i in range(n):
        if p[i] != 0.0:
            factor = keep_factor(words, numbers, base + i, here.first + r, here, computing)
            p[i] *= factor
            d_p[i] *= factor


@jitable
def centre(words, memory, r, here, base, n, mean, computing):
    """ds = s (dP - mean), times the softcap's slope; returns the sum of w (dP - mean) of Eq. 6, if that is wanted."""
    stride = words[Word.stride]
    s = floats(words, memory, Word.slopes, r * stride, stride, computing)
    d_p = floats(words, memory, Word.gradients, r * stride, stride, computing)
    w = floats(words, memory, Word.scores, r * stride, stride, computing)
    capped = floats(words, memory, Word.capped, r * stride, stride, computing)
    softcap = words[Word.softcap] != 0
    part = splat(s, 0.0)
    for i in range(0, n, places(s)):
        centred = load(d_p, i) - mean
        if words[Word.grad_e] != 0:
            part = part + load(w, i) * centred
        store(s, i, load(s, i) * centred)
    if words[Word.grad_bias] != 0:
        add_to_bias(words, s, r, here, base, min(n, here.keys - base), computing)
    if softcap:
        for i in range(0, n, places(s)):
            store(s, i, load(s, i) * load(capped, i))
    return total(part)


@jitable
def bias_gradient(words, here, r, computing):
    """Address of the row that a row's gradients are added to, and the step from key to key: 0 for one sum."""
    row = here.query_at + here.first + r
    at = place(words, Word.grad_bias, here.batch, here.head, row, size_of(computing))
    return at + here.share, words[Word.grad_bias_key]


@jitable
def add_to_bias(words, s, r, here, base, n, computing):
    """Add a row's gradients to the bias's."""
    address, step = bias_gradient(words, here, r, computing)
    if step == 0:
        target = array_at(address, 1, computing)
        for i in range(n):
            target[0] += s[i]
    else:
        target = array_at(address, base + n, computing)
        whole = n // places(s) * places(s)
        for i in range(0, whole, places(s)):
            store(target, base + i, load(target, base + i) + load(s, i))
        for i in range(whole, n):
            target[base + i] += s[i]


@jitable
def products_of(words, numbers, memory, here, base, n, keys, key_step, computing):
    """The gradients of the keys from `base` on, `n` of them, and the queries' shares, as products of matrices."""
    step, value_step, rows, stride = words[Word.head_step], words[Word.value_step], words[Word.rows], words[Word.stride]
    size, longest = words[Word.value_dim], words[Word.longest]
    queries = floats(words, memory, Word.query_rows, 0, rows * step, computing)
    grads = floats(words, memory, Word.grad_rows, 0, rows * value_step, computing)
    value_panels = floats(words, memory, Word.value_panels, 0, longest * size, computing)
    d_p = floats(words, memory, Word.gradients, 0, rows * stride, computing)
    p = floats(words, memory, Word.weights, 0, rows * stride, computing)
    s = floats(words, memory, Word.slopes, 0, rows * stride, computing)
    sums = floats(words, memory, Word.sums, 0, rows * step, computing)
    means = floats(words, memory, Word.means, 0, rows, computing)
    row_sums = floats(words, memory, Word.row_sums, 0, rows, computing)
    key_sums = floats(words, memory, Word.key_sums, base * step, n * step, computing)
    value_sums = floats(words, memory, Word.value_sums, base * value_step, n * value_step, computing)
    together = (here.count + ROWS - 1) // ROWS * ROWS
    left = place_rows(words, memory, Word.left_rows, together, value_step)
    score_places = place_rows(words, memory, Word.right_rows, together, stride)
    multiply_panels(grads, left, together, value_panels, size, base, base + n, d_p, score_places)
    for r in range(here.count):
        if words[Word.least_word] != 0:
            drop_some(words, numbers, memory, r, here, base, n, computing)
        row_sums[r] += centre(words, memory, r, here, base, n, means[r], computing)
    for r in range(here.count, together):
        fill(s[r * stride :], n, 0.0, s)
    left = place_rows(words, memory, Word.left_rows, together, step)
    inside = min(n, here.keys - base)
    multiply_rows(s, score_places, 1, together, keys, base * key_step, key_step, inside, sums, left, step, True)
    columns = place_rows(words, memory, Word.left_rows, n, 1)
    right = place_rows(words, memory, Word.right_rows, n, value_step)
    multiply_rows(p, columns, stride, n, grads, 0, value_step, here.count, value_sums, right, value_step, True)
    right = place_rows(words, memory, Word.right_rows, n, step)
    multiply_rows(s, columns, stride, n, queries, 0, step, here.count, key_sums, right, step, True)


@jitable
def sums_over_few(words, numbers, memory, r, here, base, n, keys, key_step, values, value_row, computing):
    """A row's gradients as sums over its weights that are not 0."""
    step, value_step, stride, longest = words[Word.head_step], words[Word.value_step], words[Word.stride], words[Word.longest]
    p = floats(words, memory, Word.weights, r * stride, stride, computing)
    s = floats(words, memory, Word.slopes, r * stride, stride, computing)
    w = floats(words, memory, Word.scores, r * stride, stride, computing)
    capped = floats(words, memory, Word.capped, r * stride, stride, computing)
    query = floats(words, memory, Word.query_rows, r * step, step, computing)
    grad = floats(words, memory, Word.grad_rows, r * value_step, value_step, computing)
    sums = floats(words, memory, Word.sums, r * step, step, computing)
    key_sums = floats(words, memory, Word.key_sums, 0, longest * step, computing)
    value_sums = floats(words, memory, Word.value_sums, 0, longest * value_step, computing)
    mean = floats(words, memory, Word.means, r, 1, computing)[0]
    row_sums = floats(words, memory, Word.row_sums, r, 1, computing)
    some = whole_numbers(words, memory, Word.some, 0, stride)
    weights = floats(words, memory, Word.some_weights, 0, stride, computing)
    slopes = floats(words, memory, Word.some_slopes, 0, stride, computing)
    drops, softcap = words[Word.least_word] != 0, words[Word.softcap] != 0
    taken = 0
    for i in range(n):
        if p[i] != 0.0:
            key = base + i
            factor = keep_factor(words, numbers, key, here.first + r, here, computing) if drops else computing(1.0)
            centred = dot(grad, 0, values, key * value_row, value_step) * factor - mean
            if words[Word.grad_e] != 0:
                row_sums[0] += w[i] * centred
            if words[Word.grad_bias] != 0:
                address, key_step_of_bias = bias_gradient(words, here, r, computing)
                array_at(address, key * key_step_of_bias + 1, computing)[key * key_step_of_bias] += s[i] * centred
            some[taken], weights[taken] = key, p[i] * factor
            slopes[taken] = s[i] * centred * (capped[i] if softcap else computing(1.0))
            taken += 1
    gather_rows(slopes, some, taken, keys, key_step, sums, 0, step, True)
    scatter_rows(weights, some, taken, grad, value_sums, value_step, value_step)
    scatter_rows(slopes, some, taken, query, key_sums, step, step)


@jitable
def stretch(words, numbers, memory, e, here, base, n, plain, keys, key_step, values, value_row, computing):
    """What the keys from `base` on, `n` of them in whole panels, have to do with some rows of queries."""
    step, rows, stride, depth = words[Word.head_step], words[Word.rows], words[Word.stride], words[Word.head_dim]
    queries = floats(words, memory, Word.query_rows, 0, rows * step, computing)
    panels = floats(words, memory, Word.panels, 0, words[Word.longest] * depth, computing)
    scores = floats(words, memory, Word.scores, 0, rows * stride, computing)
    more = floats(words, memory, Word.some_weights, 0, stride, computing)
    together = (here.count + ROWS - 1) // ROWS * ROWS
    left = place_rows(words, memory, Word.left_rows, together, step)
    right = place_rows(words, memory, Word.right_rows, together, stride)
    multiply_panels(queries, left, together, panels, depth, base, base + n, scores, right)
    counts = whole_numbers(words, memory, Word.index, 0, rows)
    weighted = whole_numbers(words, memory, Word.weighted, 0, rows)
    found = 0
    for r in range(here.count):
        x = scores[r * stride : (r + 1) * stride]
        capped = floats(words, memory, Word.capped, r * stride, stride if words[Word.softcap] != 0 else 0, computing)
        apply_rules(words, numbers, x, capped, more, here, base, n, here.first + r, computing)
        counts[r] = weigh(words, memory, r, e, here, base, n, computing)
        found += counts[r]
        weighted[r] += counts[r]
    if found > GATHERED_SHARE * here.count * n and plain:
        products_of(words, numbers, memory, here, base, n, keys, key_step, computing)
        return
    for r in range(here.count):
        if counts[r] > 0:
            sums_over_few(words, numbers, memory, r, here, base, n, keys, key_step, values, value_row, computing)


@jitable
def differentiate_rows(words, numbers, memory, e, here, live_row, keys, key_step, values, value_row, computing):
    """Everything for some rows of queries of one head."""
    rows = words[Word.rows]
    grads, means = read_rows(words, numbers, memory, here, computing)
    row_sums = floats(words, memory, Word.row_sums, 0, rows, computing)
    row_sums[:] = 0.0
    whole_numbers(words, memory, Word.weighted, 0, rows)[:] = 0
    size, value_step, kind = words[Word.value_dim], words[Word.value_step], words[Word.kind]
    saved = floats(words, memory, Word.pack_rows, 0, value_step, computing)
    for r in range(here.count):
        at = words[Word.u] + (here.out_row + r) * size * bytes_of(kind, saved)
        copy_rows(at, kind, size, 1, size, 1.0, saved, value_step)
        means[r] = dot(grads, r * value_step, saved, 0, value_step)
    plain = rows_are_finite(words, memory, here, computing)
    tile, stop = here.low // TILE, (here.high + TILE - 1) // TILE if here.high > here.low else here.low // TILE
    while tile < stop:
        is_live, end = live_until(words, live_row, tile, stop)
        if is_live:
            first, last = max(tile * TILE, here.base), min(end * TILE, here.base + here.padded)
            for base in range(first, last, STRETCH):
                n = min(STRETCH, last - base)
                stretch(words, numbers, memory, e, here, base, n, plain, keys, key_step, values, value_row, computing)
        tile = end
    finish_rows(words, numbers, memory, e, here, computing)


@jitable
def finish_rows(words, numbers, memory, e, here, computing):
    """Write what the rows alone are differentiated for: queries, e, the sink."""
    step, depth, kind = words[Word.head_step], words[Word.head_dim], words[Word.kind]
    sums = floats(words, memory, Word.sums, 0, words[Word.rows] * step, computing)
    means = floats(words, memory, Word.means, 0, words[Word.rows], computing)
    row_sums = floats(words, memory, Word.row_sums, 0, words[Word.rows], computing)
    weighted = whole_numbers(words, memory, Word.weighted, 0, words[Word.rows])
    scale = computing(numbers[Word.scale])
    for r in range(here.count):
        if weighted[r] == 0:  # whatever its gradient holds does not count
            means[r] = 0.0
        at = words[Word.grad_query] + (here.out_row + r) * depth * bytes_of(kind, sums)
        write_row(at, kind, depth, sums[r * step :], scale)
        of_e, of_sink = -row_sums[r], computing(0.0)
        if words[Word.sink] != 0 and (words[Word.grad_e] != 0 or words[Word.grad_sink] != 0):
            x = floats(words, memory, Word.scores, 0, words[Word.stride], computing)
            fill(x, places(x), sink_of(words, here.head, 0, computing), x)
            recompute(words, memory, 0, r, e, here, places(x), computing)
            s = floats(words, memory, Word.slopes, 0, 1, computing)[0]
            of_sink = -s * means[r]
            if words[Word.grad_e] != 0:
                of_e += x[0] * means[r]
        keep(words[Word.grad_e], here.out_row + r, of_e, computing)
        keep(words[Word.grad_sink], here.out_row + r, of_sink, computing)


@jitable
def write_sums(address, split, words, head_row, count, size, sums, step, computing):
    """Write the gradients of a head's keys or values: in the call's dtype, or as a share that is added to others."""
    kind = words[Word.kind] if words[Word.splits] == 1 else 0
    itemsize = bytes_of(kind, sums)
    for j in range(count):
        row = head_row + j
        write_row(
            address + (split * words[Word.split_step] + row) * size * itemsize,
            kind,
            size,
            sums[j * step :],
            computing(1.0),
        )


def make_backward(computing):
    """The kernel for tensors that are computed in `computing`, whatever they are stored as."""
    least_e = computing(MIN_E)

    def backward(job):
        words, numbers = words_of(job)
        memory, table = own_memory(words), table_of(words)
        kv_heads, group, kind, longest = words[Word.kv_heads], words[Word.group], words[Word.kind], words[Word.longest]
        depth, size, step, value_step = (
            words[Word.head_dim],
            words[Word.value_dim],
            words[Word.head_step],
            words[Word.value_step],
        )
        panels = floats(words, memory, Word.panels, 0, longest * depth, computing)
        value_panels = floats(words, memory, Word.value_panels, 0, longest * size, computing)
        key_rows = floats(words, memory, Word.key_rows, 0, longest * step, computing)
        value_rows = floats(words, memory, Word.value_rows, 0, longest * value_step, computing)
        pack_rows = floats(words, memory, Word.pack_rows, 0, panel_width(panels) * max(step, value_step), computing)
        key_sums = floats(words, memory, Word.key_sums, 0, longest * step, computing)
        value_sums = floats(words, memory, Word.value_sums, 0, longest * value_step, computing)
        done, start, end = take(words, 0, 0, 0)
        while start < end:
            share = start // words[Word.chunk] * words[Word.bias_share] * size_of(computing)
            for task in range(start, end):
                sequence = sequence_of(table, words[Word.sequences], task)
                length, keys, batch = sequence[Sequence.length], sequence[Sequence.keys], sequence[Sequence.batch]
                key_at = sequence[Sequence.key_at]
                local = task - sequence[Sequence.first_task]
                split, kv_head = local % words[Word.splits], local // words[Word.splits]
                key_address = place(words, Word.key, batch, kv_head, key_at, bytes_of(kind, panels))
                value_address = place(words, Word.value, batch, kv_head, key_at, bytes_of(kind, panels))
                pack(key_address, kind, words[Word.key_row], keys, depth, panels, pack_rows, step)
                pack(value_address, kind, words[Word.value_row], keys, size, value_panels, pack_rows, value_step)
                k, key_step, v, value_row = key_rows, step, value_rows, value_step
                if kind == 0 and step == depth:
                    key_step = words[Word.key_row]
                    k = array_at(key_address, keys * key_step + depth, computing)
                else:
                    rows_into(words, Word.key, batch, kv_head, key_at, keys, depth, 1.0, key_rows, step)
                if kind == 0 and value_step == size:
                    value_row = words[Word.value_row]
                    v = array_at(value_address, keys * value_row + size, computing)
                else:
                    rows_into(words, Word.value, batch, kv_head, key_at, keys, size, 1.0, value_rows, value_step)
                key_sums[:] = 0.0
                value_sums[:] = 0.0
                tiles = (length + TILE - 1) // TILE
                for head in range(kv_head * group, (kv_head + 1) * group):
                    e = exponent_of(words, numbers, head, 0, least_e, computing)
                    of_head = (batch * kv_heads * group + head) * words[Word.tiles] + sequence[Sequence.tile_at]
                    for tile in range(split, tiles, words[Word.splits]):
                        last = min((tile + 1) * TILE, length)
                        here = rows_of(words, sequence, head, tile * TILE, last, panel_width(panels), 0, share)
                        live_row = of_head + tile
                        differentiate_rows(words, numbers, memory, e, here, live_row, k, key_step, v, value_row, computing)
                head_row = (batch * kv_heads + kv_head) * words[Word.key_length] + key_at
                write_sums(words[Word.grad_key], split, words, head_row, keys, depth, key_sums, step, computing)
                write_sums(words[Word.grad_value], split, words, head_row, keys, size, value_sums, value_step, computing)
            done, start, end = take(words, done, start, end)
        return finish(words, done)

    return backward
