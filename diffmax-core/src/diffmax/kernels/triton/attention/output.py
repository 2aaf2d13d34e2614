"""Second kernel of attention's forward: the output, and U of Eq. 5 for the backward, from the tiles that hold a weight.

S is summed again in the same pass. The output gets the remaining linear step, or is divided by S. If S differs from 1 by more
than the first kernel predicted, the threshold takes a step and the tiles are visited again. Values too long for the registers
are split into shares of BLOCK_V entries; each share recomputes the scores.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.evaluation import level_at, partial_sums, support_of, weights_of
from diffmax.kernels.triton.attention.scores import block_of, queries_of, rules_of, tile_scores
from diffmax.kernels.triton.attention.steps import good_enough, largest_delta, linear_suffices, list_set_bits, stalls
from diffmax.kernels.triton.attention.tiles import TILE, load_rows, load_vector, row_ptr, rows_inside, store_rows
from diffmax.kernels.triton.common.layout import head_exponent, vector_multiple
from diffmax.kernels.triton.common.numerics import next_iterate, overshoot, with_sink
from diffmax.kernels.triton.common.scores import keep_mask

_ROUNDS = tl.constexpr(30)


@triton.jit(do_not_specialize=[
    "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h", "v_row", "mask_b", "mask_h", "mask_row", "mask_key",
    "bias_b", "bias_h", "bias_row", "bias_key", "alibi_b", "heads", "group", "length", "n_keys", "n_sequences", "n_blocks",
    "items", "n_words", "most_tiles", "left", "right", "threshold", "scale", "softcap", "e", "k", "inverse_keep",
])  # fmt: skip
def attention_out_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, u_ptr, m_ptr, start_ptr, slope_ptr, delta_ptr, live_ptr, support_ptr, e_ptr,
    mask_ptr, bias_ptr, alibi_ptr, sink_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, list_ptr,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, mask_b, mask_h, mask_row, mask_key,
    bias_b, bias_h, bias_row, bias_key, alibi_b,
    heads, group, length, n_keys, n_sequences, n_blocks, items, n_words, most_tiles, left, right, threshold,
    scale, softcap, e, k, inverse_keep,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    OPTIONS: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    KEEP: tl.constexpr, SUPPORT: tl.constexpr, CUT: tl.constexpr, SUM: tl.constexpr, SOLVED: tl.constexpr,
    HARDWARE: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    FOLDED: tl.constexpr, POWER: tl.constexpr, EXACT: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """out, delta, and the optional results.  Grid: as many programs as run concurrently; list is their scratch buffer.

    A program takes ROWS queries at a time, 64 or 128, which share every tile of keys and values that is loaded.
    """
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    VECTOR: tl.constexpr = 128 // q_ptr.dtype.element_ty.primitive_bitwidth
    WHOLE: tl.constexpr = VALUE_DIM % BLOCK_V == 0
    BLOCKS: tl.constexpr = ROWS // TILE
    SHARES: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    HALF: tl.constexpr = v_ptr.dtype.element_ty == tl.float16
    q_row, k_row = vector_multiple(q_row, ALIGNED, VECTOR), vector_multiple(k_row, ALIGNED, VECTOR)
    v_row = vector_multiple(v_row, ALIGNED, VECTOR)
    lanes = tl.arange(0, ROWS)
    zero = tl.zeros((ROWS,), tl.float32)
    unit = scale if FOLDED else 1.0
    list_ptr += tl.program_id(0).to(tl.int64) * most_tiles

    for turn in range(tl.program_id(0), items * SHARES, tl.num_programs(0)):
        item, share = turn // SHARES, turn % SHARES
        block = block_of(
            item, heads, group, n_blocks, length, n_keys, n_sequences, left, right, cu_q_ptr, cu_k_ptr, OPTIONS, ROWS
        )
        b, h, first, n_rows = block.batch, block.head, block.first, block.n_rows
        in_rows = rows_inside(first, n_rows, ROWS)
        k_at = row_ptr(k_ptr, b, block.kv_head, block.k_start, k_b, k_h, k_row, ALIGNED)
        v_at = row_ptr(v_ptr, b, block.kv_head, block.k_start, v_b, v_h, v_row, ALIGNED) + share * BLOCK_V
        entries = VALUE_DIM - share * BLOCK_V
        q_at = row_ptr(q_ptr, b, h, block.q_start, q_b, q_h, q_row, ALIGNED)
        q = queries_of(q_at, q_row, block, HEAD_DIM, BLOCK_D, CHUNK, ROWS)
        head_e, head_k = head_exponent(e_ptr, e, k, h, E_TENSOR, True)
        row_e, row_k = zero + head_e, zero + head_k
        rules = rules_of(
            b, h, block.shift, n_rows, block.n_keys, mask_ptr, bias_ptr, alibi_ptr,
            mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b, left, right, scale, softcap,
            OPTIONS,
        )  # fmt: skip
        sink = zero - float("inf")
        size = zero + (block.high_key - block.low_key).to(tl.float32)
        if SINK:
            sink = zero + tl.load(sink_ptr + h)
            size += 1.0
        size = tl.maximum(size, 1.0)

        row_at = (b * heads + h) * length + block.q_start
        out_at = row_at * VALUE_DIM + share * BLOCK_V
        m = load_vector(m_ptr + row_at, first, n_rows, ROWS, -float("inf"))
        delta = load_vector(start_ptr + row_at, first, n_rows, ROWS, 0.0)
        slope = load_vector(slope_ptr + row_at, first, n_rows, ROWS, 1.0)  # unless KEEP, the slope of every round
        bad = delta != delta
        active = in_rows & (bad == 0) & (m > -float("inf"))
        delta = tl.where(active, delta, 0.0)
        high = largest_delta(size, row_e)
        live_rows = tl.cdiv(length, TILE)
        if OPTIONS.PACKED:  # blocks of TILE queries, one more than rows of `live`
            live_rows = n_blocks - 1
        live_row = block.index * BLOCKS
        live_at = live_ptr + ((b * heads + h) * live_rows + live_row) * n_words
        tl.debug_barrier()  # the previous block may still be read
        count = list_set_bits(live_at, list_ptr, n_words, live_rows - live_row, BLOCKS)
        tl.debug_barrier()

        total, at, rounds = zero, delta, 0
        acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
        acc_u = acc
        while rounds < _ROUNDS:
            lift, lift_u = _lifts(delta, row_k, HALF)
            level = level_at(m, delta, unit, head_e, POWER, EXACT)
            before, at = total, delta
            all_total = tl.zeros((ROWS, PARTIAL), tl.float32)
            all_slope = all_total
            acc = tl.zeros((ROWS, BLOCK_V), tl.float32)
            acc_u = acc
            for i in range(0, count * PARTS):
                begin = tl.load(list_ptr + i // PARTS) * TILE + i % PARTS * KEYS
                x = tile_scores(
                    q, q_row, k_at, k_row, begin, block, rules, level, OPTIONS, FOLDED, EXACT,
                    True, HEAD_DIM, BLOCK_D, CHUNK, ROWS, KEYS,
                )  # fmt: skip
                value = load_rows(v_at, begin, rows_inside(begin, block.n_keys, KEYS), v_row, entries, KEYS, BLOCK_V, WHOLE)
                s, p = weights_of(x, level, head_k, K, POWER, KEEP, PTX)
                all_total += partial_sums(p, PARTIAL)
                if KEEP:
                    all_slope += partial_sums(s, PARTIAL)
                if DROPOUT:
                    own = ((b + block.sequence) * heads + h).to(tl.int32)
                    keeps = keep_mask(seed_ptr, (first + lanes)[:, None], (begin + tl.arange(0, KEYS))[None, :], own, threshold)
                    p, s = tl.where(keeps, p * inverse_keep, 0.0), tl.where(keeps, s * inverse_keep, 0.0)
                if HALF:
                    p, s = p * lift[:, None], s * lift_u[:, None]
                acc = tl.dot(p.to(v_ptr.dtype.element_ty), value, acc, input_precision=PRECISION)
                if KEEP:
                    acc_u = tl.dot(s.to(v_ptr.dtype.element_ty), value, acc_u, input_precision=PRECISION)
            total = tl.sum(all_total, axis=1)
            if KEEP:
                slope = tl.sum(all_slope, axis=1)
            if SINK:
                total, own_slope, _curve = with_sink(total, zero, zero, sink, m, delta, row_e, row_k, K, HARDWARE, PTX)
                if KEEP:
                    slope += own_slope

            known = active & (total > 0.0)
            done = good_enough(total, slope, delta, row_e, row_k, size, CUT, SUM, KEEP) | stalls(total, before)
            rounds = tl.where(tl.max((known & (done == 0)).to(tl.int32), axis=0) > 0, rounds + 1, _ROUNDS)
            moved, _lower = next_iterate(delta, zero, high, total, slope, zero, row_e, row_k, False)
            delta = tl.where(known, moved, delta)

        # the output, with the remaining linear step or divided by the sum
        linear = linear_suffices(total, slope, at, row_e, row_k, size, SOLVED) & (total > 0.0)
        step = tl.where(linear, overshoot(total, slope), 0.0)
        scaled = tl.where(total == 0.0, 1.0, total)
        lift, lift_u = _lifts(at, row_k, HALF)
        if KEEP:
            acc = acc * (1.0 / (tl.where(linear, 1.0, scaled) * lift))[:, None] - acc_u * (step / lift_u)[:, None]
            acc_u = acc_u * (1.0 / (tl.where(slope == 0.0, 1.0, slope) * lift_u))[:, None]
            acc_u = tl.where(bad[:, None], float("nan"), acc_u)
            store_rows(u_ptr + out_at, acc_u, first, in_rows, VALUE_DIM, entries, ROWS, BLOCK_V, WHOLE)
        else:
            acc = acc * (1.0 / (scaled * lift))[:, None]
        acc = tl.where(bad[:, None], float("nan"), acc)
        store_rows(out_ptr + out_at, acc, first, in_rows, VALUE_DIM, entries, ROWS, BLOCK_V, WHOLE)
        # explicit NaN, because the maximum with NaN is NaN in the interpreter, but a number on devices
        final = tl.where(total != total, total, tl.maximum(at + row_e * step, 0.0))
        final = tl.where(bad, float("nan"), tl.where(active, final, 0.0))
        tl.store(delta_ptr + row_at + first + lanes, final, mask=in_rows & (share == 0))
        if SUPPORT:
            support = tl.zeros((ROWS,), tl.int32)
            found = level_at(m, final, unit, head_e, POWER, EXACT)
            for i in range(0, count * PARTS):
                start = tl.load(list_ptr + i // PARTS) * TILE + i % PARTS * KEYS
                y = tile_scores(
                    q, q_row, k_at, k_row, start, block, rules, found, OPTIONS, FOLDED, EXACT,
                    True, HEAD_DIM, BLOCK_D, CHUNK, ROWS, KEYS,
                )  # fmt: skip
                support += support_of(y, found)
            tl.store(support_ptr + row_at + first + lanes, support, mask=in_rows & (share == 0))


@triton.jit
def _lifts(delta, k, HALF: tl.constexpr):
    """Factors of weights and their slopes: small ones would underflow in float16, so the largest is scaled to 1."""
    one = tl.zeros_like(delta) + 1.0
    if HALF:
        largest = tl.maximum(1.0 - delta, 1e-6)
        lift = tl.exp2(tl.minimum(-k * tl.log2(largest), 40.0))
        return lift, lift * largest
    else:
        return one, one
