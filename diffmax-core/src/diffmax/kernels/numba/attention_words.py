"""What attention's compiled kernels find in a job, and what forward and backward share: places, rules, dropout.

A job is words of 8 bytes, named by `Word`; strides and sizes are in elements, what is not there has address 0. A thread has
scratch memory of its own, of which the job says where each part begins.
"""

import math
from collections import namedtuple
from typing import NamedTuple

import numpy as np

from diffmax.kernels.numba import scores as rules
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.products import bytes_of, copy_rows
from diffmax.kernels.numba.simd import array_at, fetch_add, size_of

# The first words are those of every job (`jobs`). Behind a tensor's address stand its strides: batch, head, row.
_Words = namedtuple(
    "_Words",
    """
    next done stop chunk
    slots slot_bytes memory
    sequences kv_heads group head_dim value_dim head_step value_step longest rows stride kind
    query query_batch query_head query_row
    key key_batch key_head key_row
    value value_batch value_head value_row
    grad grad_batch grad_head grad_row
    mask mask_batch mask_head mask_row mask_key
    bias bias_batch bias_head bias_row bias_key bias_kind
    alibi alibi_batch sink e integers of_head of_row left right lower_right integer steps seed_0 seed_1 least_word
    length tiles tile_words out m delta u live support
    grad_query grad_key grad_value grad_e grad_sink key_length splits split_step
    grad_bias grad_bias_batch grad_bias_head grad_bias_row grad_bias_key bias_share direct
    blocks blocks_step page_size
    theta theta_batch theta_head theta_row weighing power_kind distances width mass
    grad_mass grad_theta grad_distances distances_share
    scale e_value softcap passed power
    panels value_panels key_rows value_rows pack_rows query_rows grad_rows scores slopes gradients capped
    sums key_sums value_sums z weights other row_slopes some_weights some_slopes
    list_z list_weights list_slopes lanes norms means row_sums
    index some list_index touched weighted dense left_rows right_rows
    """,
)
N_WORDS = len(_Words._fields)
Word = _Words(*range(N_WORDS))
"""Places of a job's words: those of the call, from theta on those of threshold attention, from scale on numbers, and from
panels on the parts of the scratch memory."""

_Columns = namedtuple("_Columns", "length keys query_at key_at tile_at batch key_batch number first_task")
N_COLUMNS = len(_Columns._fields)
Sequence = _Columns(*range(N_COLUMNS))
"""Columns of the table of sequences: lengths, where they begin in the tensors, their number among the packed."""


@jitable
def words_of(job):
    """The job's words, as integers and as numbers."""
    return array_at(job, N_WORDS, np.int64), array_at(job, N_WORDS, np.float64)


@jitable
def own_memory(words):
    """Address of the scratch memory of a thread that begins."""
    return words[Word.memory] + fetch_add(words, Word.slots, 1) * words[Word.slot_bytes]


@jitable
def floats(words, memory, part, start, count, computing):
    """Some of the numbers of a part of the scratch memory."""
    return array_at(memory + words[part] + start * size_of(computing), count, computing)


@jitable
def whole_numbers(words, memory, part, start, count):
    """Some of the integers of a part of the scratch memory."""
    return array_at(memory + words[part] + start * 4, count, np.int32)


@jitable
def row_places(words, memory, part, count):
    """Where rows begin, in a part of the scratch memory."""
    return array_at(memory + words[part], count, np.int64)


@jitable
def place_rows(words, memory, part, count, step):
    """Rows that begin `step` apart."""
    found = row_places(words, memory, part, count)
    for i in range(count):
        found[i] = i * step
    return found


