"""Power attention's forward kernel: a thread takes a head of keys, and carries its state from chunk to chunk.

The queries of a chunk, side by side in all heads that share the keys, are multiplied by the state before it and by the chunk's
keys; then the keys are added to the state. In the quadratic form the whole sequence is one chunk, and tasks share its queries.
"""

import numpy as np

from diffmax.kernels.numba.jobs import finish, keep, take
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.power_parts import (
    absorb,
    begin_gates,
    begin_state,
    by_value,
    copy_state,
    cumulate_gates,
    decay_since,
    decay_until,
    end_state,
    join_state,
    multiply,
    place_lanes,
    read_state,
    scale_state,
    weights_of,
    whole_decay,
)
from diffmax.kernels.numba.power_step import enter_in_place, read_in_place
from diffmax.kernels.numba.power_words import (
    COLUMNS,
    POSITION,
    ROWS_AT_ONCE,
    Word,
    floats,
    from_lanes,
    lane_numbers,
    own_memory,
    rows_from,
    rows_into,
    scale_lanes,
    to_lanes,
    words_of,
    zero,
)
from diffmax.kernels.numba.products import panel_width
from diffmax.kernels.numba.simd import array_at, load, places, select, store


@jitable
def lanes_of(count, array):
    """Lanes in whole panels."""
    across = panel_width(array)
    return (count + across - 1) // across * across


@jitable
def queries_into_lanes(words, numbers, memory, batch, head, heads, at, count, padded, computing):
    """Write scaled queries of some heads, `count` of each from `at` on, side by side."""
    step, depth, stride = words[Word.head_step], words[Word.head_dim], words[Word.stride]
    rows = floats(words, memory, Word.lane_rows, COLUMNS * step, computing)
    levels = floats(words, memory, Word.levels, step * stride, computing)
    for h in range(heads):
        target = rows[h * count * step :]
        rows_into(words, Word.query, batch, head + h, at, count, depth, numbers[Word.scale], target, step)
    zero(rows, heads * count * step, padded * step)
    to_lanes(rows, step, padded, depth, levels, stride)


@jitable
def keys_into_lanes(words, memory, batch, kv_head, first, count, padded, computing):
    """Write keys side by side."""
    step, depth, stride = words[Word.head_step], words[Word.head_dim], words[Word.stride]
    rows = floats(words, memory, Word.lane_rows, COLUMNS * step, computing)
    levels = floats(words, memory, Word.levels, step * stride, computing)
    rows_into(words, Word.key, batch, kv_head, first, count, depth, 1.0, rows, step)
    zero(rows, count * step, padded * step)
    to_lanes(rows, step, padded, depth, levels, stride)


@jitable
def key_rows(words, memory, batch, kv_head, first, count, computing):
    """Copy keys, and values with a one behind them."""
    step, row_step, size = words[Word.head_step], words[Word.row_step], words[Word.value_step]
    keys = floats(words, memory, Word.rows, ROWS_AT_ONCE * step, computing)
    values = floats(words, memory, Word.more_rows, ROWS_AT_ONCE * row_step, computing)
    rows_into(words, Word.key, batch, kv_head, first, count, words[Word.head_dim], 1.0, keys, step)
    rows_into(words, Word.value, batch, kv_head, first, count, words[Word.value_dim], 1.0, values, row_step)
    for r in range(count):
        values[r * row_step + size] = 1.0
    return keys, values


@jitable
def first_lane(words, heads, from_first, array):
    """The first lane whose query may see a key, `from_first` behind the first lane's: in whole panels."""
    across = panel_width(array)
    return max(from_first, 0) // across * across if heads == 1 else 0


