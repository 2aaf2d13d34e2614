"""Threshold attention's backward kernel: a thread takes a head of keys, and for some queries at a time all keys that they see.

Scores and weights are computed once more. Products leave out the blocks of keys without a weight, or without a gradient for
their scores; where few entries are left, sums over those alone take the place of products. G, of docs/lazy.md, is the gradient
for u.
"""

import math

from diffmax.kernels.numba.attention_backward import dot, write_sums
from diffmax.kernels.numba.attention_words import (
    Sequence,
    Word,
    exponent_of,
    floats,
    hide,
    own_memory,
    place,
    place_rows,
    rows_into,
    rows_of,
    sequence_of,
    table_of,
    whole_numbers,
    words_of,
)
from diffmax.kernels.numba.gradient import slope_and_alpha_sums, slope_sums
from diffmax.kernels.numba.jobs import finish, keep, take
from diffmax.kernels.numba.one_row import fill
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.products import (
    ROWS,
    bytes_of,
    gather_rows,
    multiply_panels,
    multiply_rows,
    pack,
    panel_width,
    scatter_rows,
    write_row,
)
from diffmax.kernels.numba.simd import (
    array_at,
    bits,
    count_bits,
    is_nan,
    load,
    places,
    select,
    size_of,
    splat,
    store,
    total,
)
from diffmax.kernels.numba.threshold_rows import BLOCK, DIFFMAX, SOFTMAX, list_nonzero, reach, rectify, theta_of, weigh
from diffmax.operators.common.numerics import MIN_E
from diffmax.plugin import TILE

# Below this share of entries that are not 0, sums over those alone are faster than products of matrices.
GATHERED_SHARE = 0.2


@jitable
def read_rows(words, numbers, memory, here, computing):
    """Copy the rows' queries, scaled, and gradients."""
    step, value_step, rows = words[Word.head_step], words[Word.value_step], words[Word.rows]
    queries = floats(words, memory, Word.query_rows, 0, rows * step, computing)
    grads = floats(words, memory, Word.grad_rows, 0, rows * value_step, computing)
    query, together = here.query_at + here.first, (here.count + ROWS - 1) // ROWS * ROWS
    scale, depth, size = numbers[Word.scale], words[Word.head_dim], words[Word.value_dim]
    rows_into(words, Word.query, here.batch, here.head, query, here.count, depth, scale, queries, step)
    rows_into(words, Word.grad, here.batch, here.head, query, here.count, size, 1.0, grads, value_step)
    queries[here.count * step : together * step] = 0.0
    grads[here.count * value_step : together * value_step] = 0.0
    return queries, grads


@jitable
def of_mass(words, here, r, computing):
    """The gradient for a row's mass."""
    row = here.out_row + r
    return array_at(words[Word.grad_mass], row + 1, computing)[row] if words[Word.grad_mass] != 0 else computing(0.0)


@jitable
def slope_of(w, u, theta, kind, power):
    """The derivatives of weights in u, at a vector of them; 0 where there is none, NaN of NaN."""
    if kind == 1:
        return select(w > 0.0, w * 0.0 + 1.0, w)
    return select(w > 0.0, (u - theta) * 2.0, w)