@jitable
def sequence_of(table, sequences, task):
    """The table's row of the task's sequence."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if table[middle * N_COLUMNS + Sequence.first_task] <= task:
            low = middle
        else:
            high = middle
    return array_at(table.ctypes.data + 8 * low * N_COLUMNS, N_COLUMNS, np.int64)


@jitable
def table_of(words):
    """The table of sequences, which lies behind the words."""
    return array_at(words.ctypes.data + 8 * N_WORDS, words[Word.sequences] * N_COLUMNS, np.int64)


@jitable
def seen(words, first, last, keys):
    """The first key, and one behind the last, that queries at the positions from first to last see."""
    low = max(first - words[Word.left], 0) if words[Word.left] >= 0 else 0
    high = min(last + words[Word.right] + 1, keys) if words[Word.right] >= 0 else keys
    return low, max(low, high)


@jitable
def place(words, tensor, batch, head, row, itemsize):
    """Address of a row of a head."""
    return words[tensor] + itemsize * (batch * words[tensor + 1] + head * words[tensor + 2] + row * words[tensor + 3])


@jitable
def token_place(words, tensor, batch, head, token, itemsize):
    """Address of a token's key or value. `batch` is its row of the tensor, or with pages its sequence's row of the table."""
    if words[Word.blocks] == 0:
        return place(words, tensor, batch, head, token, itemsize)
    size = words[Word.page_size]
    at = batch * words[Word.blocks_step] + token // size
    block = array_at(words[Word.blocks], at + 1, np.int32)[at]
    return place(words, tensor, block, head, token % size, itemsize)


@jitable
def in_one_page(words, token, count):
    """How many of `count` tokens from `token` on lie in one page."""
    return count if words[Word.blocks] == 0 else min(count, words[Word.page_size] - token % words[Word.page_size])


@jitable
def tokens_into(words, tensor, batch, head, token, count, size, target, target_step):
    """Copy keys or values of a head, see `copy_rows`, from whatever pages they lie in."""
    kind, done = words[Word.kind], 0
    while done < count:
        some = in_one_page(words, token + done, count - done)
        address = token_place(words, tensor, batch, head, token + done, bytes_of(kind, target))
        copy_rows(address, kind, words[tensor + 3], some, size, 1.0, target[done * target_step :], target_step)
        done += some


@jitable
def rows_into(words, tensor, batch, head, row, count, size, scale, target, target_step):
    """Copy rows of a head of a tensor of the call's dtype, see `copy_rows`."""
    kind = words[Word.kind]
    address = place(words, tensor, batch, head, row, bytes_of(kind, target))
    copy_rows(address, kind, words[tensor + 3], count, size, scale, target, target_step)


@jitable
def own_place(words, head, row):
    """Where a row's own number (e, a sink) stands: `of_head` and `of_row` tell where rows are heads that share keys."""
    return head * words[Word.of_head] + row * words[Word.of_row]


@jitable
def exponent_of(words, numbers, head, row, least, computing):
    """e of a row of a head: at least `least`, or outside [0, 1] as it stands."""
    at = own_place(words, head, row)
    e = array_at(words[Word.e], at + 1, computing)[at] if words[Word.e] != 0 else computing(numbers[Word.e_value])
    return least if 0.0 <= e <= least else e


@jitable
def integer_of(words, head, row):
    """`integer` of the row's e: k, or where its table begins, or 0."""
    if words[Word.integers] == 0:
        return words[Word.integer]
    at = own_place(words, head, row)
    return array_at(words[Word.integers], at + 1, np.int64)[at]


@jitable
def integer_of_rows(words, head):
    """`integer` of rows that are solved together: 0 if they differ."""
    return 0 if words[Word.integers] != 0 and words[Word.of_row] != 0 else integer_of(words, head, 0)


@jitable
def sink_of(words, head, row, computing):
    """The sink of a row of a head."""
    at = own_place(words, head, row)
    return array_at(words[Word.sink], at + 1, computing)[at]


