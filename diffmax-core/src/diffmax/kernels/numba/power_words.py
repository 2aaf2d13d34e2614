"""What power attention's compiled kernels find in a job, and how they read rows of its tensors: places, scratch memory.

A job is words of 8 bytes, named by `Word`; strides and sizes are in elements, what is not there has address 0. A thread has
scratch memory of its own, of which the job says where each part begins.

In the scratch memory tokens lie side by side, as the places of vectors (lanes): COLUMNS of them at a time, `stride` apart.
"""

from collections import namedtuple

import numpy as np

from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.products import bytes_of, copy_rows, write_row
from diffmax.kernels.numba.simd import array_at, fetch_add, load, places, size_of, splat, store, transpose_square

# Tokens side by side: so many that the state is read and written seldom, and few enough for the nearest cache.
COLUMNS = 128
# Keys, or in the backward queries, whose products with them are in memory at once.
ROWS_AT_ONCE = 32
# Monomials in memory at once, a multiple of the places of a vector.
SLICE = 64

# The first words are those of every job (`jobs`). Behind a tensor's address stand its strides: batch, head, row.
_Words = namedtuple(
    "_Words",
    """
    next done stop chunk
    slots slot_bytes memory
    kv_heads group head_dim value_dim head_step value_step state_step row_step stride
    length many span degree parts spans span_chunks collects in_place monomials kind out_kind
    query query_batch query_head query_row
    key key_batch key_head key_row
    value value_batch value_head value_row
    grad grad_batch grad_head grad_row
    gates coefficients firsts level_at level_rows
    sums norm end_sums end_norm out total states of_states decays of_end query_gates
    grad_query grad_key grad_value grad_gates grad_sums grad_norm
    scale
    state levels of_levels entries scores slopes lane_rows value_rows rows more_rows lanes_t result of_values
    numbers_of_lanes found left_rows right_rows since starts
    """,
)
N_WORDS = len(_Words._fields)
Word = _Words(*range(N_WORDS))
"""Places of a job's words. scale is a number; from state on, the parts of the scratch memory."""

# Rows of `numbers_of_lanes`: positions in the chunk, log gates since its start in two parts, decays, more, and memory.
POSITION, HIGH, LOW, SINCE, UNTIL, MEAN, MORE = range(7)
N_NUMBERS = 7


@jitable
def words_of(job):
    """The job's words, as integers and as numbers."""
    return array_at(job, N_WORDS, np.int64), array_at(job, N_WORDS, np.float64)


@jitable
def own_memory(words):
    """Address of the scratch memory of a thread that begins."""
    return words[Word.memory] + fetch_add(words, Word.slots, 1) * words[Word.slot_bytes]


@jitable
def floats(words, memory, part, count, computing):
    """The numbers of a part of the scratch memory."""
    return array_at(memory + words[part], count, computing)


@jitable
def firsts_of(words, degree):
    """Where the monomials of a degree begin that begin with each variable, and behind the last."""
    count = words[Word.head_dim] + 1
    return array_at(words[Word.firsts] + 8 * degree * count, count, np.int64)


@jitable
def level_at(words, degree):
    """The row of the levels at which the monomials of a degree begin."""
    return array_at(words[Word.level_at], degree + 1, np.int64)[degree]


@jitable
def lane_numbers(words, memory, which, computing):
    """A number for each lane."""
    stride = words[Word.stride]
    return array_at(memory + words[Word.numbers_of_lanes] + which * stride * size_of(computing), stride, computing)


@jitable
def rows_into(words, tensor, batch, head, row, count, size, scale, target, target_step):
    """Copy rows of a head of a tensor of the call's dtype, see `copy_rows`."""
    kind = words[Word.kind]
    at = batch * words[tensor + 1] + head * words[tensor + 2] + row * words[tensor + 3]
    copy_rows(words[tensor] + at * bytes_of(kind, target), kind, words[tensor + 3], count, size, scale, target, target_step)


@jitable
def dense_rows_into(address, row, count, size, target, target_step):
    """Copy rows of a contiguous tensor of the dtype in which is computed."""
    copy_rows(address + row * size * bytes_of(0, target), 0, size, count, size, 1.0, target, target_step)


@jitable
def rows_from(kind, address, row, count, size, source, step, factor):
    """Write rows of a contiguous tensor, rounded to its kind of numbers."""
    for r in range(count):
        write_row(address + (row + r) * size * bytes_of(kind, source), kind, size, source[r * step :], factor)


@jitable
def zero(target, first, last):
    """Zeros from first to last."""
    width = places(target)
    whole = first + (last - first) // width * width
    for i in range(first, whole, width):
        store(target, i, splat(target, 0.0))
    for i in range(whole, last):
        target[i] = 0.0


@jitable
def scale_lanes(target, rows, stride, count, factors):
    """Multiply rows of lanes by a factor for each lane."""
    for r in range(rows):
        for c in range(0, count, places(target)):
            store(target, r * stride + c, load(target, r * stride + c) * load(factors, c))


@jitable
def to_lanes(rows, step, count, size, target, stride):
    """target[d stride + c] = rows[c step + d]; `count` is whole vectors, `size` is filled up to some."""
    width = places(target)
    for c in range(0, count, width):
        for d in range(0, size, width):
            transpose_square(rows, c * step + d, step, target, d * stride + c, stride)


@jitable
def from_lanes(source, stride, count, size, rows, step):
    """rows[c step + d] = source[d stride + c], likewise."""
    width = places(rows)
    for d in range(0, size, width):
        for c in range(0, count, width):
            transpose_square(source, d * stride + c, stride, rows, c * step + d, step)
