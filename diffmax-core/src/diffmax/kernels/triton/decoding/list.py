"""Third launch of decoding: which stored scores are candidates, now that every split knows the sums at the guess of all.

One Newton step from the guess is a lower bound of tau, a tight one: few scores above it have no weight. A few are listed for
each split. For rows that have more, sums are taken again, after one step of the solver.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import HARDWARE_NONE, powers, scaled_scores
from diffmax.kernels.triton.decoding.tiles import (
    COUNT,
    LISTED,
    STEPPED_SUMS,
    exponents,
    first_step,
    scores_above,
    stretch,
    whose,
    write_slot,
    write_sums,
)


@triton.jit(do_not_specialize=[
    "new", "room", "page_size", "parts", "kv_heads", "group", "length", "blocks", "splits", "most_tiles", "left", "e", "k",
])  # fmt: skip
def kvcache_list_kernel(
    seqlens_ptr, places_ptr, e_ptr, sink_ptr, tops_ptr, scores_ptr, work_ptr, lists_ptr,
    new, room, page_size, parts, kv_heads, group, length, blocks, splits, most_tiles, left, e, k,
    HAS_NEW: tl.constexpr, PLACES: tl.constexpr, HAS_SINK: tl.constexpr, WINDOW: tl.constexpr,
    E_TENSOR: tl.constexpr, K: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """lists (block, LISTED, BLOCK_M, SPLITS), their lengths, and sums.  Grid: as the first launch."""
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    _b, _kv_head, _held, head, _query, in_rows, span = whose(
        block, rows, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES, BLOCK_M
    )
    first, last = stretch(split, splits, span, length, left, page_size, parts, HAS_NEW, WINDOW)
    row_e, row_k = exponents(e_ptr, e, k, head, E_TENSOR)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    sink = zero - float("inf")
    if HAS_SINK:
        sink = tl.load(sink_ptr + head)
    m, low, stepped = first_step(work_ptr, block, rows, splits, sink, row_e, row_k, HAS_SINK, K, PTX, BLOCK_M, SPLITS)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    slopes, curve = total, total
    count = tl.zeros((BLOCK_M,), tl.int32)
    tops_at = tops_ptr + block * most_tiles * BLOCK_M + rows
    top = tl.load(tops_at + first * BLOCK_M, mask=in_rows & (first < last), other=-float("inf"))
    for tile in range(first, last):
        # the next tile's is on its way while this one is worked on
        following = tl.load(tops_at + (tile + 1) * BLOCK_M, mask=in_rows & (tile + 1 < last), other=-float("inf"))
        scores, alive = scores_above(scores_ptr, block, tile, rows, top, most_tiles, m, low, row_e, BLOCK_M, BLOCK_N)
        if alive:
            z = scaled_scores(scores, m, row_e)
            listed = z > (low - 1.0)[:, None]
            found = tl.sum(listed.to(tl.int32), axis=1)
            if tl.max(tl.where(count < LISTED, found, 0), axis=0) > 0:
                index = count[:, None] + tl.cumsum(listed.to(tl.int32), axis=1) - 1
                at = ((block * LISTED + index) * BLOCK_M + rows[:, None]) * SPLITS + split
                tl.store(lists_ptr + at, scores, mask=listed & (index < LISTED))
            count += found
            base, r = powers(z, stepped, row_k, K, HARDWARE_NONE, PTX)
            slope = r * base
            total += slope * base
            slopes += slope
            curve += r
        top = following
    write_slot(work_ptr, block, COUNT, split, count.to(tl.float32), BLOCK_M, SPLITS)
    write_sums(work_ptr, block, STEPPED_SUMS, split, total, slopes, curve, BLOCK_M, SPLITS)