@jitable
def apply_rules(words, numbers, x, slope, more, here, base, padded, row, computing):
    """Let the rules act on the scaled products x[:padded] of a query with the keys from `base` on, in their order.

    `slope` gets the derivative of the result in the product, if the call has a softcap and it has room. `more` is memory.
    """
    softcap = computing(numbers[Word.softcap])
    stop = min(here.keys - base, padded)
    position, query = row + here.shift, here.query_at + row
    if softcap > 0:
        rules.cap(x, slope, padded, softcap)
    if words[Word.bias] != 0:
        kind, step = words[Word.bias_kind], words[Word.bias_key]
        itemsize = bytes_of(kind, x)
        address = place(words, Word.bias, here.batch, here.head, query, itemsize) + base * step * itemsize
        size = stop if step == 1 else 1
        copy_rows(address, kind, size, 1, size, 1.0, more, size)
        rules.add_bias(x, more, step, stop)
    if words[Word.alibi] != 0:
        at = here.number * words[Word.alibi_batch] + here.head
        rules.subtract_distance(x, padded, base - position, array_at(words[Word.alibi], at + 1, computing)[at])
    hide(words, x, here, base, padded, row, -math.inf)


@jitable
def hide(words, x, here, base, padded, row, by):
    """Write `by` over what stands for the keys that a query does not see; arguments as of `apply_rules`."""
    position, query = row + here.shift, here.query_at + row
    low, high = seen(words, position, position, here.keys)
    rules.hide_outside(x, padded, low - base, high - base, by)
    if words[Word.mask] != 0:
        step, stop = words[Word.mask_key], min(here.keys - base, padded)
        address = place(words, Word.mask, here.batch, here.head, query, 1) + base * step
        rules.hide_masked(x, array_at(address, stop * step + 1, np.uint8), step, stop, by)


@jitable
def keep_factor(words, numbers, key, row, here, computing):
    """What dropout multiplies a weight by (`diffmax.reference.dropout`)."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    first, second = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    step0, step1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
    key0, key1 = np.uint64(words[Word.seed_0]), np.uint64(words[Word.seed_1])
    c0, c1, c2, c3 = np.uint64(key), np.uint64(row), np.uint64(here.number * here.heads + here.head), np.uint64(0)
    for _ in range(10):
        a, b = c0 * first, c2 * second
        c0, c1, c2, c3 = (b >> half) ^ c1 ^ key0, b & low, (a >> half) ^ c3 ^ key1, a & low
        key0, key1 = (key0 + step0) & low, (key1 + step1) & low
    return computing(numbers[Word.passed]) if c0 >= np.uint64(words[Word.least_word]) else computing(0.0)


class Rows(NamedTuple):
    """Some rows of queries of a head: `count` of them from `first` on, and the keys from low to high that they see.

    `out_row` counts all rows before, of all heads; scores stand for the `padded` keys from `base` on, `n` with the sink.
    `share` is where the bias's gradients begin that are this thread's, in bytes.
    """

    batch: int
    key_batch: int
    number: int
    head: int
    heads: int
    query_at: int
    key_at: int
    keys: int
    shift: int
    first: int
    count: int
    low: int
    high: int
    base: int
    padded: int
    n: int
    out_row: int
    share: int


@jitable
def rows_of(words, sequence, head, first, last, across, width, share):
    """The rows of a head from first to last."""
    heads, batch = words[Word.kv_heads] * words[Word.group], sequence[Sequence.batch]
    keys, query_at = sequence[Sequence.keys], sequence[Sequence.query_at]
    shift = keys - sequence[Sequence.length] if words[Word.lower_right] != 0 else 0
    low, high = seen(words, first + shift, last - 1 + shift, keys)
    base = low // across * across
    padded = (high - base + across - 1) // across * across if high > low else 0
    return Rows(
        batch,
        sequence[Sequence.key_batch],
        batch + sequence[Sequence.number],
        head,
        heads,
        query_at,
        sequence[Sequence.key_at],
        keys,
        shift,
        first,
        last - first,
        low,
        high,
        base,
        padded,
        padded + width if words[Word.sink] != 0 else padded,
        (batch * heads + head) * words[Word.length] + query_at + first,
        share,
    )
