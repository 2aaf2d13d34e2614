"""First kernel of attention's forward: the largest score and the threshold of each query, and the live tiles.

A program loops over blocks of 64 queries, so the size of the scratch buffers depends on the running programs, not on the number
of queries. For each block:

1. A sample of keys, spread evenly over those in range, gives an estimate of the threshold; a larger one improves it.
2. One pass over all tiles evaluates S there, and stores the largest scores of every tile.
3. Steps lead to the threshold (Eq. 2); each evaluation visits only tiles that hold a score above the iterate.

Nothing waits for the host. The reasons for this order, and its cost: docs/performance.md.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.evaluation import larger_or_nan, level_at, sums_of
from diffmax.kernels.triton.attention.scores import block_of, queries_of, rules_of, sampled_scores, tile_scores
from diffmax.kernels.triton.attention.steps import (
    largest_delta,
    list_live,
    promises,
    root_of_sample,
    rows_alive,
    spread_keys,
    stalls,
    step_of_sample,
    store_live,
    tiles_of_sample,
    tops_of,
)
from diffmax.kernels.triton.attention.tiles import TILE, row_ptr
from diffmax.kernels.triton.common.layout import head_exponent, vector_multiple
from diffmax.kernels.triton.common.numerics import HALLEY_STEPS, next_iterate, with_sink

_SAMPLE_STEPS = tl.constexpr(2)

# More than a tile has rows: what the second tile of two counts as
SECOND = tl.constexpr(128)


@triton.jit(do_not_specialize=[
    "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "mask_b", "mask_h", "mask_row", "mask_key",
    "bias_b", "bias_h", "bias_row", "bias_key", "alibi_b", "heads", "group", "length", "n_keys", "n_sequences", "n_blocks",
    "items", "n_words", "most_tiles", "left", "right", "newton_steps", "scale", "softcap", "e", "k",
])  # fmt: skip
def attention_solve_kernel(
    q_ptr, k_ptr, m_ptr, delta_ptr, slope_ptr, live_ptr, e_ptr, mask_ptr, bias_ptr, alibi_ptr, sink_ptr, cu_q_ptr, cu_k_ptr,
    tops_ptr, list_ptr,  # scratch buffers of a program: (most_tiles, 64) and (most_tiles,)
    q_b, q_h, q_row, k_b, k_h, k_row, mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b,
    heads, group, length, n_keys, n_sequences, n_blocks, items, n_words, most_tiles, left, right, newton_steps,
    scale, softcap, e, k,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
    E_TENSOR: tl.constexpr, K: tl.constexpr, SINK: tl.constexpr, LINEAR: tl.constexpr, CUT: tl.constexpr,
    SUM: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr, FOLDED: tl.constexpr, POWER: tl.constexpr,
    EXACT: tl.constexpr, AT_ONCE: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """m, delta, S_1 and the bits of `live`.  Grid: as many programs as run concurrently.

    AT_ONCE: how many tiles a turn of the pass over all takes, 1 or 2.
    """
    VECTOR: tl.constexpr = 128 // q_ptr.dtype.element_ty.primitive_bitwidth
    q_row, k_row = vector_multiple(q_row, ALIGNED, VECTOR), vector_multiple(k_row, ALIGNED, VECTOR)
    lanes = tl.arange(0, TILE)
    zero = tl.zeros((TILE,), tl.float32)
    unit = scale if FOLDED else 1.0
    LARGER_SAMPLE: tl.constexpr = K == 0 or K >= 5
    tops_ptr += tl.program_id(0).to(tl.int64) * most_tiles * TILE
    list_ptr += tl.program_id(0).to(tl.int64) * most_tiles

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = block_of(
            item, heads, group, n_blocks, length, n_keys, n_sequences, left, right, cu_q_ptr, cu_k_ptr, OPTIONS, TILE
        )
        b, h, first, low_key, high_key = block.batch, block.head, block.first, block.low_key, block.high_key
        in_rows = first + lanes < block.n_rows
        first_tile = low_key // TILE
        tiles = tl.where(high_key > low_key, tl.cdiv(high_key, TILE) - first_tile, 0)
        k_at = row_ptr(k_ptr, b, block.kv_head, block.k_start, k_b, k_h, k_row, ALIGNED)
        q_at = row_ptr(q_ptr, b, h, block.q_start, q_b, q_h, q_row, ALIGNED)
        q = queries_of(q_at, q_row, block, HEAD_DIM, BLOCK_D, CHUNK, TILE)
        head_e, head_k = head_exponent(e_ptr, e, k, h, E_TENSOR, True)
        row_e, row_k = zero + head_e, zero + head_k
        rules = rules_of(
            b, h, block.shift, block.n_rows, block.n_keys, mask_ptr, bias_ptr, alibi_ptr,
            mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b, left, right, scale, softcap,
            OPTIONS,
        )  # fmt: skip
        sink = zero - float("inf")
        size = zero + (high_key - low_key).to(tl.float32)
        if SINK:
            sink = zero + tl.load(sink_ptr + h)
            size += 1.0
        size = tl.maximum(size, 1.0)
        high = largest_delta(size, row_e)

        # 1. the estimate, relative to the largest score of the sample
        span = high_key - low_key
        spread = spread_keys(low_key, span, 0, 1)
        sampled = sampled_scores(q, q_row, k_at, k_row, spread, block, rules, OPTIONS, FOLDED, HEAD_DIM, BLOCK_D, CHUNK)
        reference = tl.maximum(tl.max(sampled, axis=1) * unit, sink)
        reference = tl.where(tl.abs(reference) < float("inf"), reference, 0.0)
        share = tl.maximum(size / TILE, 1.0)
        delta = root_of_sample(sampled, reference, high, head_e, head_k, unit, share, K, POWER, PTX, PARTIAL, _SAMPLE_STEPS)

        if LARGER_SAMPLE:
            pool = tiles_of_sample(tiles, head_e)
            rough = level_at(reference, delta, unit, head_e, POWER, True)
            total = tl.zeros((TILE, PARTIAL), tl.float32)
            slope, curve = total, total
            for i in range(0, pool):
                spread = spread_keys(low_key, span, i, pool)
                w = sampled_scores(q, q_row, k_at, k_row, spread, block, rules, OPTIONS, FOLDED, HEAD_DIM, BLOCK_D, CHUNK)
                part, part_slope, part_curve = sums_of(w * unit - reference[:, None], rough, head_k, K, POWER, PTX, PARTIAL)
                total, slope, curve = total + part, slope + part_slope, curve + part_curve
            delta = step_of_sample(total, slope, curve, delta, high, row_e, row_k, share / tl.maximum(pool, 1))

        # 2. S at the estimate, and the largest scores of every tile
        estimate = level_at(reference, delta, unit, head_e, POWER, EXACT)
        m = zero - float("inf")
        total = tl.zeros((TILE, PARTIAL), tl.float32)
        slope, curve = total, total
        tl.debug_barrier()  # the previous block may still be read
        for i in range(0, tiles, AT_ONCE):
            x = tile_scores(
                q, q_row, k_at, k_row, (first_tile + i) * TILE, block, rules, estimate, OPTIONS, FOLDED, EXACT, False,
                HEAD_DIM, BLOCK_D, CHUNK, TILE, TILE,
            )  # fmt: skip
            top = tops_of(x, in_rows)
            alive = rows_alive(top, estimate, EXACT)
            if AT_ONCE == 2:  # the second one, which may lie behind the last: one store and one sum for both
                x_2 = tile_scores(
                    q, q_row, k_at, k_row, (first_tile + i + 1) * TILE, block, rules, estimate, OPTIONS, FOLDED, EXACT, False,
                    HEAD_DIM, BLOCK_D, CHUNK, TILE, TILE,
                )  # fmt: skip
                top_2 = tops_of(x_2, in_rows)
                alive += rows_alive(top_2, estimate, EXACT) * SECOND
                two = lanes[:, None] + tl.arange(0, 2)[None, :] * TILE
                tl.store(tops_ptr + i * TILE + two, tl.join(top, top_2))
                top = larger_or_nan(top, top_2)
            else:
                tl.store(tops_ptr + i * TILE + lanes, top)
            m = larger_or_nan(m, top)
            visit = tl.sum(alive)
            if not EXACT:
                visit = tl.where(estimate.far, 0, visit)  # left to further evaluations
            if (visit & (SECOND - 1)) > 0:
                if EXACT:
                    x = x * unit - reference[:, None]
                more, more_slope, more_curve = sums_of(x, estimate, head_k, K, POWER, PTX, PARTIAL)
                total, slope, curve = total + more, slope + more_slope, curve + more_curve
            if AT_ONCE == 2:
                if visit >= SECOND:
                    if EXACT:
                        x_2 = x_2 * unit - reference[:, None]
                    more, more_slope, more_curve = sums_of(x_2, estimate, head_k, K, POWER, PTX, PARTIAL)
                    total, slope, curve = total + more, slope + more_slope, curve + more_curve
        tl.debug_barrier()
        total, slope, curve = tl.sum(total, axis=1), tl.sum(slope, axis=1), tl.sum(curve, axis=1)
        m = larger_or_nan(m * unit, sink)
        if SINK:
            total, slope, curve = with_sink(total, slope, curve, sink, reference, delta, row_e, row_k, K, HARDWARE, PTX)

        # 3. from there to the root; if the sums are not usable, from the lowest possible delta
        bad = in_rows & ((total != total) | (m != m) | (m == float("inf")) | (row_e != row_e))
        active = in_rows & (bad == 0) & (m > -float("inf"))
        delta -= row_e * (tl.where(active, m, reference) - reference)
        known = active & (total > 0.0) & (total < 1e18) & (slope < 1e18) & (curve < 1e18)  # their products are finite
        ready = promises(total, slope, curve, tl.maximum(delta, 0.0), row_e, row_k, True, CUT, SUM, LINEAR)
        moved, low = next_iterate(delta, zero, high, total, slope, curve, row_e, row_k, True)
        delta, low = tl.where(known, moved, 0.0), tl.where(known, low, 0.0)
        going = active & ((known & ready) == 0)
        steps = 1
        while (tl.max(going.to(tl.int32), axis=0) > 0) & (steps < newton_steps + HALLEY_STEPS):
            level = level_at(m, delta, unit, head_e, POWER, EXACT)
            count = list_live(tops_ptr, list_ptr, tiles, level, EXACT)
            tl.debug_barrier()
            before = tl.where(known, total, 0.0)
            all_total = tl.zeros((TILE, PARTIAL), tl.float32)
            all_slope, all_curve = all_total, all_total
            for i in range(0, count):
                tile = first_tile + tl.load(list_ptr + i)
                y = tile_scores(
                    q, q_row, k_at, k_row, tile * TILE, block, rules, level, OPTIONS, FOLDED, EXACT,
                    True, HEAD_DIM, BLOCK_D, CHUNK, TILE, TILE,
                )  # fmt: skip
                own, own_slope, own_curve = sums_of(y, level, head_k, K, POWER, PTX, PARTIAL)
                all_total, all_slope, all_curve = all_total + own, all_slope + own_slope, all_curve + own_curve
            tl.debug_barrier()
            total, slope, curve = tl.sum(all_total, axis=1), tl.sum(all_slope, axis=1), tl.sum(all_curve, axis=1)
            if SINK:
                total, slope, curve = with_sink(total, slope, curve, sink, m, delta, row_e, row_k, K, HARDWARE, PTX)
            bends = steps < HALLEY_STEPS
            known = active & (total > 0.0)
            fine = promises(total, slope, curve, delta, row_e, row_k, bends, CUT, SUM, LINEAR) | stalls(total, before)
            closer, bound = next_iterate(delta, low, high, total, slope, curve, row_e, row_k, bends)
            delta, low = tl.where(known, closer, delta), tl.where(known, bound, low)
            going = going & known & (fine == 0)
            steps += 1

        row_at = (b * heads + h) * length + block.q_start + first
        tl.store(m_ptr + row_at + lanes, m, mask=in_rows)
        tl.store(delta_ptr + row_at + lanes, tl.where(bad, float("nan"), delta), mask=in_rows)
        tl.store(slope_ptr + row_at + lanes, slope, mask=in_rows)
        live_rows = n_blocks
        if OPTIONS.PACKED:
            live_rows = n_blocks - 1  # for a packed tensor there is one block more than rows of `live`
        live_at = live_ptr + ((b * heads + h) * live_rows + block.index) * n_words
        bound = tl.where(bad, float("nan"), tl.where(active, low, 0.0))
        least = level_at(m, bound, unit, head_e, POWER, EXACT)
        store_live(tops_ptr, live_at, first_tile, tiles, n_words, least, block.index < live_rows, EXACT)