@jitable
def attend(words, numbers, memory, batch, kv_head, member, heads, start, first, count, at, has_past, computing):
    """Queries of some heads of a group, `count` of each from `at` on at positions from `first` on, and what they attend to."""
    stride, step, size, dim = words[Word.stride], words[Word.head_step], words[Word.value_step], words[Word.value_dim]
    row_step, depth = words[Word.row_step], words[Word.head_dim]
    result = floats(words, memory, Word.result, (size + 1) * stride, computing)
    levels = floats(words, memory, Word.levels, step * stride, computing)
    scores = floats(words, memory, Word.scores, ROWS_AT_ONCE * stride, computing)
    out_rows = floats(words, memory, Word.lane_rows, COLUMNS * size, computing)
    lanes = heads * count
    padded = lanes_of(lanes, result)
    head = kv_head * words[Word.group] + member
    queries_into_lanes(words, numbers, memory, batch, head, heads, at, count, padded, computing)
    place_lanes(words, memory, start, first, count, heads, padded, -1.0, computing)
    positions = lane_numbers(words, memory, POSITION, computing)
    gated = words[Word.gates] != 0
    zero(result, 0, (size + 1) * stride)
    if has_past:
        if words[Word.in_place] != 0:
            read_in_place(words, memory, batch * words[Word.kv_heads] + kv_head, lanes, computing)
        else:
            read_state(words, memory, padded, True, True, computing)
        if gated and words[Word.many] > 0:
            scale_lanes(result, size + 1, stride, padded, decay_since(words, memory, padded, computing))
    seen = first + count if words[Word.many] > 0 else start
    for key in range(start, seen, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, seen - key)
        keys, values = key_rows(words, memory, batch, kv_head, key, rows, computing)
        c = first_lane(words, heads, key - first, result)
        multiply(words, memory, keys, 0, step, 1, rows, levels, 0, stride, c, padded, depth, scores, 0, stride, False)
        weights_of(words, memory, scores, scores, positions, key - start, rows, c, padded, True, False, gated, computing)
        by_value(words, memory, values, 0, row_step, scores, c, padded, rows, True, result)
    norm_at = size * stride
    divide(result, dim, stride, padded, norm_at)
    from_lanes(result, stride, padded, dim, out_rows, size)
    for h in range(heads):
        row = (batch * words[Word.kv_heads] * words[Word.group] + head + h) * words[Word.length] + at
        rows_from(words[Word.out_kind], words[Word.out], row, count, dim, out_rows[h * count * size :], size, computing(1.0))
        if words[Word.total] != 0:
            for t in range(count):
                keep(words[Word.total], row + t, result[norm_at + h * count + t], computing)


@jitable
def divide(result, rows, stride, count, norm_at):
    """Divide rows of lanes by the norm's; 0 where that is 0, NaN where it overflowed."""
    for c in range(0, count, places(result)):
        norm = load(result, norm_at + c)
        nothing = (norm <= 0.0) & (norm * -1.0 <= 0.0)
        safe = select(nothing, 1.0, norm)
        doubt = norm - norm  # NaN for an infinite norm, else 0
        for r in range(rows):
            store(result, r * stride + c, select(nothing, 0.0, load(result, r * stride + c) / safe + doubt))


@jitable
def enter(words, memory, batch, kv_head, start, end, computing):
    """Let the state decay over a chunk, and add its keys."""
    row_step, size = words[Word.row_step], words[Word.value_dim]
    values = floats(words, memory, Word.value_rows, COLUMNS * row_step, computing)
    if words[Word.gates] != 0 and end > start and words[Word.in_place] == 0:
        scale_state(words, memory, whole_decay(words, memory, start, end, computing), computing)
    for first in range(start, end, COLUMNS):
        count = min(COLUMNS, end - first)
        padded = lanes_of(count, values)
        keys_into_lanes(words, memory, batch, kv_head, first, count, padded, computing)
        rows_into(words, Word.value, batch, kv_head, first, count, size, 1.0, values, row_step)
        until = decay_until(words, memory, start, end, first, count, padded, computing)
        if words[Word.gates] != 0:
            scale_rows(values, row_step, count, words[Word.value_step], until)
        if words[Word.in_place] != 0:
            enter_in_place(words, memory, batch * words[Word.kv_heads] + kv_head, count, computing)
            continue
        absorb(words, memory, count, padded, False, until, computing)


@jitable
def scale_rows(rows, step, count, size, factors):
    """Multiply each row by a factor of its own."""
    for r in range(count):
        for j in range(0, size, places(rows)):
            store(rows, r * step + j, load(rows, r * step + j) * factors[r])


