"""What decoding's kernels share: whose program it is, where a tile of keys lies, a tile of scores.

A program has BLOCK_M rows, the queries of one sequence that share a key head: row r is query r % length of head r // length of
the group. A page of the cache has `parts` tiles of BLOCK_N tokens, so that no tile reaches over a page's end.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import head_exponent
from diffmax.kernels.triton.common.scores import ABSENT, Rules, score, visible

# What the programs of one block of rows, `split` over the cache, leave for the next launch, each (BLOCK_M, SPLITS):
SAMPLE_TOP = tl.constexpr(0)  # of the sample that the lower bound is taken from: its largest score and its delta
SAMPLE_DELTA = tl.constexpr(1)
GUESS_TOP = tl.constexpr(2)  # of the sample that the first guess is taken from
GUESS_DELTA = tl.constexpr(3)
SPLIT_TOP = tl.constexpr(4)  # the largest score of all
COUNT = tl.constexpr(5)  # how many scores are listed, or would be
SUMS = tl.constexpr(6)  # three: S, S_1 and the sum of b^(k-2) at the guess, then at delta
SUPPORT = tl.constexpr(9)
SLOTS = tl.constexpr(10)
# Scores that one split lists for a row
LISTED = tl.constexpr(16)


@triton.jit
def slot(work_ptr, block, which, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """Pointers (BLOCK_M, 1) to the rows of one of the tables above."""
    rows = tl.arange(0, BLOCK_M)
    return work_ptr + ((block * SLOTS + which) * BLOCK_M + rows.to(tl.int64))[:, None] * SPLITS


@triton.jit
def read_slot(work_ptr, block, which, splits, other, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """One of the tables, (BLOCK_M, SPLITS)."""
    lanes = tl.arange(0, SPLITS)[None, :]
    return tl.load(slot(work_ptr, block, which, BLOCK_M, SPLITS) + lanes, mask=lanes < splits, other=other)


@triton.jit
def write_slot(work_ptr, block, which, split, values, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """A split's column of one of the tables."""
    tl.store(slot(work_ptr, block, which, BLOCK_M, SPLITS) + split, values[:, None])


@triton.jit
def whose(
    block, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES: tl.constexpr, BLOCK_M: tl.constexpr
):
    """b, key head, the cache's row, rows' heads and queries, which are there, and the sequence's span.

    The span is where the sequence starts, and its tokens before the call and after it. PLACES: 0, sequence b has row b and
    starts at 0; 1, it has row `places[b]`; 2, `places[b]` is its row and its start.
    """
    b = (block // blocks // kv_heads).to(tl.int64)
    kv_head = (block // blocks % kv_heads).to(tl.int64)
    row = (block % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
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
def load_tile(
    cache_ptr, new_ptr, offsets, place, there, b, kv_head, begin, cache_h, cache_d, new_b, new_s, new_h, new_d,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_NEW: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK) keys or values, 0 where nothing is; new tokens come from where they come from, not from the cache."""
    column = tl.arange(0, BLOCK)[None, :]
    wanted = there[:, None] & (column < SIZE)
    if HAS_NEW:
        old = wanted & (place < begin)[:, None]
    else:
        old = wanted
    tile = tl.load(cache_ptr + offsets[:, None] + kv_head * cache_h + column.to(tl.int64) * cache_d, mask=old, other=0.0)
    if HAS_NEW:
        fresh = wanted & (place >= begin)[:, None]
        at = b * new_b + (place - begin).to(tl.int64)[:, None] * new_s + kv_head * new_h + column.to(tl.int64) * new_d
        tile = tl.where(fresh, tl.load(new_ptr + at, mask=fresh, other=0.0), tile)
    return tile


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
def is_last(counter_ptr, splits):
    """Whether all other programs that share the counter have stored what they have."""
    tl.debug_barrier()  # every thread's stores come before this program's count
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return done == splits - 1
