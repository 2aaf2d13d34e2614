"""The row operator for CPUs, compiled by Numba: the kernels, and the jobs that they find their rows in.

`rows` is the way in. What happens to a row is in `one_row`, `solver` and `gradient`; what that is made of, in `functions` and
`simd`.

A row whose list of candidates (entries with z > -1, Eq. 2) is short joins a group: the lists of as many rows as a vector has
places are solved together, one row per place. A longer one is solved alone, its entries side by side. Where lists would leave
out little of short rows, a group is solved on all their entries. Equations are those of docs/theory.md; what each step costs
stands in docs/performance.md.
"""

import functools
import math
from struct import Struct

import numpy as np
import torch
from numba import cfunc
from numba.core import types
from numba.core.ccallback import CFunc

from diffmax.kernels.numba.cache import compile_cached
from diffmax.kernels.numba.functions import WHOLE
from diffmax.kernels.numba.gradient import (
    centred,
    centred_sum,
    few_slopes,
    score_sums,
    slope_and_alpha_sums,
    slope_sums,
    slope_sums_by_table,
    square_roots,
)
from diffmax.kernels.numba.one_row import (
    DEAD,
    EMPTY,
    GROUPED,
    GROUPED_SHARE,
    LISTED,
    LONGEST,
    candidate_share,
    copy,
    fill,
    join,
    listed,
    row_alone,
    sparse_share,
    stand,
    top_of,
    write_each,
)
from diffmax.kernels.numba.parts import jitable
from diffmax.kernels.numba.simd import BYTES, array_at, fetch_add, get, load, put, splat, store, total
from diffmax.kernels.numba.solver import SUMMED, solve_group
from diffmax.operators.common.numerics import MIN_E

PAGE = 4096  # bytes: what the low bits of an address tell apart

# A kernel is a C function of one address, where a job stands as words of 8 bytes. It returns how many rows it did. Any number
# of threads may run one job: each takes the next chunk of rows that none has taken. A job that is one chunk is for one thread
# and is read only. Strides and sizes are in elements; what is not there has address 0.
KERNEL = types.int64(types.intp)
WORDS = 19  # of the longest job

# The first words of every job: the next row to take, rows done, all rows, and how many are taken at a time.
NEXT, DONE, STOP, CHUNK = range(4)
# then x, its stride, p, m, delta, e, its stride, n, integer (k, if it is one, or where its table begins, or 0), steps,
# normalise, e_value
FORWARD_JOB = Struct("=15qd")
# then grad, its stride, p, its stride, x, its stride, m, delta, grad_x, grad_e, e, its stride, n, the table of alpha, e_value
BACKWARD_JOB = Struct("=18qd")


@jitable
def apart(size, width):
    """At least `size`, so that arrays which follow each other at this distance do not share the low bits of their addresses.

    A processor takes a load for one of what it has just stored where the last twelve bits are those, and waits.
    """
    page = PAGE // BYTES * width
    return (size + page - 1) // page * page + page // 3 // width * width


