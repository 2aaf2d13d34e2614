"""What decoding's kernels share: whose program it is, where a tile of keys lies, a tile of scores.

A program has BLOCK_M rows, the queries of one sequence that share a key head: row r is query r % length of head r // length of
the group. A page of the cache has `parts` tiles of BLOCK_N tokens, so that no tile reaches over a page's end.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import head_exponent
from diffmax.kernels.triton.common.numerics import HARDWARE_NONE, next_iterate, powers, scaled_scores, with_sink
from diffmax.kernels.triton.common.scores import ABSENT, Rules, score, visible

# What the programs of one block of rows, `split` over the cache, leave for the next launch, each (BLOCK_M, SPLITS):
SAMPLE_TOP = tl.constexpr(0)  # of the sample that the lower bound is taken from: its largest score and its delta
SAMPLE_DELTA = tl.constexpr(1)
GUESS_TOP = tl.constexpr(2)  # of the sample that the first guess is taken from
GUESS_DELTA = tl.constexpr(3)
SPLIT_TOP = tl.constexpr(4)  # the largest score of all
COUNT = tl.constexpr(5)  # how many scores are listed, or would be
SUMS = tl.constexpr(6)  # three: S, S_1 and the sum of b^(k-2) at the guess, then at delta
STEPPED_SUMS = tl.constexpr(9)  # the same after one step from the guess
SUPPORT = tl.constexpr(12)
SLOTS = tl.constexpr(13)
# Scores that one split lists for a row
LISTED = tl.constexpr(16)

_SLACK = tl.constexpr(2.0**-16)


@triton.jit
def slot(work_ptr, block, which, rows, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """Pointers (rows, 1) to the rows of one of the tables above."""
    return work_ptr + ((block * SLOTS + which) * BLOCK_M + rows.to(tl.int64))[:, None] * SPLITS


@triton.jit
def read_slot(work_ptr, block, which, rows, splits, other, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """Rows of one of the tables, (rows, SPLITS)."""
    lanes = tl.arange(0, SPLITS)[None, :]
    return tl.load(slot(work_ptr, block, which, rows, BLOCK_M, SPLITS) + lanes, mask=lanes < splits, other=other)


@triton.jit
def write_slot(work_ptr, block, which, split, values, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """A split's column of one of the tables."""
    tl.store(slot(work_ptr, block, which, tl.arange(0, BLOCK_M), BLOCK_M, SPLITS) + split, values[:, None])


