"""Last launch of decoding: the splits' parts are added, and the sums say whether tau was right.

The linear step that the sums ask for is taken here, from values that were summed with the weights' slopes too. A row that is
still unsolved is solved by its own programs alone, on the scores that are stored: slow, and exact.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import (
    HALLEY_STEPS,
    HARDWARE_NONE,
    finishing,
    next_iterate,
    overshoot,
    sums,
    unsolved,
    with_sink,
)
from diffmax.kernels.triton.decoding.tiles import (
    SUMS,
    SUPPORT,
    exponents,
    load_tile,
    read_slot,
    read_sums,
    rows_of,
    stretch,
    tokens_of,
    weights_of,
    whose,
)


@triton.jit(do_not_specialize=[
    "table_b", "new", "room", "page_size", "parts", "kv_heads", "group", "length",
    "blocks", "splits", "most_tiles", "left", "steps", "e", "k",
])  # fmt: skip
def kvcache_finish_kernel(
    v_ptr, seqlens_ptr, places_ptr, table_ptr, e_ptr, sink_ptr,
    tops_ptr, scores_ptr, work_ptr, state_ptr, partial_ptr, filled_ptr, out_ptr, m_ptr, delta_ptr, support_ptr,
    v_b, v_s, v_h, v_d, table_b,
    new, room, page_size, parts, kv_heads, group, length, blocks, splits, most_tiles, left, steps,
    e, k,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PAGED: tl.constexpr, HAS_NEW: tl.constexpr, PLACES: tl.constexpr,
    HAS_SINK: tl.constexpr, WINDOW: tl.constexpr, E_TENSOR: tl.constexpr, STATS: tl.constexpr, K: tl.constexpr,
    CUT: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """ROWS rows and SLICE columns of out (B, L, H, D_v); m, delta and support (B, H, L).  Grid: (blocks, parts of a block)."""
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    SLICES: tl.constexpr = BLOCK_V // SLICE
    rows, column = part // SLICES * ROWS + tl.arange(0, ROWS), part % SLICES * SLICE + tl.arange(0, SLICE)
    b, kv_head, held, head, query, in_rows, span = whose(
        block, rows, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES, BLOCK_M
    )
    _opens, _begin, end = span
    row_e, row_k = exponents(e_ptr, e, k, head, E_TENSOR)
    zero = tl.zeros((ROWS,), tl.float32)
    sink = zero - float("inf")
    if HAS_SINK:
        sink = tl.load(sink_ptr + head)
    size = zero + end.to(tl.float32)
    m = tl.load(state_ptr + block * 2 * BLOCK_M + rows, mask=in_rows, other=-float("inf"))
    delta = tl.load(state_ptr + (block * 2 + 1) * BLOCK_M + rows, mask=in_rows, other=0.0)
    total, slopes, curve = read_sums(work_ptr, block, SUMS, rows, splits, BLOCK_M, SPLITS)
    support = tl.sum(read_slot(work_ptr, block, SUPPORT, rows, splits, 0.0, BLOCK_M, SPLITS), axis=1)
    if HAS_SINK:
        total, slopes, curve = with_sink(total, slopes, curve, sink, m, delta, row_e, row_k, K, HARDWARE_NONE, PTX)
    # beyond the root so far that nothing is left of the sum, which `unsolved` takes for a row that sees nothing
    missed = (total == 0.0) & (m > -float("inf"))
    far = in_rows & (missed | unsolved(total, slopes, curve, delta, row_e, row_k, size, CUT))
    if tl.max(far.to(tl.int32), axis=0) == 0:
        lanes = tl.arange(0, SPLITS)
        filled = tl.load(filled_ptr + block * splits + lanes, mask=lanes < splits, other=0.0) > 0.0
        at = (block * splits + lanes)[None, :] * 2 * BLOCK_M + rows[:, None]
        at = at[:, :, None] * BLOCK_V + column[None, None, :]
        out = tl.sum(tl.load(partial_ptr + at, mask=filled[None, :, None], other=0.0), axis=1)
        tilt = tl.sum(tl.load(partial_ptr + at + BLOCK_M * BLOCK_V, mask=filled[None, :, None], other=0.0), axis=1)
    else:
        first = stretch(0, splits, span, length, left, page_size, parts, HAS_NEW, WINDOW)[0]
        last = tl.cdiv(end, page_size) * parts
        tops_at = tops_ptr + block * most_tiles * BLOCK_M + rows
        delta = tl.where(missed, 0.0, delta)
        floor, going, step = zero, 1, 0
        while (going > 0) & (step < steps):
            total, slopes, curve = zero, zero, zero
            for tile in range(first, last):
                top = tl.load(tops_at + tile * BLOCK_M)
                base, r, _ = weights_of(
                    scores_ptr, block, tile, rows, top, most_tiles, m, delta, row_e, row_k, K, PTX, BLOCK_M, BLOCK_N
                )
                own, own_slopes, own_curve = sums(base, r)
                total, slopes, curve = total + own, slopes + own_slopes, curve + own_curve
            if HAS_SINK:
                total, slopes, curve = with_sink(total, slopes, curve, sink, m, delta, row_e, row_k, K, HARDWARE_NONE, PTX)
            far = in_rows & unsolved(total, slopes, curve, delta, row_e, row_k, size, CUT)
            going = tl.max(far.to(tl.int32), axis=0)
            safe, safe_slopes = tl.where(far, total, 1.0), tl.where(far, slopes, 1.0)
            after, lifted = next_iterate(
                delta, floor, zero + 1.0, safe, safe_slopes, curve, row_e, row_k, far & (step < HALLEY_STEPS)
            )
            delta, floor = tl.where(far, after, delta), tl.where(far, lifted, floor)
            step += 1
        out, tilt = tl.zeros((ROWS, SLICE), tl.float32), tl.zeros((ROWS, SLICE), tl.float32)
        total, slopes, curve, support = zero, zero, zero, zero
        for tile in range(first, last):
            top = tl.load(tops_at + tile * BLOCK_M)
            base, r, alive = weights_of(
                scores_ptr, block, tile, rows, top, most_tiles, m, delta, row_e, row_k, K, PTX, BLOCK_M, BLOCK_N
            )
            if alive:
                own, own_slopes, own_curve = sums(base, r)
                total, slopes, curve = total + own, slopes + own_slopes, curve + own_curve
                support += tl.sum((base > 0.0).to(tl.float32), axis=1)
                place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
                wanted = there & (tl.max((base > 0.0).to(tl.int32), axis=0) > 0)
                at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, v_b, v_s, PAGED)
                values = load_tile(v_ptr, at, column, wanted, kv_head, v_h, v_d, VALUE_DIM).to(tl.float32)
                out += tl.sum((r * base * base)[:, :, None] * values[None, :, :], axis=1)
                tilt += tl.sum((r * base)[:, :, None] * values[None, :, :], axis=1)
        if HAS_SINK:
            total, slopes, curve = with_sink(total, slopes, curve, sink, m, delta, row_e, row_k, K, HARDWARE_NONE, PTX)

    step, scale, delta = finishing(delta, total, slopes, curve, row_e, row_k, size, CUT, True)
    # p - k b^(k-1) dt, and k dt is what `overshoot` says
    shift = tl.where(step == 0.0, 0.0, overshoot(total, slopes))
    out = (out - shift[:, None] * tilt) * scale[:, None]
    bad = (m == float("inf")) | (m != m) | (row_e != row_e)
    nothing = m == -float("inf")
    out = tl.where(nothing[:, None], 0.0, out)
    out = tl.where(bad[:, None], float("nan"), out)
    delta = tl.where(bad, float("nan"), tl.where(nothing, 0.0, delta))
    at = ((b * length + query) * (kv_heads * group) + head)[:, None] * VALUE_DIM + column[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & (column < VALUE_DIM)[None, :])
    if part % SLICES == 0:
        row_at = (b * (kv_heads * group) + head) * length + query
        tl.store(m_ptr + row_at, m, mask=in_rows)
        tl.store(delta_ptr + row_at, delta, mask=in_rows)
        if STATS:
            tl.store(support_ptr + row_at, support.to(tl.int32), mask=in_rows)
