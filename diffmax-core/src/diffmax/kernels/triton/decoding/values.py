"""Third launch of decoding: the values of the keys that have a weight, and the sums that say whether tau was right.

The last program of a block of rows adds up. The linear step that the sums ask for is taken then, from values that were summed
with the weights' slopes too. A row that is still unsolved is solved by that program alone, on the scores that are stored.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import (
    HALLEY_STEPS,
    HARDWARE_NONE,
    finishing,
    next_iterate,
    overshoot,
    powers,
    scaled_scores,
    unsolved,
    with_sink,
)
from diffmax.kernels.triton.decoding.tiles import (
    SUMS,
    SUPPORT,
    exponents,
    finite,
    is_last,
    load_tile,
    read_slot,
    rows_of,
    stretch,
    tokens_of,
    whose,
    write_slot,
)


@triton.jit
def times_values(weights, values):
    """weights @ values: the weights as two numbers of the values' dtype, so that no digit of theirs is lost."""
    if values.dtype == tl.float32:
        return tl.dot(weights, values, input_precision="ieee")
    else:
        coarse = weights.to(values.dtype)
        return tl.dot(coarse, values) + tl.dot((weights - coarse.to(tl.float32)).to(values.dtype), values)


@triton.jit
def weights_of(
    scores_ptr, tops_ptr, block, tile, most_tiles, m, delta, e, k,
    K: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """b and r (`numerics.powers`) of a tile, 0 where nothing is alive; and whether something is."""
    rows, lanes = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    top = tl.load(tops_ptr + (block * most_tiles + tile) * BLOCK_M + rows)
    alive = tl.max((e * (top - finite(m)) > delta - 1.0).to(tl.int32), axis=0) > 0
    at = ((block * most_tiles + tile) * BLOCK_M + rows)[:, None] * BLOCK_N + lanes[None, :]
    # a tile that was not read has no scores
    scores = tl.load(scores_ptr + at, mask=alive & (top > -float("inf"))[:, None], other=-float("inf"))
    b, r = powers(scaled_scores(scores, m, e), delta, k, K, HARDWARE_NONE, PTX)
    return b, r, alive


@triton.jit(do_not_specialize=[
    "vn_b", "vn_s", "vn_h", "table_b", "new", "room", "page_size", "parts", "kv_heads", "group", "length",
    "blocks", "splits", "most_tiles", "left", "steps", "e", "k",
])  # fmt: skip
def kvcache_values_kernel(
    v_ptr, vn_ptr, seqlens_ptr, places_ptr, table_ptr, e_ptr, sink_ptr,
    tops_ptr, scores_ptr, work_ptr, state_ptr, partial_ptr, filled_ptr, counters_ptr,
    out_ptr, m_ptr, delta_ptr, support_ptr,
    v_b, v_s, v_h, v_d, vn_b, vn_s, vn_h, vn_d, table_b,
    new, room, page_size, parts, kv_heads, group, length, blocks, splits, most_tiles, left, steps,
    e, k,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PAGED: tl.constexpr, HAS_NEW: tl.constexpr, PLACES: tl.constexpr,
    HAS_SINK: tl.constexpr, WINDOW: tl.constexpr, E_TENSOR: tl.constexpr, STATS: tl.constexpr, K: tl.constexpr,
    CUT: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out (B, L, H, D_v), m, delta and support (B, H, L).  Grid: as the first launch."""
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, kv_head, held, head, query, in_rows, span = whose(
        block, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES, BLOCK_M
    )
    _opens, begin, end = span
    first, last = stretch(split, splits, span, length, left, page_size, parts, HAS_NEW, WINDOW)
    row_e, row_k = exponents(e_ptr, e, k, head, E_TENSOR)
    zero, rows, column = tl.zeros((BLOCK_M,), tl.float32), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    m = tl.load(state_ptr + block * 2 * BLOCK_M + rows)
    delta = tl.load(state_ptr + (block * 2 + 1) * BLOCK_M + rows)
    out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    tilt = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)  # the same with the weights' slopes
    total, slopes, curve, support = zero, zero, zero, zero
    filled = 0
    for tile in range(first, last):
        base, r, alive = weights_of(
            scores_ptr, tops_ptr, block, tile, most_tiles, m, delta, row_e, row_k, K, PTX, BLOCK_M, BLOCK_N
        )
        if alive:
            filled = 1
            p, s = r * base * base, r * base
            total += tl.sum(p, axis=1)
            slopes += tl.sum(s, axis=1)
            curve += tl.sum(r, axis=1)
            support += tl.sum((base > 0.0).to(tl.float32), axis=1)
            place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
            wanted = there & (tl.max((base > 0.0).to(tl.int32), axis=0) > 0)
            at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, v_b, v_s, PAGED)
            values = load_tile(
                v_ptr,
                vn_ptr,
                at,
                place,
                wanted,
                b,
                kv_head,
                begin,
                v_h,
                v_d,
                vn_b,
                vn_s,
                vn_h,
                vn_d,
                VALUE_DIM,
                BLOCK_V,
                HAS_NEW,
            )
            out += times_values(p, values)
            tilt += times_values(s, values)
    write_slot(work_ptr, block, SUMS, split, total, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, SUMS + 1, split, slopes, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, SUMS + 2, split, curve, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, SUPPORT, split, support, BLOCK_M, SPLITS)
    tl.store(filled_ptr + block * splits + split, filled)
    if filled > 0:
        at = (((block * splits + split) * 2) * BLOCK_M + rows)[:, None] * BLOCK_V + column[None, :]
        tl.store(partial_ptr + at, out)
        tl.store(partial_ptr + at + BLOCK_M * BLOCK_V, tilt)

    if is_last(counters_ptr + block * 2 + 1, splits):
        sink = zero - float("inf")
        if HAS_SINK:
            sink = tl.load(sink_ptr + head)
        size = zero + end.to(tl.float32)
        total = tl.sum(read_slot(work_ptr, block, SUMS, splits, 0.0, BLOCK_M, SPLITS), axis=1)
        slopes = tl.sum(read_slot(work_ptr, block, SUMS + 1, splits, 0.0, BLOCK_M, SPLITS), axis=1)
        curve = tl.sum(read_slot(work_ptr, block, SUMS + 2, splits, 0.0, BLOCK_M, SPLITS), axis=1)
        support = tl.sum(read_slot(work_ptr, block, SUPPORT, splits, 0.0, BLOCK_M, SPLITS), axis=1)
        if HAS_SINK:
            total, slopes, curve = with_sink(total, slopes, curve, sink, m, delta, row_e, row_k, K, HARDWARE_NONE, PTX)
        # beyond the root so far that nothing is left of the sum, which `unsolved` takes for a row that sees nothing
        missed = (total == 0.0) & (m > -float("inf"))
        far = in_rows & (missed | unsolved(total, slopes, curve, delta, row_e, row_k, size, CUT))
        if tl.max(far.to(tl.int32), axis=0) == 0:
            out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            tilt = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            for part in range(splits):
                if tl.load(filled_ptr + block * splits + part) > 0:
                    at = (((block * splits + part) * 2) * BLOCK_M + rows)[:, None] * BLOCK_V + column[None, :]
                    out += tl.load(partial_ptr + at)
                    tilt += tl.load(partial_ptr + at + BLOCK_M * BLOCK_V)
        else:
            begin_tile = stretch(0, splits, span, length, left, page_size, parts, HAS_NEW, WINDOW)[0]
            end_tile = tl.cdiv(end, page_size) * parts
            delta = tl.where(missed, 0.0, delta)
            floor, going, step = zero, 1, 0
            while (going > 0) & (step < steps):
                total, slopes, curve = zero, zero, zero
                for tile in range(begin_tile, end_tile):
                    base, r, alive = weights_of(
                        scores_ptr, tops_ptr, block, tile, most_tiles, m, delta, row_e, row_k, K, PTX, BLOCK_M, BLOCK_N
                    )
                    total += tl.sum(r * base * base, axis=1)
                    slopes += tl.sum(r * base, axis=1)
                    curve += tl.sum(r, axis=1)
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
            out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            tilt = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            total, slopes, curve, support = zero, zero, zero, zero
            for tile in range(begin_tile, end_tile):
                base, r, alive = weights_of(
                    scores_ptr, tops_ptr, block, tile, most_tiles, m, delta, row_e, row_k, K, PTX, BLOCK_M, BLOCK_N
                )
                if alive:
                    total += tl.sum(r * base * base, axis=1)
                    slopes += tl.sum(r * base, axis=1)
                    curve += tl.sum(r, axis=1)
                    support += tl.sum((base > 0.0).to(tl.float32), axis=1)
                    place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
                    wanted = there & (tl.max((base > 0.0).to(tl.int32), axis=0) > 0)
                    at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, v_b, v_s, PAGED)
                    values = load_tile(
                        v_ptr, vn_ptr, at, place, wanted, b, kv_head, begin, v_h, v_d, vn_b, vn_s, vn_h, vn_d,
                        VALUE_DIM, BLOCK_V, HAS_NEW,
                    )  # fmt: skip
                    out += times_values(r * base * base, values)
                    tilt += times_values(r * base, values)
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
        at = (b * (kv_heads * group) + head) * length + query
        tl.store(m_ptr + at, m, mask=in_rows)
        tl.store(delta_ptr + at, delta, mask=in_rows)
        if STATS:
            tl.store(support_ptr + at, support.to(tl.int32), mask=in_rows)