@jitable
def collect(words, memory, head, span, computing):
    """What a span of chunks adds to the state, and what the state before it decays by."""
    decay = 1.0
    begin_state(words, memory, 0, 0, head, computing)
    for chunk in range(span * words[Word.span_chunks], (span + 1) * words[Word.span_chunks]):
        start, end = chunk * words[Word.span], min((chunk + 1) * words[Word.span], words[Word.many])
        cumulate_gates(words, memory, head, start, end, computing)
        enter(words, memory, head // words[Word.kv_heads], head % words[Word.kv_heads], start, end, computing)
        decay *= whole_decay(words, memory, start, end, computing)
    number = head * words[Word.spans] + span
    array_at(words[Word.decays], number + 1, np.float64)[number] = decay
    copy_state(words, memory, words[Word.states], number, computing)


@jitable
def state_before(words, memory, head, span, computing):
    """The state of a head before a span of its chunks."""
    begin_state(words, memory, words[Word.sums], words[Word.norm], head, computing)
    for earlier in range(span):
        join_state(words, memory, words[Word.states], head * words[Word.spans] + earlier, computing)


@jitable
def chunks_of(words, part):
    """The first chunk of a part, and one behind its last; in the quadratic form there is one, whose tokens parts share."""
    chunks = max(1, (words[Word.many] + words[Word.span] - 1) // words[Word.span])
    if words[Word.spans] == 1:
        return 0, chunks, chunks
    return part * words[Word.span_chunks], min((part + 1) * words[Word.span_chunks], chunks), chunks


@jitable
def is_own(words, part, block):
    """Whether tokens of a chunk are a part's."""
    return words[Word.spans] > 1 or block % words[Word.parts] == part


def make_forward(computing):
    """The kernel for tensors that are computed in `computing`, whatever they are stored as."""

    def forward(job):
        words, numbers = words_of(job)
        memory = own_memory(words)
        many, length, group, parts = words[Word.many], words[Word.length], words[Word.group], words[Word.parts]
        before = many - length if many > 0 else 0
        has_state, is_final = words[Word.norm] != 0, words[Word.end_norm] != 0
        done, start_task, end_task = take(words, 0, 0, 0)
        while start_task < end_task:
            for task in range(start_task, end_task):
                head, part = task // parts, task % parts
                batch, kv_head = head // words[Word.kv_heads], head % words[Word.kv_heads]
                begin_gates(words, memory, head, computing)
                if words[Word.collects] != 0:
                    if part < words[Word.spans] - 1:
                        collect(words, memory, head, part, computing)
                    continue
                first_chunk, last_chunk, chunks = chunks_of(words, part)
                if (has_state or is_final or chunks > 1) and words[Word.in_place] == 0:
                    state_before(words, memory, head, part if words[Word.spans] > 1 else 0, computing)
                ends = is_final and last_chunk == chunks and (words[Word.spans] > 1 or part == 0)
                for chunk in range(first_chunk, last_chunk):
                    start, end = chunk * words[Word.span], min((chunk + 1) * words[Word.span], many)
                    cumulate_gates(words, memory, head, start, end, computing)
                    first, last = max(start - before, 0), (end if many > 0 else length) - before
                    for at in range(first, last, COLUMNS):
                        if is_own(words, part, (at - first) // COLUMNS):
                            count = min(COLUMNS, last - at)
                            together = COLUMNS // count
                            past = has_state or chunk > 0
                            for member in range(0, group, together):
                                heads = min(together, group - member)
                                attend(
                                    words,
                                    numbers,
                                    memory,
                                    batch,
                                    kv_head,
                                    member,
                                    heads,
                                    start,
                                    at + before,
                                    count,
                                    at,
                                    past,
                                    computing,
                                )
                    if chunk + 1 < last_chunk or ends:
                        enter(words, memory, batch, kv_head, start, end, computing)
                if ends and words[Word.in_place] == 0:
                    end_state(words, memory, words[Word.end_sums], words[Word.end_norm], head, computing)
            done, start_task, end_task = take(words, done, start_task, end_task)
        return finish(words, done)

    return forward
