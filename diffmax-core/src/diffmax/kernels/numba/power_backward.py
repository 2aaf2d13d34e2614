"""Power attention's backward kernel: a thread takes a head of keys, and sweeps over its chunks twice.

The first sweep carries the state again, for the gradients of queries; the second, from the end, carries the state's gradient
for those of keys and values. Each computes the weights within a chunk for itself, so nothing is kept from one to the other. The
gradients of gates are sums of q . dq - k . dk (docs/theory.md, Eq. 34), which `power` takes. a is the gradient for the result,
divided by the norm.
"""

import numpy as np

from diffmax.kernels.numba.jobs import finish, take
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.power_forward import (
    chunks_of,
    collect,
    enter,
    first_lane,
    is_own,
    key_rows,
    keys_into_lanes,
    lanes_of,
    queries_into_lanes,
    scale_rows,
    state_before,
)
from diffmax.kernels.numba.power_parts import (
    absorb,
    begin_gates,
    begin_state,
    copy_state,
    cumulate_gates,
    decay_since,
    decay_until,
    end_state,
    fill_levels,
    join_state,
    multiply,
    place_lanes,
    pull_state,
    read_state,
    scale_state,
    weights_of,
    whole_decay,
)
from diffmax.kernels.numba.power_words import (
    COLUMNS,
    MEAN,
    MORE,
    POSITION,
    ROWS_AT_ONCE,
    Word,
    dense_rows_into,
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
from diffmax.kernels.numba.simd import array_at, load, places, splat, store, total

BEYOND = 3e38


@jitable
def gradient_rows(words, memory, batch, head, at, count, target, target_at, means, mean_at, computing):
    """Write a of `count` queries of a head as rows, and - a . out as numbers."""
    step, size, dim = words[Word.row_step], words[Word.value_step], words[Word.value_dim]
    out = floats(words, memory, Word.result, step, computing)
    width = places(target)
    row = (batch * words[Word.kv_heads] * words[Word.group] + head) * words[Word.length] + at
    totals = array_at(words[Word.total], row + count, computing)
    rows = target[target_at:]
    rows_into(words, Word.grad, batch, head, at, count, dim, 1.0, rows, step)
    for t in range(count):
        dense_rows_into(words[Word.out], row + t, 1, dim, out, step)
        norm = totals[row + t]
        if norm == 0.0:
            zero(rows, t * step, t * step + size)
            means[mean_at + t] = 0.0
        else:
            sums = splat(out, 0.0)
            for j in range(0, size, width):
                a = load(rows, t * step + j) / norm
                store(rows, t * step + j, a)
                sums = sums + a * load(out, j)
            means[mean_at + t] = -total(sums)


@jitable
def gradients_into_lanes(words, memory, batch, head, heads, at, count, padded, computing):
    """Write a of some heads' queries as rows, `value_rows`, and side by side, `lanes_t`, with - a . out behind."""
    step, size, stride = words[Word.row_step], words[Word.value_step], words[Word.stride]
    rows = floats(words, memory, Word.value_rows, COLUMNS * step, computing)
    lanes_t = floats(words, memory, Word.lanes_t, step * stride, computing)
    means = lane_numbers(words, memory, MEAN, computing)
    for h in range(heads):
        gradient_rows(words, memory, batch, head + h, at, count, rows, h * count * step, means, h * count, computing)
    zero(rows, heads * count * step, padded * step)
    zero(means, heads * count, padded)
    to_lanes(rows, step, padded, size, lanes_t, stride)
    for c in range(0, padded, places(means)):
        store(lanes_t, size * stride + c, load(means, c))
    return means


@jitable
def differentiate_queries(words, numbers, memory, batch, kv_head, member, heads, start, first, count, at, has_past, computing):
    """The gradients for queries, named as in `attend`."""
    stride, step, size = words[Word.stride], words[Word.head_step], words[Word.value_step]
    row_step, depth = words[Word.row_step], words[Word.head_dim]
    levels = floats(words, memory, Word.levels, step * stride, computing)
    of_levels = floats(words, memory, Word.of_levels, words[Word.level_rows] * stride, computing)
    scores = floats(words, memory, Word.scores, ROWS_AT_ONCE * stride, computing)
    slopes = floats(words, memory, Word.slopes, ROWS_AT_ONCE * stride, computing)
    lanes_t = floats(words, memory, Word.lanes_t, (size + 1) * stride, computing)
    rows_of_grad = floats(words, memory, Word.lane_rows, COLUMNS * step, computing)
    padded = lanes_of(heads * count, scores)
    head = kv_head * words[Word.group] + member
    queries_into_lanes(words, numbers, memory, batch, head, heads, at, count, padded, computing)
    place_lanes(words, memory, start, first, count, heads, padded, -1.0, computing)
    gradients_into_lanes(words, memory, batch, head, heads, at, count, padded, computing)
    positions = lane_numbers(words, memory, POSITION, computing)
    gated = words[Word.gates] != 0
    zero(of_levels, 0, words[Word.level_rows] * stride)
    if has_past:
        fill_levels(words, levels, padded)
        pull_state(words, memory, padded, True, computing)
        if gated and words[Word.many] > 0:
            scale_lanes(of_levels, depth, stride, padded, decay_since(words, memory, padded, computing))
    seen = first + count if words[Word.many] > 0 else start
    for key in range(start, seen, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, seen - key)
        keys, values = key_rows(words, memory, batch, kv_head, key, rows, computing)
        c = first_lane(words, heads, key - first, scores)
        multiply(words, memory, keys, 0, step, 1, rows, levels, 0, stride, c, padded, depth, scores, 0, stride, False)
        multiply(words, memory, values, 0, row_step, 1, rows, lanes_t, 0, stride, c, padded, size + 1, slopes, 0, stride, False)
        weights_of(words, memory, scores, slopes, positions, key - start, rows, c, padded, True, True, gated, computing)
        multiply(words, memory, keys, 0, 1, step, depth, slopes, 0, stride, c, padded, rows, of_levels, 0, stride, True)
    if words[Word.query_gates] != 0:
        moved = shares(words, memory, levels, of_levels, heads * count, computing)
        position = (batch * words[Word.kv_heads] + kv_head) * words[Word.many] + first
        sums = array_at(words[Word.query_gates], position + count, computing)
        for h in range(heads):
            for t in range(count):
                sums[position + t] += moved[h * count + t]
    from_lanes(of_levels, stride, padded, depth, rows_of_grad, step)
    scale = computing(numbers[Word.scale])
    for h in range(heads):
        row = (batch * words[Word.kv_heads] * words[Word.group] + head + h) * words[Word.length] + at
        rows_from(words[Word.kind], words[Word.grad_query], row, count, depth, rows_of_grad[h * count * step :], step, scale)


@jitable
def query_rows(words, numbers, memory, batch, head, at, count, computing):
    """Copy scaled queries, and a with - a . out behind."""
    step, row_step, size = words[Word.head_step], words[Word.row_step], words[Word.value_step]
    queries = floats(words, memory, Word.rows, ROWS_AT_ONCE * step, computing)
    grads = floats(words, memory, Word.more_rows, ROWS_AT_ONCE * row_step, computing)
    means = lane_numbers(words, memory, MORE, computing)
    rows_into(words, Word.query, batch, head, at, count, words[Word.head_dim], numbers[Word.scale], queries, step)
    gradient_rows(words, memory, batch, head, at, count, grads, 0, means, 0, computing)
    for r in range(count):
        grads[r * row_step + size] = means[r]
    return queries, grads


@jitable
def values_into_lanes(words, memory, batch, kv_head, first, count, padded, computing):
    """Write values side by side, with ones behind."""
    step, size, stride = words[Word.row_step], words[Word.value_step], words[Word.stride]
    rows = floats(words, memory, Word.value_rows, COLUMNS * step, computing)
    lanes_t = floats(words, memory, Word.lanes_t, step * stride, computing)
    rows_into(words, Word.value, batch, kv_head, first, count, words[Word.value_dim], 1.0, rows, step)
    zero(rows, count * step, padded * step)
    to_lanes(rows, step, padded, size, lanes_t, stride)
    lanes_t[size * stride : size * stride + padded] = 1.0


@jitable
def differentiate_keys(words, numbers, memory, batch, kv_head, start, end, first, count, is_live, computing):
    """The gradients for `count` keys from `first` on and for their values; `is_live`: the state's may not be 0."""
    stride, step, size = words[Word.stride], words[Word.head_step], words[Word.value_step]
    row_step, depth, dim = words[Word.row_step], words[Word.head_dim], words[Word.value_dim]
    levels = floats(words, memory, Word.levels, step * stride, computing)
    of_levels = floats(words, memory, Word.of_levels, words[Word.level_rows] * stride, computing)
    scores = floats(words, memory, Word.scores, ROWS_AT_ONCE * stride, computing)
    slopes = floats(words, memory, Word.slopes, ROWS_AT_ONCE * stride, computing)
    lanes_t = floats(words, memory, Word.lanes_t, (size + 1) * stride, computing)
    of_values = floats(words, memory, Word.of_values, (size + 1) * stride, computing)
    result = floats(words, memory, Word.result, (size + 1) * stride, computing)
    target = floats(words, memory, Word.lane_rows, COLUMNS * row_step, computing)
    padded = lanes_of(count, scores)
    keys_into_lanes(words, memory, batch, kv_head, first, count, padded, computing)
    values_into_lanes(words, memory, batch, kv_head, first, count, padded, computing)
    place_lanes(words, memory, start, first, count, 1, padded, BEYOND, computing)
    positions = lane_numbers(words, memory, POSITION, computing)
    gated = words[Word.gates] != 0
    zero(of_levels, 0, words[Word.level_rows] * stride)
    zero(of_values, 0, size * stride)
    if is_live:
        zero(result, 0, size * stride)
        read_state(words, memory, padded, False, False, computing)
        pull_state(words, memory, padded, False, computing)
        until = decay_until(words, memory, start, end, first, count, padded, computing)
        scale_lanes(of_levels, depth, stride, padded, until)
        for r in range(dim):
            for c in range(0, padded, places(until)):
                store(of_values, r * stride + c, load(result, r * stride + c) * load(until, c))
    before = words[Word.many] - words[Word.length]
    low, high = max(first, before, start), end
    for member in range(words[Word.group]):
        head = kv_head * words[Word.group] + member
        for query in range(low, high, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, high - query)
            queries, grads = query_rows(words, numbers, memory, batch, head, query - before, rows, computing)
            stop = min(padded, lanes_of(query + rows - first, scores))
            multiply(words, memory, queries, 0, step, 1, rows, levels, 0, stride, 0, stop, depth, scores, 0, stride, False)
            multiply(
                words, memory, grads, 0, row_step, 1, rows, lanes_t, 0, stride, 0, stop, size + 1, slopes, 0, stride, False
            )
            weights_of(words, memory, scores, slopes, positions, query - start, rows, 0, stop, False, True, gated, computing)
            multiply(words, memory, grads, 0, 1, row_step, dim, scores, 0, stride, 0, stop, rows, of_values, 0, stride, True)
            multiply(words, memory, queries, 0, 1, step, depth, slopes, 0, stride, 0, stop, rows, of_levels, 0, stride, True)
    if words[Word.grad_gates] != 0:
        differentiate_gates(words, memory, levels, of_levels, batch, kv_head, first, count, computing)
    head_row = (batch * words[Word.kv_heads] + kv_head) * words[Word.many] + first
    from_lanes(of_levels, stride, padded, depth, target, step)
    rows_from(words[Word.kind], words[Word.grad_key], head_row, count, depth, target, step, computing(1.0))
    from_lanes(of_values, stride, padded, dim, target, row_step)
    rows_from(words[Word.kind], words[Word.grad_value], head_row, count, dim, target, row_step, computing(1.0))


@jitable
def differentiate_gates(words, memory, levels, of_levels, batch, kv_head, first, count, computing):
    """Write k . dk / p of some keys."""
    moved = shares(words, memory, levels, of_levels, count, computing)
    row = (batch * words[Word.kv_heads] + kv_head) * words[Word.many] + first
    target = array_at(words[Word.grad_gates], row + count, computing)
    for t in range(count):
        target[row + t] = moved[t]


@jitable
def shares(words, memory, levels, of_levels, count, computing):
    """x . dx / p for each lane x: the sum of its weights times their gradients."""
    stride, width = words[Word.stride], places(levels)
    moved = lane_numbers(words, memory, MORE, computing)
    for c in range(0, lanes_of(count, levels), width):
        sums = load(levels, c) * load(of_levels, c)
        for d in range(1, words[Word.head_dim]):
            sums = sums + load(levels, d * stride + c) * load(of_levels, d * stride + c)
        store(moved, c, sums / float(words[Word.degree]))
    return moved


@jitable
def add_queries(words, numbers, memory, batch, kv_head, start, first, last, before, computing):
    """Add the gradient for the state that the queries from `first` to `last` read."""
    row_step, size, group = words[Word.row_step], words[Word.value_step], words[Word.group]
    values = floats(words, memory, Word.value_rows, COLUMNS * row_step, computing)
    gated = words[Word.gates] != 0 and words[Word.many] > 0
    for at in range(first, last, COLUMNS):
        count = min(COLUMNS, last - at)
        together = COLUMNS // count
        for member in range(0, group, together):
            heads = min(together, group - member)
            padded = lanes_of(heads * count, values)
            head = kv_head * group + member
            queries_into_lanes(words, numbers, memory, batch, head, heads, at, count, padded, computing)
            place_lanes(words, memory, start, at + before, count, heads, padded, -1.0, computing)
            means = gradients_into_lanes(words, memory, batch, head, heads, at, count, padded, computing)
            if gated:
                since = decay_since(words, memory, padded, computing)
                scale_rows(values, row_step, heads * count, size, since)
                for c in range(0, padded, places(means)):
                    store(means, c, load(means, c) * load(since, c))
            absorb(words, memory, heads * count, padded, True, means, computing)


@jitable
def product_with_end(words, memory, head, computing):
    """The state times its gradient."""
    rows, size, step = words[Word.monomials], words[Word.value_dim], words[Word.state_step]
    state = floats(words, memory, Word.state, rows * step, computing)
    of_norm = array_at(words[Word.end_norm], (head + 1) * rows, computing)
    of_sums = array_at(words[Word.end_sums], (head + 1) * rows * size, computing)
    found = 0.0
    for row in range(rows):
        for j in range(size):
            found += np.float64(state[row * step + j]) * np.float64(of_sums[(head * rows + row) * size + j])
        found += np.float64(state[row * step + step - 1]) * np.float64(of_norm[head * rows + row])
    return found


@jitable
def keys_backward(words, numbers, memory, batch, kv_head, chunk, part, is_live, computing):
    """From the state's gradient behind a chunk those for its keys, and what the state's gradient is before it.

    Returns whether that may not be 0.
    """
    head = batch * words[Word.kv_heads] + kv_head
    start, end = chunk * words[Word.span], min((chunk + 1) * words[Word.span], words[Word.many])
    cumulate_gates(words, memory, head, start, end, computing)
    blocks = (end - start + COLUMNS - 1) // COLUMNS
    if words[Word.collects] == 0:
        for k in range(blocks):
            if is_own(words, part, k):
                key = start + k * COLUMNS
                count = min(COLUMNS, end - key)
                differentiate_keys(words, numbers, memory, batch, kv_head, start, end, key, count, is_live, computing)
    if is_live and words[Word.gates] != 0:
        scale_state(words, memory, whole_decay(words, memory, start, end, computing), computing)
    before = words[Word.many] - words[Word.length] if words[Word.many] > 0 else 0
    first, last = max(start - before, 0), (end if words[Word.many] > 0 else words[Word.length]) - before
    goes_on = chunk > 0 or words[Word.grad_norm] != 0
    if goes_on and first < last and (words[Word.spans] > 1 or part == 0):
        add_queries(words, numbers, memory, batch, kv_head, start, first, last, before, computing)
        return True
    return is_live


@jitable
def collect_gradient(words, numbers, memory, head, span, computing):
    """What a span of chunks adds to the state's gradient."""
    first_chunk, last_chunk, _ = chunks_of(words, span)
    begin_state(words, memory, 0, 0, head, computing)
    is_live, decay = False, 1.0
    for i in range(last_chunk - first_chunk):
        chunk = last_chunk - 1 - i
        batch, kv_head = head // words[Word.kv_heads], head % words[Word.kv_heads]
        is_live = keys_backward(words, numbers, memory, batch, kv_head, chunk, span, is_live, computing)
        start, end = chunk * words[Word.span], min((chunk + 1) * words[Word.span], words[Word.many])
        decay *= whole_decay(words, memory, start, end, computing)
    number = head * words[Word.spans] + span
    if span == words[Word.spans] - 1:  # the others' are written with what they add to the state
        array_at(words[Word.decays], number + 1, np.float64)[number] = decay
    copy_state(words, memory, words[Word.of_states], number, computing)


def make_backward(computing):
    """The kernel for tensors that are computed in `computing`, whatever they are stored as."""

    def backward(job):
        words, numbers = words_of(job)
        memory = own_memory(words)
        many, length, group, parts = words[Word.many], words[Word.length], words[Word.group], words[Word.parts]
        before = many - length if many > 0 else 0
        has_state, has_end = words[Word.norm] != 0, words[Word.end_norm] != 0
        wants_state, wants_end = words[Word.grad_norm] != 0, has_end and words[Word.grad_gates] != 0
        done, start_task, end_task = take(words, 0, 0, 0)
        while start_task < end_task:
            for task in range(start_task, end_task):
                head, part = task // parts, task % parts
                batch, kv_head = head // words[Word.kv_heads], head % words[Word.kv_heads]
                begin_gates(words, memory, head, computing)
                if words[Word.collects] != 0:
                    if part < words[Word.spans] - 1:
                        collect(words, memory, head, part, computing)
                    if part > 0:
                        collect_gradient(words, numbers, memory, head, part, computing)
                    continue
                first_chunk, last_chunk, chunks = chunks_of(words, part)
                spans = words[Word.spans]
                needs_state = has_state or has_end or chunks > 1
                if needs_state:
                    state_before(words, memory, head, part if spans > 1 else 0, computing)
                ends = wants_end and last_chunk == chunks and (spans > 1 or part == 0)
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
                                differentiate_queries(
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
                if ends:
                    of_end = array_at(words[Word.of_end], head + 1, np.float64)
                    of_end[head] = product_with_end(words, memory, head, computing)
                if needs_state:
                    begin_state(words, memory, words[Word.end_sums], words[Word.end_norm], head, computing)
                    for later in range(spans - 1 - part if spans > 1 else 0):
                        number = head * spans + spans - 1 - later
                        join_state(words, memory, words[Word.of_states], number, computing)
                is_live = has_end or last_chunk < chunks
                for i in range(last_chunk - first_chunk):
                    chunk = last_chunk - 1 - i
                    is_live = keys_backward(words, numbers, memory, batch, kv_head, chunk, part, is_live, computing)
                if wants_state and first_chunk == 0 and (spans > 1 or part == 0):
                    end_state(words, memory, words[Word.grad_sums], words[Word.grad_norm], head, computing)
            done, start_task, end_task = take(words, done, start_task, end_task)
        return finish(words, done)

    return backward
