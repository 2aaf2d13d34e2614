"""Second launch of decoding: the scores of the pages that can matter, stored, and their sums at the guess."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import HARDWARE_NONE, powers, scaled_scores
from diffmax.kernels.triton.decoding.tiles import (
    SPLIT_TOP,
    SUMS,
    exponents,
    finite,
    largest,
    load_queries,
    load_tile,
    lower_bound,
    moved,
    rows_of,
    rules_of,
    scores_of,
    stretch,
    tokens_of,
    whose,
    write_slot,
    write_sums,
)

_EPS = tl.constexpr(2.0**-23)


@triton.jit(do_not_specialize=[
    "q_b", "q_l", "q_h", "table_b", "alibi_b", "new", "room", "page_size", "parts",
    "kv_heads", "group", "length", "blocks", "splits", "most_tiles", "left", "right", "scale", "softcap", "e", "k",
])  # fmt: skip
def kvcache_read_kernel(
    q_ptr, k_ptr, seqlens_ptr, places_ptr, table_ptr, e_ptr, alibi_ptr, sink_ptr,
    tops_ptr, scores_ptr, work_ptr, pages_ptr,
    q_b, q_l, q_h, q_d, k_b, k_s, k_h, k_d, table_b, alibi_b,
    new, room, page_size, parts, kv_heads, group, length, blocks, splits, most_tiles, left, right,
    scale, softcap, e, k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGED: tl.constexpr, HAS_NEW: tl.constexpr, PLACES: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_SINK: tl.constexpr, OPTIONS: tl.constexpr,
    E_TENSOR: tl.constexpr, K: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """scores (block, tile, BLOCK_M, BLOCK_N); the largest of each tile, in place of its bound.  Grid: as the first launch."""
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, lanes = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    b, kv_head, held, head, query, in_rows, span = whose(
        block, rows, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES, BLOCK_M
    )
    first, last = stretch(split, splits, span, length, left, page_size, parts, HAS_NEW, OPTIONS.WINDOW)
    row_e, row_k = exponents(e_ptr, e, k, head, E_TENSOR)
    rules = rules_of(b, head, span, length, alibi_ptr, alibi_b, left, right, scale, softcap, OPTIONS)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    sink = zero - float("inf")
    if HAS_SINK:
        sink = tl.load(sink_ptr + head)
    q = load_queries(q_ptr, b, head, query, in_rows, q_b, q_l, q_h, q_d, HEAD_DIM, BLOCK_D)
    origin, low, guess = lower_bound(work_ptr, block, rows, splits, sink, row_e, BLOCK_M, SPLITS)
    m, delta = origin, low  # as they are known so far
    top_of_split = zero - float("inf")
    # each lane adds up its own column of the tiles
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    slopes, curve = total, total
    read, last_page = tl.full((), 0, tl.int32), -1
    for tile in range(first, last):
        tops_at = tops_ptr + (block * most_tiles + tile) * BLOCK_M + rows
        alive = 1
        if HAS_BOUNDS:
            bound = tl.load(tops_at)
            slack = 8 * _EPS * (1.0 + row_e * (tl.abs(bound) + tl.abs(finite(m))))
            below = (m > -float("inf")) & (row_e * (bound - finite(m)) <= delta - 1.0 - slack)
            alive = tl.max((in_rows & (below == 0) & (bound > -float("inf"))).to(tl.int32), axis=0)
        if alive > 0:
            read += (tile // parts != last_page).to(tl.int32)
            last_page = tile // parts
            place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
            at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, k_b, k_s, PAGED)
            keys = load_tile(k_ptr, at, tl.arange(0, BLOCK_D), there, kv_head, k_h, k_d, HEAD_DIM)
            scores = scores_of(q, keys, place, there, in_rows, query, rules, OPTIONS)
            at = ((block * most_tiles + tile) * BLOCK_M + rows)[:, None] * BLOCK_N + lanes[None, :]
            tl.store(scores_ptr + at, scores)
            base, r = powers(scaled_scores(scores, origin, row_e), guess, row_k, K, HARDWARE_NONE, PTX)
            slope = r * base
            total += slope * base
            slopes += slope
            curve += r
            top = largest(scores)
            tl.store(tops_at, top)
            top_of_split = tl.maximum(top_of_split, top)
            if HAS_BOUNDS:
                risen = tl.maximum(m, top)
                delta = tl.maximum(moved(delta, m, risen, row_e), 0.0)
                m = risen
        else:
            tl.store(tops_at, zero - float("inf"))
    write_slot(work_ptr, block, SPLIT_TOP, split, top_of_split, BLOCK_M, SPLITS)
    write_sums(work_ptr, block, SUMS, split, total, slopes, curve, BLOCK_M, SPLITS)
    tl.store(pages_ptr + block * splits + split, read.to(tl.float32))
