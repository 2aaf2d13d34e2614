"""Threshold attention's forward kernel: for each tile of queries the products with the keys, weights, and the values' sums.

A row of few weights gathers their values; the others are multiplied with the blocks of values in which one of them has some.
"""

import math

from diffmax.kernels.numba.attention_forward import converts_some, in_place, score_rows, values_into
from diffmax.kernels.numba.attention_words import (
    Sequence,
    Word,
    exponent_of,
    floats,
    own_memory,
    place,
    row_places,
    rows_into,
    rows_of,
    sequence_of,
    table_of,
    whole_numbers,
    words_of,
)
from diffmax.kernels.numba.jobs import finish, keep, take
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.products import ROWS, bytes_of, gather_rows, multiply_rows, pack, panel_width, write_row
from diffmax.kernels.numba.simd import array_at
from diffmax.kernels.numba.threshold_rows import BLOCK, list_nonzero, rectify, theta_of, weigh
from diffmax.operators.common.numerics import MIN_E
from diffmax.plugin import TILE

# A row with weights at less than this share of the keys that it sees adds up their values alone.
GATHERED_SHARE = 0.25


@jitable
def gather(words, memory, x, r, touched, here, values, value_step, computing):
    """Add up the values of a row of few weights."""
    stride, size = words[Word.stride], words[Word.value_step]
    index = whole_numbers(words, memory, Word.some, 0, stride)
    some = floats(words, memory, Word.some_weights, 0, stride, computing)
    sums = floats(words, memory, Word.sums, 0, (words[Word.rows] + 1) * size, computing)
    count = list_nonzero(x, here.padded, touched, index, some)
    gather_rows(some, index, count, values[here.base * value_step :], value_step, sums, r * size, size, True)


@jitable
def multiply_dense(words, memory, n_dense, touched, here, values, value_step, computing):
    """Multiply the rows that are left with the blocks of values that they have weights for."""
    rows, stride, size = words[Word.rows], words[Word.stride], words[Word.value_step]
    dense = row_places(words, memory, Word.dense, rows)
    left = row_places(words, memory, Word.left_rows, rows + ROWS)
    right = row_places(words, memory, Word.right_rows, rows + ROWS)
    scores = floats(words, memory, Word.scores, 0, rows * stride, computing)
    sums = floats(words, memory, Word.sums, 0, (rows + 1) * size, computing)
    together = (n_dense + ROWS - 1) // ROWS * ROWS
    for i in range(together):  # what fills up the last rows of a tile is written behind the others
        r = dense[min(i, n_dense - 1)]
        left[i], right[i] = r * stride, r * size if i < n_dense else rows * size
    for first in range(0, here.high - here.base, BLOCK):
        if touched[first // BLOCK] == 0:
            continue
        count, at = min(BLOCK, here.high - here.base - first), (here.base + first) * value_step
        if converts_some(words):
            values_into(words, here, here.base + first, count, values, value_step)
            at = 0
        multiply_rows(scores[first:], left, 1, together, values, at, value_step, count, sums, right, size, True)


@jitable
def attend_rows(words, numbers, memory, e, here, values, value_step, computing):
    """Everything for some rows of queries of one head."""
    rows, stride, size, padded = words[Word.rows], words[Word.stride], words[Word.value_step], here.padded
    sums = floats(words, memory, Word.sums, 0, (rows + 1) * size, computing)
    sums[:] = 0.0
    if padded > 0:
        score_rows(words, numbers, memory, here, computing)
    touched = whole_numbers(words, memory, Word.touched, 0, (padded + BLOCK - 1) // BLOCK)
    touched[:] = 0
    dense = row_places(words, memory, Word.dense, rows)
    n_dense = 0
    for r in range(here.count):
        mass, found, statistic = 0.0, 0, -math.inf
        if padded > 0:
            x = floats(words, memory, Word.scores, r * stride, stride, computing)
            factor, statistic = weigh(words, memory, x, here, padded, r, e, computing)
            theta = theta_of(words, here, r, computing)
            mass, found = rectify(words, numbers, x, x, padded, factor, theta, False, touched, computing)
            if found > GATHERED_SHARE * (here.high - here.low) or converts_some(words):
                dense[n_dense] = r
                n_dense += 1
            elif found > 0:
                gather(words, memory, x, r, touched, here, values, value_step, computing)
        keep(words[Word.mass], here.out_row + r, mass, computing)
        keep(words[Word.m], here.out_row + r, statistic, computing)
    if n_dense > 0:
        multiply_dense(words, memory, n_dense, touched, here, values, value_step, computing)
    for r in range(here.count):
        at = (here.out_row + r) * words[Word.value_dim] * bytes_of(words[Word.kind], sums)
        write_row(words[Word.out] + at, words[Word.kind], words[Word.value_dim], sums[r * size :], computing(1.0))


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
        kind, longest = words[Word.kind], words[Word.longest]
        panels = floats(words, memory, Word.panels, 0, longest * depth, computing)
        copied = floats(words, memory, Word.value_rows, 0, longest * value_step, computing)
        pack_rows = floats(words, memory, Word.pack_rows, 0, panel_width(panels) * words[Word.head_step], computing)
        values, step = copied, value_step
        held = -1
        done, start, end = take(words, 0, 0, 0)
        while start < end:
            for task in range(start, end):
                sequence = sequence_of(table, words[Word.sequences], task)
                keys, batch, key_at = sequence[Sequence.keys], sequence[Sequence.key_batch], sequence[Sequence.key_at]
                local = task - sequence[Sequence.first_task]
                tiles = (sequence[Sequence.length] + TILE - 1) // TILE
                tile, head = local % tiles, local // tiles
                kv_head = head // words[Word.group]
                if held != sequence[Sequence.first_task] * kv_heads + kv_head:
                    held = sequence[Sequence.first_task] * kv_heads + kv_head
                    if words[Word.direct] == 0:
                        at = place(words, Word.key, batch, kv_head, key_at, bytes_of(kind, panels))
                        pack(at, kind, words[Word.key_row], keys, depth, panels, pack_rows, words[Word.head_step])
                    if in_place(words):
                        step = words[Word.value_row]
                        at = place(words, Word.value, batch, kv_head, key_at, bytes_of(kind, panels))
                        values = array_at(at, keys * step + size, computing)
                    elif not converts_some(words):
                        rows_into(words, Word.value, batch, kv_head, key_at, keys, size, 1.0, copied, value_step)
                e = exponent_of(words, numbers, head, 0, least_e, computing)
                last = min((tile + 1) * TILE, sequence[Sequence.length])
                for first in range(tile * TILE, last, words[Word.rows]):
                    until = min(first + words[Word.rows], last)
                    here = rows_of(words, sequence, head, first, until, panel_width(panels), 0, 0)
                    attend_rows(words, numbers, memory, e, here, values, step, computing)
            done, start, end = take(words, done, start, end)
        return finish(words, done)

    return forward