@jitable
def first_aligned(array, beside):
    """Index of the first element at a line of the cache a quarter of a page behind one that `beside` may have (see `apart`).

    A vector that starts there lies in one line.
    """
    return ((beside // BYTES + 16) * BYTES - array.ctypes.data) % PAGE // array.itemsize


@jitable
def words_of(job):
    """The job's words, as integers and as numbers."""
    return array_at(job, WORDS, np.int64), array_at(job, WORDS, np.float64)


@jitable
def take(words, done, start, end):
    """Count the rows from start to end as done, and take the next ones, if any are left; returns done, start and end."""
    done += end - start
    start = fetch_add(words, NEXT, words[CHUNK]) if words[CHUNK] < words[STOP] else end
    return done, start, min(start + words[CHUNK], words[STOP])


@jitable
def finish(words, done):
    """Tell whoever shares the job how many rows are done; returns it."""
    if words[CHUNK] < words[STOP]:
        fetch_add(words, DONE, done)
    return done


@jitable
def keep(at, row, value, computing):
    """Write a number of a row, if there is somewhere to."""
    if at != 0:
        array_at(at, row + 1, computing)[row] = value


@jitable
def exponent(at, stride, value, row, computing):
    """e of a row, from where each row's stands, or the same for all."""
    return array_at(at, row * stride + 1, computing)[row * stride] if at != 0 else computing(value)


def constants(dtype, computing):
    """Bytes of a score, numbers in a vector, and the least e that is told from 0."""
    return np.dtype(dtype).itemsize, BYTES // np.dtype(computing).itemsize, computing(MIN_E)


def _forward(dtype, computing):
    """The forward kernel for scores whose bits are `dtype` (see simd.py), computed in `computing`."""
    itemsize, width, least_e = constants(dtype, computing)

    def forward(job):
        words, numbers = words_of(job)
        x_at, x_stride, p_at, m_at, delta_at, e_at, e_stride, n = (
            *(words[4], words[5], words[6], words[7]),
            *(words[8], words[9], words[10], words[11]),
        )
        integer, steps, normalise, e_value = words[12], words[13], words[14] != 0, numbers[15]
        long = apart(n + width, width)
        collects = 0 < integer <= WHOLE and LISTED < n <= GROUPED
        lists = min(n, GROUPED if collects else LISTED) * width
        memory = np.empty(3 * lists + 3 * long + 4 * width + PAGE // itemsize, computing)
        scratch = memory[first_aligned(memory, x_at) :]
        acc = scratch[:width]
        lane_count, lane_e, lane_delta, lane_factor = acc, scratch[width:], scratch[2 * width :], scratch[3 * width :]
        z, weights = scratch[4 * width :], scratch[4 * width + lists :]
        lists_other, long_z = scratch[4 * width + 2 * lists :], scratch[4 * width + 3 * lists :]
        long_weights, long_other = long_z[long:], long_z[2 * long :]
        indices = np.empty(LISTED * width + long, np.int32)
        index, long_index = indices[: LISTED * width], indices[LISTED * width :]
        # rows that are solved together later, up to 2 * width, one behind the other
        kept = np.empty(2 * lists if collects else 1, dtype)
        collected, whose, many = array_at(kept.ctypes.data, kept.size, dtype), np.empty(2 * width, np.int64), 0
        done, start, end = take(words, 0, 0, 0)
        while start < end or many > 0:
            base = start
            while base < end or many >= width or (many > 0 and start >= end):
                collected_now = many >= width or base >= end
                rows = min(width, many if collected_now else end - base)
                first = collected if collected_now else array_at(x_at + base * x_stride * itemsize, n, dtype)
                step = n if collected_now else x_stride
                short = rows == width and width <= n <= LISTED
                if short:  # to judge by one row
                    e = exponent(e_at, e_stride, e_value, base, computing)
                    top, bad = top_of(first, n)
                    most = 1.0 if bad else LONGEST * candidate_share(first, n, top, e)
                    short = most * n + (EMPTY[1] if 0 < integer <= WHOLE else EMPTY[0]) >= n
                if short or collected_now:
                    for lane in range(width):
                        if collected_now and lane >= rows:  # with a copy in every place that is left
                            whose[lane] = whose[0]
                            copy(collected[lane * n :], collected, n)
                        row = whose[lane] if collected_now else base + lane
                        lane_e[lane] = exponent(e_at, e_stride, e_value, row, computing)
                    short = stand(first, step, n, z, lane_count, lane_e, lane_factor, least_e)
                longest = n if short else 0
                if short:
                    for lane in range(rows):
                        keep(m_at, whose[lane] if collected_now else base + lane, lane_factor[lane], computing)
                else:
                    fill(z, min(n, LISTED) * width, DEAD, acc)
                    fill(lane_count, width, 0.0, acc)
                    fill(lane_e, width, 0.5, acc)
                for lane in range(0 if short else rows):
                    row = base + lane
                    x = array_at(x_at + row * x_stride * itemsize, n, dtype)
                    p = array_at(p_at + row * n * itemsize, n, dtype)
                    e = exponent(e_at, e_stride, e_value, row, computing)
                    top, bad = top_of(x, n)
                    if bad or top == math.inf or not 0.0 <= e <= 1.0:
                        keep(m_at, row, math.nan if bad else top, computing)
                        keep(delta_at, row, math.nan, computing)
                        fill(p, n, math.nan, acc)
                        continue
                    keep(m_at, row, top, computing)
                    if top == -math.inf:
                        keep(delta_at, row, 0.0, computing)
                        fill(p, n, 0.0, acc)
                        continue
                    e = max(e, least_e)
                    if collects and candidate_share(x, n, top, e) > GROUPED_SHARE:
                        copy(collected[many * n :], x, n)
                        whose[many] = row
                        many += 1
                        continue
                    lane_e[lane] = e
                    count = listed(x, n, top, e, long_z, long_index, sparse_share(integer))
                    if not 0 <= count <= LISTED:
                        delta = row_alone(
                            *(x, p, n, count, top, e, integer, steps, normalise),
                            *(long_z, long_weights, long_other, long_index),
                        )
                        keep(delta_at, row, delta, computing)
                    else:
                        join(count, long_z, long_index, z, index, lane)
                        lane_count[lane] = count
                        longest = max(longest, count)
                if longest > 0:
                    deltas, sums = solve_group(
                        z, weights, lists_other, longest, load(lane_count, 0), load(lane_e, 0), integer, steps
                    )
                    store(lane_delta, 0, deltas)
                    store(lane_factor, 0, 1.0 / sums if normalise else sums * 0.0 + 1.0)
                    if short:
                        p = collected if collected_now else array_at(p_at + base * n * itemsize, n, dtype)
                        write_each(weights, load(lane_factor, 0), p, n)
                    for lane in range(rows):
                        count = int(lane_count[lane])
                        if count == 0:
                            continue
                        row = whose[lane] if collected_now else base + lane
                        keep(delta_at, row, lane_delta[lane], computing)
                        p = array_at(p_at + row * n * itemsize, n, dtype)
                        if collected_now:
                            copy(p, collected[lane * n :], n)
                        if short:
                            continue
                        fill(p, n, 0.0, acc)
                        for i in range(count):
                            put(p, index[lane * LISTED + i], weights[i * width + lane] * lane_factor[lane])
                if collected_now:
                    many -= rows
                    copy(collected, collected[width * n :], many * n)
                    copy(whose, whose[width:], many)
                else:
                    base += width
            if start < end:
                done, start, end = take(words, done, start, end)
        return finish(words, done)

    return forward


def _backward(dtype, computing):
    """The backward kernel."""
    itemsize, width, least_e = constants(dtype, computing)

    def backward(job):
        words, numbers = words_of(job)
        grad_at, grad_stride, p_at, p_stride, x_at, x_stride = words[4], words[5], words[6], words[7], words[8], words[9]
        m_at, delta_at, grad_x_at, grad_e_at = words[10], words[11], words[12], words[13]
        e_at, e_stride, n, table_at, e_value = words[14], words[15], words[16], words[17], numbers[18]
        m, delta = array_at(m_at, words[STOP], computing), array_at(delta_at, words[STOP], computing)
        wants_alpha, from_scores = grad_e_at != 0, x_at != 0
        padded = (n + width - 1) // width * width
        second = padded if wants_alpha or from_scores else 0
        memory = np.empty(padded + second + 2 * width + PAGE // itemsize, computing)
        scratch = memory[first_aligned(memory, p_at) :]
        last, last_g, s = scratch[:width], scratch[width:], scratch[2 * width :]
        acc, w = last, s[padded if second else 0 :]
        other, live = np.empty(SUMMED, computing), np.empty(SUMMED // width + 1, np.int32)
        whole = n // width * width
        half = e_at == 0 and e_value == 0.5
        done, start, end = take(words, 0, 0, 0)
        while start < end:
            for row in range(start, end):
                p, g = (
                    array_at(p_at + row * p_stride * itemsize, n, dtype),
                    array_at(grad_at + row * grad_stride * itemsize, n, dtype),
                )
                x = array_at(x_at + row * x_stride * itemsize, n, dtype)
                grad_x = array_at(grad_x_at + row * n * itemsize, n, dtype)
                if get(p, 0) != get(p, 0) or m[row] == -math.inf:  # rows are NaN as a whole; fully masked ones are 0
                    lost = math.nan if m[row] != -math.inf else 0.0
                    fill(grad_x, n, lost, acc)
                    keep(grad_e_at, row, lost, computing)
                    continue
                e = splat(acc, max(exponent(e_at, e_stride, e_value, row, computing), least_e))
                sum_s, sum_sg = 0.0, 0.0
                for block in range(0, n, SUMMED):
                    stop_at = min(block + SUMMED, whole)
                    if from_scores:
                        sums, products = score_sums(x, g, s, w, block, stop_at, e, m[row], delta[row])
                    elif wants_alpha:
                        sums, products = slope_and_alpha_sums(p, g, s, w, block, stop_at, e)
                    elif half:
                        sums, products = square_roots(p, g, s, block, stop_at)
                    elif table_at != 0:
                        sums, products = slope_sums_by_table(p, g, s, other, live, block, stop_at, table_at)
                    elif n <= 2 * width:
                        sums, products = few_slopes(p, g, s, block, stop_at, e)
                    else:
                        sums, products = slope_sums(p, g, s, other, live, block, stop_at, e)
                    sum_s, sum_sg = sum_s + total(sums), sum_sg + total(products)
                if whole < n:
                    source, beyond = (x, -math.inf) if from_scores else (p, 0.0)
                    for place in range(width):
                        inside = whole + place < n
                        last[place] = get(source, whole + place) if inside else beyond
                        last_g[place] = get(g, whole + place) if inside else 0.0
                    end_s, end_w = s[whole:], w[whole:]
                    if from_scores:
                        sums, products = score_sums(last, last_g, end_s, end_w, 0, width, e, m[row], delta[row])
                    elif wants_alpha:
                        sums, products = slope_and_alpha_sums(last, last_g, end_s, end_w, 0, width, e)
                    elif half:
                        sums, products = square_roots(last, last_g, end_s, 0, width)
                    elif table_at != 0:
                        sums, products = slope_sums_by_table(last, last_g, end_s, other, live, 0, width, table_at)
                    else:
                        sums, products = few_slopes(last, last_g, end_s, 0, width, e)
                    sum_s, sum_sg = sum_s + total(sums), sum_sg + total(products)
                mean = sum_sg / sum_s if sum_s != 0.0 else 0.0
                centred(s, g, grad_x, n, computing(mean))
                if wants_alpha:
                    keep(grad_e_at, row, -centred_sum(w, g, n, mean, computing(mean)), computing)
            done, start, end = take(words, done, start, end)
        return finish(words, done)

    return backward


# dtype -> what its bits are stored as, and what one computes in
STORED = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.uint16, np.float32),
    torch.float16: (np.int16, np.float32),
}


@functools.cache
def compiled(name: str, dtype: torch.dtype) -> CFunc:
    """The kernel "forward" or "backward" for a dtype, compiled now or read from the cache on disk."""
    make = {"forward": _forward, "backward": _backward}[name]
    kernel: CFunc = compile_cached(cfunc, KERNEL, error_model="numpy", function=make(*STORED[dtype]))
    return kernel