@triton.jit
def write_sums(work_ptr, block, which, split, total, slopes, curve, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """A split's part of three sums, from tiles whose lanes hold parts of them."""
    write_slot(work_ptr, block, which, split, tl.sum(total, axis=1), BLOCK_M, SPLITS)
    write_slot(work_ptr, block, which + 1, split, tl.sum(slopes, axis=1), BLOCK_M, SPLITS)
    write_slot(work_ptr, block, which + 2, split, tl.sum(curve, axis=1), BLOCK_M, SPLITS)


@triton.jit
def read_sums(work_ptr, block, which, rows, splits, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """Three sums over all splits, each (rows,)."""
    total = tl.sum(read_slot(work_ptr, block, which, rows, splits, 0.0, BLOCK_M, SPLITS), axis=1)
    slopes = tl.sum(read_slot(work_ptr, block, which + 1, rows, splits, 0.0, BLOCK_M, SPLITS), axis=1)
    curve = tl.sum(read_slot(work_ptr, block, which + 2, rows, splits, 0.0, BLOCK_M, SPLITS), axis=1)
    return total, slopes, curve


@triton.jit
def lower_bound(work_ptr, block, rows, splits, sink, e, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """The largest score of all samples, the largest of their deltas, and the guess, both measured from it."""
    tops = read_slot(work_ptr, block, SAMPLE_TOP, rows, splits, -float("inf"), BLOCK_M, SPLITS)
    others = read_slot(work_ptr, block, GUESS_TOP, rows, splits, -float("inf"), BLOCK_M, SPLITS)
    others = tl.where(others == float("inf"), -float("inf"), others)  # whether NaN is there to be seen is not said here
    m = tl.maximum(tl.maximum(tl.max(tops, axis=1), tl.max(others, axis=1)), sink)
    deltas = read_slot(work_ptr, block, SAMPLE_DELTA, rows, splits, 0.0, BLOCK_M, SPLITS)
    low = tl.maximum(tl.max(moved(deltas, tops, m[:, None], e[:, None]), axis=1), 0.0)
    deltas = read_slot(work_ptr, block, GUESS_DELTA, rows, splits, 0.0, BLOCK_M, SPLITS)
    there = others > -float("inf")
    guess = tl.sum(tl.where(there, moved(deltas, others, m[:, None], e[:, None]), 0.0), axis=1)
    guess = tl.maximum(guess / tl.maximum(tl.sum(there.to(tl.float32), axis=1), 1.0), low)
    return m, low, guess


@triton.jit
def step_from(
    work_ptr, block, which, rows, splits, delta, low, sink, m, e, k,
    HAS_SINK: tl.constexpr, K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """delta after one step from where the splits took their sums, and a lower bound of the root."""
    total, slopes, curve = read_sums(work_ptr, block, which, rows, splits, BLOCK_M, SPLITS)
    if HAS_SINK:
        total, slopes, curve = with_sink(total, slopes, curve, sink, m, delta, e, k, K, HARDWARE_NONE, PTX)
    useful = (delta >= 0.0) & (total > 0.0) & (total < 1e30) & (slopes > 0.0)
    start = tl.where(useful, delta, low)
    total, slopes, curve = tl.where(useful, total, 1.0), tl.where(useful, slopes, 1.0), tl.where(useful, curve, 1.0)
    return next_iterate(start, low, tl.zeros_like(low) + 1.0, total, slopes, curve, e, k, useful)


@triton.jit
def first_step(
    work_ptr, block, rows, splits, sink, e, k,
    HAS_SINK: tl.constexpr, K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The largest score of all, and measured from it a lower bound of delta and delta after one step from the guess."""
    origin, low, guess = lower_bound(work_ptr, block, rows, splits, sink, e, BLOCK_M, SPLITS)
    tops = read_slot(work_ptr, block, SPLIT_TOP, rows, splits, -float("inf"), BLOCK_M, SPLITS)
    m = tl.maximum(tl.max(tops, axis=1), sink)
    low = tl.maximum(moved(low, origin, m, e), 0.0)
    stepped, lifted = step_from(
        work_ptr, block, SUMS, rows, splits, moved(guess, origin, m, e), low, sink, m, e, k, HAS_SINK, K, PTX, BLOCK_M, SPLITS
    )
    # Newton's step is a lower bound up to rounding
    return m, tl.maximum(low, lifted - _SLACK), stepped


@triton.jit
def whose(
    block, rows, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room,
    PLACES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Of some rows of a block: b, key head, the cache's row, rows' heads and queries, which are there, and the sequence's span.

    The span is where the sequence starts, and its tokens before the call and after it. PLACES: 0, sequence b has row b and
    starts at 0; 1, it has row `places[b]`; 2, `places[b]` is its row and its start.
    """
    b = (block // blocks // kv_heads).to(tl.int64)
    kv_head = (block // blocks % kv_heads).to(tl.int64)
    row = (block % blocks).to(tl.int32) * BLOCK_M + rows
    in_rows = row < group * length
    head = (kv_head * group).to(tl.int32) + tl.where(in_rows, row // length, 0)
    query = tl.where(in_rows, row % length, 0)
    begin = tl.maximum(tl.load(seqlens_ptr + b), 0)
    end = tl.minimum(begin + new, room)
    held = b
    start = end * 0
    if PLACES == 1:
        held = tl.load(places_ptr + b).to(tl.int64)
    elif PLACES == 2:
        held = tl.load(places_ptr + 2 * b).to(tl.int64)
        start = tl.load(places_ptr + 2 * b + 1)
    return b, kv_head, held, head, query, in_rows, (start, tl.minimum(begin, end), end)


@triton.jit
def stretch(split, splits, span, length, left, page_size, parts, HAS_NEW: tl.constexpr, WINDOW: tl.constexpr):
    """The range of tiles that are visible or written, divided among the splits: first tile and end."""
    low, begin, end = span
    start = low
    if WINDOW:
        low = tl.maximum(end - length - left, start)
        if HAS_NEW:
            low = tl.minimum(low, begin)
    low = low // page_size * parts
    high = tl.cdiv(end, page_size) * parts
    each = tl.cdiv(high - low, splits)
    first = tl.minimum(low + split * each, high)
    return first, tl.minimum(first + each, high)


@triton.jit
def tokens_of(tile, page_size, parts, span, BLOCK_N: tl.constexpr):
    """The positions of a tile's tokens, and which of them are there."""
    start, _begin, end = span
    inside = tile % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tile // parts * page_size + inside
    return place, (inside < page_size) & (place >= start) & (place < end)


@triton.jit
def rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, cache_b, cache_s, PAGED: tl.constexpr):
    """Offsets of a tile's tokens in a cache, in elements."""
    if PAGED:
        page = tl.load(table_ptr + b * table_b + tile // parts).to(tl.int64)
        return page * cache_b + (place - tile // parts * page_size).to(tl.int64) * cache_s
    else:
        return held * cache_b + place.to(tl.int64) * cache_s


@triton.jit
def load_tile(cache_ptr, offsets, column, wanted, kv_head, cache_h, cache_d, SIZE: tl.constexpr):
    """(BLOCK_N, columns) keys or values of a cache, 0 where nothing is wanted."""
    at = offsets[:, None] + kv_head * cache_h + column.to(tl.int64)[None, :] * cache_d
    return tl.load(cache_ptr + at, mask=wanted[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def load_queries(q_ptr, b, head, query, in_rows, q_b, q_l, q_h, q_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_M, BLOCK_D), 0 where there is no row."""
    column = tl.arange(0, BLOCK_D)[None, :]
    at = b * q_b + query.to(tl.int64)[:, None] * q_l + head.to(tl.int64)[:, None] * q_h + column.to(tl.int64) * q_d
    return tl.load(q_ptr + at, mask=in_rows[:, None] & (column < HEAD_DIM), other=0.0)


@triton.jit
def exponents(e_ptr, e, k, head, E_TENSOR: tl.constexpr):
    """e = 1 - alpha and 1/e of every row."""
    row_e, row_k = head_exponent(e_ptr, e, k, head, E_TENSOR, True)
    if not E_TENSOR:
        zero = tl.zeros(head.shape, tl.float32)
        row_e, row_k = zero + row_e, zero + row_k
    return row_e, row_k


@triton.jit
def product(a, b):
    """a @ b, exactly in the sense of float32 sums."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rules_of(b, head, span, length, alibi_ptr, alibi_b, left, right, scale, softcap, OPTIONS: tl.constexpr):
    """What acts on the scores of the rows: the last query stands at the last key. Decoding has no mask and no bias."""
    _opens, _begin, end = span
    slope = 0.0
    if OPTIONS.ALIBI:
        slope = tl.load(alibi_ptr + b * alibi_b + head)[:, None]
    return Rules(scale, softcap, slope, left, right, end - length, length, end, ABSENT, ABSENT)


@triton.jit
def scores_of(q, keys, place, there, in_rows, query, rules, OPTIONS: tl.constexpr):
    """(BLOCK_M, BLOCK_N) scores, -inf where nothing is to be seen."""
    rows, places = query[:, None], place[None, :]
    scores, _ = score(product(q, tl.trans(keys)), rows, places, rules, OPTIONS)
    return tl.where(visible(rows, places, in_rows[:, None] & there[None, :], rules, OPTIONS), scores, -float("inf"))


@triton.jit
def largest(scores):
    """Each row's largest score, +inf where one is NaN."""
    return tl.max(tl.where(scores != scores, float("inf"), scores), axis=1)


@triton.jit
def finite(m):
    """What scores are measured from: 0 for a row without any."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def moved(delta, m, to, e):
    """delta for scores that are measured from `to`, not from m: the same tau. -inf for a row without a score."""
    return tl.where(m == -float("inf"), -float("inf"), delta + e * (m - finite(to)))


@triton.jit
def scores_above(scores_ptr, block, tile, rows, top, most_tiles, m, delta, e, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Some rows of a tile's scores, and whether one is above the threshold; -inf if none is. `top` is each row's largest."""
    alive = tl.max((e * (top - finite(m)) > delta - 1.0).to(tl.int32), axis=0) > 0
    at = ((block * most_tiles + tile) * BLOCK_M + rows)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    # a tile that was not read has no scores
    return tl.load(scores_ptr + at, mask=alive & (top > -float("inf"))[:, None], other=-float("inf")), alive


@triton.jit
def weights_of(
    scores_ptr, block, tile, rows, top, most_tiles, m, delta, e, k,
    K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """b and r (`numerics.powers`) of some rows of a tile, 0 where nothing is alive; and whether something is."""
    scores, alive = scores_above(scores_ptr, block, tile, rows, top, most_tiles, m, delta, e, BLOCK_M, BLOCK_N)
    b, r = powers(scaled_scores(scores, m, e), delta, k, K, HARDWARE_NONE, PTX)
    return b, r, alive