@jitable
def gradients_of_u(words, numbers, x, w, d, n, theta, added, touched, computing):
    """Write G over d, which holds the weights' gradients in the blocks that are marked; returns the sums of G and of u G."""
    width, kind, power = places(x), words[Word.power_kind], numbers[Word.power]
    result, product = 0.0, 0.0
    for block in range(0, n, BLOCK):
        stop = min(block + BLOCK, n)
        if touched[block // BLOCK] == 0:
            fill(d[block:], stop - block, 0.0, d)
            continue
        if kind == 0:
            for i in range(block, stop):
                rise, above = w[i], x[i] - theta
                if rise > 0.0:
                    rise = computing(power) * above ** computing(power - 1.0) if above > 0.0 else computing(0.0)
                d[i] = rise * (d[i] + added) if rise != 0.0 else computing(0.0)
        part, parts = splat(x, 0.0), splat(x, 0.0)
        for i in range(block, stop, width):
            u, weight, g = load(x, i), load(w, i), load(d, i)
            if kind != 0:
                g = select(weight <= 0.0, 0.0, slope_of(weight, u, theta, kind, power) * (g + added))
                store(d, i, g)
            part, parts = part + g, parts + u * g
        result, product = result + total(part), product + total(parts)
    return result, product


@jitable
def gradients_of_scores(words, memory, x, d, n, e, product, row, computing):
    """Write the gradients for scores over d, which holds G; `product` is the sum of u G."""
    width, kind = places(x), words[Word.weighing]
    if kind == SOFTMAX:
        for i in range(0, n, width):
            store(d, i, load(x, i) * (load(d, i) - product))
    if kind != DIFFMAX:
        return
    s = floats(words, memory, Word.slopes, 0, words[Word.stride], computing)
    wants_e = words[Word.grad_e] != 0
    w = floats(words, memory, Word.capped, 0, words[Word.stride], computing)
    other = floats(words, memory, Word.other, 0, words[Word.stride], computing)
    live = whole_numbers(words, memory, Word.some, 0, words[Word.stride])
    exponent, sum_s, sum_sg = splat(x, e), 0.0, 0.0
    for block in range(0, n, 1024):
        stop = min(block + 1024, n)
        if wants_e:
            sums, products = slope_and_alpha_sums(x, d, s, w, block, stop, exponent)
        else:
            sums, products = slope_sums(x, d, s, other, live, block, stop, exponent)
        sum_s, sum_sg = sum_s + total(sums), sum_sg + total(products)
    mean, of_e = sum_sg / sum_s if sum_s != 0.0 else 0.0, 0.0
    for block in range(0, n, 1024):
        part = splat(x, 0.0)
        for i in range(block, min(block + 1024, n), width):
            centred = load(d, i) - mean
            if wants_e:
                part = part + load(w, i) * centred
            store(d, i, load(s, i) * centred)
        of_e -= total(part)
    keep(words[Word.grad_e], row, of_e, computing)


@jitable
def mark(d, n, moved):
    """Mark the blocks that hold something else than 0; returns how many entries do."""
    width, found = places(d), 0
    for block in range(0, n, BLOCK):
        before = found
        for i in range(block, min(block + BLOCK, n), width):
            v = load(d, i)
            found += count_bits(bits((v < 0.0) | (v > 0.0) | is_nan(v)))
        if found > before:
            moved[block // BLOCK] = 1
    return found


@jitable
def add_to_distances(words, d, here, n, row, computing):
    """Add a row's gradients for scores to those of the bias by distance."""
    start, stop, behind = reach(words, here, n, row)
    width, base = words[Word.width], here.base
    table = array_at(words[Word.grad_distances] + here.share + here.head * width * size_of(computing), width, computing)
    whole = start + (stop - start) // places(d) * places(d)
    for key in range(start, whole, places(d)):
        store(table, key + behind, load(table, key + behind) + load(d, key - base))
    for key in range(max(start, whole), stop):
        table[key + behind] += d[key - base]


@jitable
def weigh_again(words, numbers, memory, e, here, touched, computing):
    """Write u and the weights of some rows; returns how many weights are not 0."""
    stride, depth, rows = words[Word.stride], words[Word.head_dim], words[Word.rows]
    step, n = words[Word.head_step], here.padded
    queries = floats(words, memory, Word.query_rows, 0, rows * step, computing)
    panels = floats(words, memory, Word.panels, 0, words[Word.longest] * depth, computing)
    scores = floats(words, memory, Word.scores, 0, rows * stride, computing)
    spoilt = whole_numbers(words, memory, Word.index, 0, rows)
    together = (here.count + ROWS - 1) // ROWS * ROWS
    left = place_rows(words, memory, Word.left_rows, together, step)
    right = place_rows(words, memory, Word.right_rows, together, stride)
    multiply_panels(queries, left, together, panels, depth, here.base, here.base + n, scores, right)
    result = 0
    for r in range(here.count):
        x = floats(words, memory, Word.scores, r * stride, stride, computing)
        w = floats(words, memory, Word.weights, r * stride, stride, computing)
        factor, statistic = weigh(words, memory, x, here, n, r, e, computing)
        theta = theta_of(words, here, r, computing)
        spoilt[r] = 1 if statistic != statistic or theta != theta else 0
        result += rectify(words, numbers, x, w, n, factor, theta, True, touched, computing)[1]
    return result


@jitable
def gradients_of_weights(words, memory, few, here, touched, values, value_row, computing):
    """Write dout . v for the weights, those of few alone or those of all blocks that are marked."""
    stride, rows, value_step, n = words[Word.stride], words[Word.rows], words[Word.value_step], here.padded
    grads = floats(words, memory, Word.grad_rows, 0, rows * value_step, computing)
    d = floats(words, memory, Word.gradients, 0, rows * stride, computing)
    if few:
        index = whole_numbers(words, memory, Word.some, 0, stride)
        some = floats(words, memory, Word.some_weights, 0, stride, computing)
        for r in range(here.count):
            w = floats(words, memory, Word.weights, r * stride, stride, computing)
            for i in range(list_nonzero(w, n, touched, index, some)):
                key = here.base + index[i]
                d[r * stride + index[i]] = dot(grads, r * value_step, values, key * value_row, value_step)
        return
    size = words[Word.value_dim]
    panels = floats(words, memory, Word.value_panels, 0, words[Word.longest] * size, computing)
    together = (here.count + ROWS - 1) // ROWS * ROWS
    left = place_rows(words, memory, Word.left_rows, together, value_step)
    right = place_rows(words, memory, Word.right_rows, together, stride)
    for first in range(0, n, BLOCK):
        if touched[first // BLOCK] != 0:
            stop = here.base + min(first + BLOCK, n)
            multiply_panels(grads, left, together, panels, size, here.base + first, stop, d[first:], right)


@jitable
def add_to_values(words, memory, few, here, touched, computing):
    """Add the rows' shares to the values' gradients."""
    stride, rows, value_step, n = words[Word.stride], words[Word.rows], words[Word.value_step], here.padded
    grads = floats(words, memory, Word.grad_rows, 0, rows * value_step, computing)
    value_sums = floats(words, memory, Word.value_sums, here.base * value_step, n * value_step, computing)
    if few:
        index = whole_numbers(words, memory, Word.some, 0, stride)
        some = floats(words, memory, Word.some_weights, 0, stride, computing)
        for r in range(here.count):
            w = floats(words, memory, Word.weights, r * stride, stride, computing)
            count = list_nonzero(w, n, touched, index, some)
            scatter_rows(some, index, count, grads[r * value_step :], value_sums, value_step, value_step)
        return
    w = floats(words, memory, Word.weights, 0, rows * stride, computing)
    for first in range(0, n, BLOCK):
        if touched[first // BLOCK] != 0:
            count = min(BLOCK, n - first)
            left = place_rows(words, memory, Word.left_rows, count, 1)
            right = place_rows(words, memory, Word.right_rows, count, value_step)
            sums = value_sums[first * value_step :]
            multiply_rows(w[first:], left, stride, count, grads, 0, value_step, here.count, sums, right, value_step, True)


@jitable
def add_to_keys_and_queries(words, memory, few, here, moved, keys, key_step, computing):
    """Add up the rows' gradients, and add their shares to the keys'."""
    stride, rows, step, n = words[Word.stride], words[Word.rows], words[Word.head_step], here.padded
    queries = floats(words, memory, Word.query_rows, 0, rows * step, computing)
    sums = floats(words, memory, Word.sums, 0, rows * step, computing)
    key_sums = floats(words, memory, Word.key_sums, here.base * step, n * step, computing)
    if few:
        index = whole_numbers(words, memory, Word.some, 0, stride)
        some = floats(words, memory, Word.some_weights, 0, stride, computing)
        for r in range(here.count):
            d = floats(words, memory, Word.gradients, r * stride, stride, computing)
            count = list_nonzero(d, n, moved, index, some)
            gather_rows(some, index, count, keys[here.base * key_step :], key_step, sums, r * step, step, True)
            scatter_rows(some, index, count, queries[r * step :], key_sums, step, step)
        return
    d = floats(words, memory, Word.gradients, 0, rows * stride, computing)
    together = (here.count + ROWS - 1) // ROWS * ROWS
    for first in range(0, n, BLOCK):
        if moved[first // BLOCK] == 0:
            continue
        count, at = min(BLOCK, n - first), (here.base + first) * key_step
        for r in range(here.count, together):
            fill(d[r * stride + first :], count, 0.0, d)
        inside = min(count, here.keys - here.base - first)
        left = place_rows(words, memory, Word.left_rows, together, stride)
        right = place_rows(words, memory, Word.right_rows, together, step)
        multiply_rows(d[first:], left, 1, together, keys, at, key_step, inside, sums, right, step, True)
        left = place_rows(words, memory, Word.left_rows, count, 1)
        right = place_rows(words, memory, Word.right_rows, count, step)
        own = key_sums[first * step :]
        multiply_rows(d[first:], left, stride, count, queries, 0, step, here.count, own, right, step, True)


@jitable
def differentiate_rows(words, numbers, memory, e, here, keys, key_step, values, value_row, computing):
    """Everything for some rows of queries of one head."""
    rows, stride, step, n = words[Word.rows], words[Word.stride], words[Word.head_step], here.padded
    read_rows(words, numbers, memory, here, computing)
    sums = floats(words, memory, Word.sums, 0, rows * step, computing)
    sums[:] = 0.0
    blocks = (n + BLOCK - 1) // BLOCK
    touched = whole_numbers(words, memory, Word.touched, 0, blocks)
    moved = whole_numbers(words, memory, Word.weighted, 0, blocks)
    touched[:] = 0
    moved[:] = 0
    all_entries = here.count * (here.high - here.low)
    if n > 0:
        found = weigh_again(words, numbers, memory, e, here, touched, computing)
        few = found < GATHERED_SHARE * all_entries
        spoilt = whole_numbers(words, memory, Word.index, 0, rows)
        gradients_of_weights(words, memory, few, here, touched, values, value_row, computing)
        entries = 0
        for r in range(here.count):
            x = floats(words, memory, Word.scores, r * stride, stride, computing)
            w = floats(words, memory, Word.weights, r * stride, stride, computing)
            d = floats(words, memory, Word.gradients, r * stride, stride, computing)
            theta, added = theta_of(words, here, r, computing), of_mass(words, here, r, computing)
            of_theta, product = gradients_of_u(words, numbers, x, w, d, n, theta, added, touched, computing)
            if spoilt[r] != 0:
                of_theta = math.nan
                fill(d, n, math.nan, d)
                hide(words, d, here, here.base, n, here.first + r, 0.0)
                keep(words[Word.grad_e], here.out_row + r, math.nan, computing)
            else:
                gradients_of_scores(words, memory, x, d, n, e, product, here.out_row + r, computing)
            keep(words[Word.grad_theta], here.out_row + r, -of_theta, computing)
            if words[Word.grad_distances] != 0:
                add_to_distances(words, d, here, n, here.first + r, computing)
            entries += mark(d, n, moved)
        add_to_values(words, memory, few, here, touched, computing)
        few = entries < GATHERED_SHARE * all_entries
        add_to_keys_and_queries(words, memory, few, here, moved, keys, key_step, computing)
    for r in range(here.count):
        at = (here.out_row + r) * words[Word.head_dim] * bytes_of(words[Word.kind], sums)
        scale = computing(numbers[Word.scale])
        write_row(words[Word.grad_query] + at, words[Word.kind], words[Word.head_dim], sums[r * step :], scale)


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
            share = start // words[Word.chunk] * words[Word.distances_share] * size_of(computing)
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
                    for tile in range(split, tiles, words[Word.splits]):
                        last = min((tile + 1) * TILE, length)
                        for first in range(tile * TILE, last, words[Word.rows]):
                            until = min(first + words[Word.rows], last)
                            here = rows_of(words, sequence, head, first, until, panel_width(panels), 0, share)
                            differentiate_rows(words, numbers, memory, e, here, k, key_step, v, value_row, computing)
                head_row = (batch * kv_heads + kv_head) * words[Word.key_length] + key_at
                write_sums(words[Word.grad_key], split, words, head_row, keys, depth, key_sums, step, computing)
                write_sums(words[Word.grad_value], split, words, head_row, keys, size, value_sums, value_step, computing)
            done, start, end = take(words, done, start, end)
        return finish(words, done)

    return backward
