"""Second launch of decoding: the scores of the pages that can matter, and then, by the last program of a block of rows, tau.

Scores above the lower bound are listed, a few for each split, and sums are taken at the guess. tau is solved on the lists where
they hold all; else one step is taken from the guess. The third launch says whether that was enough.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import (
    HALLEY_STEPS,
    HARDWARE_NONE,
    next_iterate,
    powers,
    scaled_scores,
    unsolved,
    with_sink,
)
from diffmax.kernels.triton.decoding.tiles import (
    COUNT,
    GUESS_DELTA,
    GUESS_TOP,
    LISTED,
    SAMPLE_DELTA,
    SAMPLE_TOP,
    SPLIT_TOP,
    SUMS,
    exponents,
    finite,
    is_last,
    largest,
    load_queries,
    load_tile,
    moved,
    read_slot,
    rows_of,
    rules_of,
    scores_of,
    stretch,
    tokens_of,
    whose,
    write_slot,
)

_EPS = tl.constexpr(2.0**-23)


@triton.jit
def lower_bound(work_ptr, block, splits, sink, e, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """The largest score of all samples, the largest of their deltas, and the guess, both measured from it."""
    tops = read_slot(work_ptr, block, SAMPLE_TOP, splits, -float("inf"), BLOCK_M, SPLITS)
    others = read_slot(work_ptr, block, GUESS_TOP, splits, -float("inf"), BLOCK_M, SPLITS)
    others = tl.where(others == float("inf"), -float("inf"), others)  # whether NaN is there to be seen is not said here
    m = tl.maximum(tl.maximum(tl.max(tops, axis=1), tl.max(others, axis=1)), sink)
    deltas = read_slot(work_ptr, block, SAMPLE_DELTA, splits, 0.0, BLOCK_M, SPLITS)
    low = tl.maximum(tl.max(moved(deltas, tops, m[:, None], e[:, None]), axis=1), 0.0)
    deltas = read_slot(work_ptr, block, GUESS_DELTA, splits, 0.0, BLOCK_M, SPLITS)
    there = others > -float("inf")
    guess = tl.sum(tl.where(there, moved(deltas, others, m[:, None], e[:, None]), 0.0), axis=1)
    guess = tl.maximum(guess / tl.maximum(tl.sum(there.to(tl.float32), axis=1), 1.0), low)
    return m, low, guess


@triton.jit(do_not_specialize=[
    "q_b", "q_l", "q_h", "kn_b", "kn_s", "kn_h", "table_b", "alibi_b", "new", "room", "page_size", "parts",
    "kv_heads", "group", "length", "blocks", "splits", "most_tiles", "left", "right", "steps", "scale", "softcap", "e", "k",
])  # fmt: skip
def kvcache_read_kernel(
    q_ptr, k_ptr, kn_ptr, seqlens_ptr, places_ptr, table_ptr, e_ptr, alibi_ptr, sink_ptr,
    bounds_ptr, scores_ptr, work_ptr, lists_ptr, state_ptr, pages_ptr, counters_ptr,
    q_b, q_l, q_h, q_d, k_b, k_s, k_h, k_d, kn_b, kn_s, kn_h, kn_d, table_b, alibi_b,
    new, room, page_size, parts, kv_heads, group, length, blocks, splits, most_tiles, left, right, steps,
    scale, softcap, e, k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGED: tl.constexpr, HAS_NEW: tl.constexpr, PLACES: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_SINK: tl.constexpr, OPTIONS: tl.constexpr,
    E_TENSOR: tl.constexpr, K: tl.constexpr, CUT: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """scores (block, tile, BLOCK_M, BLOCK_N), the tiles' largest in bounds' place, m and delta.  Grid: as the first launch."""
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, kv_head, held, head, query, in_rows, span = whose(
        block, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES, BLOCK_M
    )
    _opens, begin, end = span
    first, last = stretch(split, splits, span, length, left, page_size, parts, HAS_NEW, OPTIONS.WINDOW)
    row_e, row_k = exponents(e_ptr, e, k, head, E_TENSOR)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    rules = rules_of(b, head, span, length, alibi_ptr, alibi_b, left, right, scale, softcap, OPTIONS)
    sink = zero - float("inf")
    if HAS_SINK:
        sink = tl.load(sink_ptr + head)
    q = load_queries(q_ptr, b, head, query, in_rows, q_b, q_l, q_h, q_d, HEAD_DIM, BLOCK_D)
    origin, low, guess = lower_bound(work_ptr, block, splits, sink, row_e, BLOCK_M, SPLITS)
    m, delta = origin, low  # as they are known so far
    top_of_split, total, slopes, curve = zero - float("inf"), zero, zero, zero
    count = tl.zeros((BLOCK_M,), tl.int32)
    read, last_page = 0, -1
    rows, lanes = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    for tile in range(first, last):
        bounds_at = bounds_ptr + (block * most_tiles + tile) * BLOCK_M + rows
        alive = 1
        if HAS_BOUNDS:
            bound = tl.load(bounds_at)
            slack = 8 * _EPS * (1.0 + row_e * (tl.abs(bound) + tl.abs(finite(m))))
            below = (m > -float("inf")) & (row_e * (bound - finite(m)) <= delta - 1.0 - slack)
            alive = tl.max((in_rows & (below == 0) & (bound > -float("inf"))).to(tl.int32), axis=0)
        if alive > 0:
            read += (tile // parts != last_page).to(tl.int32)
            last_page = tile // parts
            place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
            at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, k_b, k_s, PAGED)
            keys = load_tile(
                k_ptr, kn_ptr, at, place, there, b, kv_head, begin, k_h, k_d, kn_b, kn_s, kn_h, kn_d, HEAD_DIM, BLOCK_D, HAS_NEW
            )
            scores = scores_of(q, keys, place, there, in_rows, query, rules, OPTIONS)
            at = ((block * most_tiles + tile) * BLOCK_M + rows)[:, None] * BLOCK_N + lanes[None, :]
            tl.store(scores_ptr + at, scores)
            top = largest(scores)
            tl.store(bounds_at, top)
            top_of_split = tl.maximum(top_of_split, top)
            risen = tl.maximum(m, top)
            delta = tl.maximum(moved(delta, m, risen, row_e), 0.0)
            m = risen
            z = scaled_scores(scores, m, row_e)
            listed = z > (delta - 1.0)[:, None]
            index = count[:, None] + tl.cumsum(listed.to(tl.int32), axis=1) - 1
            at = ((block * LISTED + index) * BLOCK_M + rows[:, None]) * SPLITS + split
            tl.store(lists_ptr + at, scores, mask=listed & (index < LISTED))
            count += tl.sum(listed.to(tl.int32), axis=1)
            base, r = powers(scaled_scores(scores, origin, row_e), guess, row_k, K, HARDWARE_NONE, PTX)
            total += tl.sum(r * base * base, axis=1)
            slopes += tl.sum(r * base, axis=1)
            curve += tl.sum(r, axis=1)
        else:
            tl.store(bounds_at, zero - float("inf"))
    write_slot(work_ptr, block, SPLIT_TOP, split, top_of_split, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, COUNT, split, count.to(tl.float32), BLOCK_M, SPLITS)
    write_slot(work_ptr, block, SUMS, split, total, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, SUMS + 1, split, slopes, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, SUMS + 2, split, curve, BLOCK_M, SPLITS)
    tl.store(pages_ptr + block * splits + split, read)

    if is_last(counters_ptr + block * 2, splits):
        tops = read_slot(work_ptr, block, SPLIT_TOP, splits, -float("inf"), BLOCK_M, SPLITS)
        m = tl.maximum(tl.max(tops, axis=1), sink)
        low = tl.maximum(moved(low, origin, m, row_e), 0.0)
        counts = read_slot(work_ptr, block, COUNT, splits, 0.0, BLOCK_M, SPLITS).to(tl.int32)
        # what a split listed before it knew of a larger score elsewhere does not matter if its own largest does not
        counts = tl.where(row_e[:, None] * (tops - finite(m)[:, None]) > (low - 1.0)[:, None], counts, 0)
        most = tl.max(counts, axis=1)
        size = zero + end.to(tl.float32)
        # one step from the guess
        total = tl.sum(read_slot(work_ptr, block, SUMS, splits, 0.0, BLOCK_M, SPLITS), axis=1)
        slopes = tl.sum(read_slot(work_ptr, block, SUMS + 1, splits, 0.0, BLOCK_M, SPLITS), axis=1)
        curve = tl.sum(read_slot(work_ptr, block, SUMS + 2, splits, 0.0, BLOCK_M, SPLITS), axis=1)
        started = moved(guess, origin, m, row_e)
        if HAS_SINK:
            total, slopes, curve = with_sink(total, slopes, curve, sink, m, started, row_e, row_k, K, HARDWARE_NONE, PTX)
        useful = (started >= 0.0) & (total > 0.0) & (total < 1e30) & (slopes > 0.0)
        start = tl.where(useful, started, low)
        total, slopes, curve = tl.where(useful, total, 1.0), tl.where(useful, slopes, 1.0), tl.where(useful, curve, 1.0)
        stepped, _ = next_iterate(start, low, zero + 1.0, total, slopes, curve, row_e, row_k, useful)
        # or all of it, on lists that hold every candidate
        whole = most <= LISTED
        deepest = tl.max(tl.where(whole, most, 0), axis=0)
        delta, floor, going, step = low, low, 1, 0
        while (going > 0) & (step < steps):
            total, slopes, curve = zero, zero, zero
            for entry in range(deepest):
                at = ((block * LISTED + entry) * BLOCK_M + rows)[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
                scores = tl.load(lists_ptr + at, mask=whole[:, None] & (entry < counts), other=-float("inf"))
                base, r = powers(scaled_scores(scores, m, row_e), delta, row_k, K, HARDWARE_NONE, PTX)
                total += tl.sum(r * base * base, axis=1)
                slopes += tl.sum(r * base, axis=1)
                curve += tl.sum(r, axis=1)
            if HAS_SINK:
                total, slopes, curve = with_sink(total, slopes, curve, sink, m, delta, row_e, row_k, K, HARDWARE_NONE, PTX)
            far = whole & in_rows & unsolved(total, slopes, curve, delta, row_e, row_k, size, CUT)
            going = tl.max(far.to(tl.int32), axis=0)
            bends = far & (step < HALLEY_STEPS)
            total, slopes = tl.where(far, total, 1.0), tl.where(far, slopes, 1.0)
            moved_to, lifted = next_iterate(delta, floor, zero + 1.0, total, slopes, curve, row_e, row_k, bends)
            delta, floor = tl.where(far, moved_to, delta), tl.where(far, lifted, floor)
            step += 1
        tl.store(state_ptr + block * 2 * BLOCK_M + rows, m)
        tl.store(state_ptr + (block * 2 + 1) * BLOCK_M + rows, tl.where(whole, delta, stepped))
