"""Second kernel of attention's forward: the output, and U of Eq. 5 for the backward, from the tiles that hold a weight.

S is summed again in the same pass. The output gets the remaining linear step, or is divided by S. If S differs from 1 by more
than the first kernel predicted, the threshold takes a step and the tiles are visited again. Values too long for the registers
are split into shares of BLOCK_V entries; each share recomputes the scores.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.scores import block_of, queries_of, rules_of, tile_scores
from diffmax.kernels.triton.attention.steps import good_enough, largest_delta, list_set_bits, stalls
from diffmax.kernels.triton.attention.tiles import TILE, load_rows, load_vector, row_ptr, rows_inside, store_rows
from diffmax.kernels.triton.common.layout import head_exponent, vector_multiple
from diffmax.kernels.triton.common.numerics import finishing, next_iterate, overshoot, powers, scaled_scores, with_sink
from diffmax.kernels.triton.common.scores import keep_mask

_ROUNDS = tl.constexpr(30)


@triton.jit(do_not_specialize=[
    "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h", "v_row", "mask_b", "mask_h", "mask_row", "mask_key",
    "bias_b", "bias_h", "bias_row", "bias_key", "alibi_b", "heads", "group", "length", "n_keys", "n_sequences", "n_blocks",
    "items", "n_words", "most_tiles", "left", "right", "threshold", "scale", "softcap", "e", "k", "inverse_keep",
])  # fmt: skip
def attention_out_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, u_ptr, m_ptr, start_ptr, delta_ptr, live_ptr, support_ptr, e_ptr,
    mask_ptr, bias_ptr, alibi_ptr, sink_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, list_ptr,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, mask_b, mask_h, mask_row, mask_key,
    bias_b, bias_h, bias_row, bias_key, alibi_b,
    heads, group, length, n_keys, n_sequences, n_blocks, items, n_words, most_tiles, left, right, threshold,
    scale, softcap, e, k, inverse_keep,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    OPTIONS: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    KEEP: tl.constexpr, SUPPORT: tl.constexpr, CUT: tl.constexpr, SOLVED: tl.constexpr,
    HARDWARE: tl.constexpr, PTX: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out, delta, and the optional results.  Grid: as many programs as run concurrently; list is their scratch buffer."""
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    VECTOR: tl.constexpr = 128 // q_ptr.dtype.element_ty.primitive_bitwidth
    WHOLE: tl.constexpr = VALUE_DIM % BLOCK_V == 0
    SHARES: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    HALF: tl.constexpr = v_ptr.dtype.element_ty == tl.float16
    q_row, k_row = vector_multiple(q_row, ALIGNED, VECTOR), vector_multiple(k_row, ALIGNED, VECTOR)
    v_row = vector_multiple(v_row, ALIGNED, VECTOR)
    lanes = tl.arange(0, TILE)
    zero = tl.zeros((TILE,), tl.float32)
    list_ptr += tl.program_id(0).to(tl.int64) * most_tiles

    for turn in range(tl.program_id(0), items * SHARES, tl.num_programs(0)):
        item, share = turn // SHARES, turn % SHARES
        block = block_of(item, heads, group, n_blocks, length, n_keys, n_sequences, left, right, cu_q_ptr, cu_k_ptr, OPTIONS)
        b, h, first, n_rows = block.batch, block.head, block.first, block.n_rows
        in_rows = rows_inside(first, n_rows, TILE)
        k_at = row_ptr(k_ptr, b, block.kv_head, block.k_start, k_b, k_h, k_row, ALIGNED)
        v_at = row_ptr(v_ptr, b, block.kv_head, block.k_start, v_b, v_h, v_row, ALIGNED) + share * BLOCK_V
        entries = VALUE_DIM - share * BLOCK_V
        q_at = row_ptr(q_ptr, b, h, block.q_start, q_b, q_h, q_row, ALIGNED)
        q = queries_of(q_at, q_row, block, HEAD_DIM, BLOCK_D, CHUNK)
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
        m = load_vector(m_ptr + row_at, first, n_rows, TILE, -float("inf"))
        delta = load_vector(start_ptr + row_at, first, n_rows, TILE, 0.0)
        bad = delta != delta
        active = in_rows & (bad == 0) & (m > -float("inf"))
        delta = tl.where(active, delta, 0.0)
        high = largest_delta(size, row_e)
        live_rows = n_blocks
        if OPTIONS.PACKED:
            live_rows = n_blocks - 1
        live_at = live_ptr + ((b * heads + h) * live_rows + block.index) * n_words
        tl.debug_barrier()  # the previous block may still be read
        count = list_set_bits(live_at, list_ptr, n_words, block.index < live_rows)
        tl.debug_barrier()

        final = zero
        total = zero
        rounds = 0
        while rounds < _ROUNDS:
            lift, lift_u = zero + 1.0, zero + 1.0
            if HALF:  # small weights would underflow in float16: scale the largest to 1
                lift = tl.exp2(tl.minimum(-row_k * tl.log2(tl.maximum(1.0 - delta, 1e-6)), 40.0))
                lift_u = lift * tl.maximum(1.0 - delta, 1e-6)
            before = total
            total, slope, curve = zero, zero, zero
            acc = tl.zeros((TILE, BLOCK_V), tl.float32)
            acc_u = tl.zeros((TILE, BLOCK_V), tl.float32)
            for i in range(0, count * PARTS):
                begin = tl.load(list_ptr + i // PARTS) * TILE + i % PARTS * KEYS
                x = tile_scores(q, q_row, k_at, k_row, begin, block, rules, OPTIONS, HEAD_DIM, BLOCK_D, CHUNK, KEYS)
                value = load_rows(v_at, begin, rows_inside(begin, block.n_keys, KEYS), v_row, entries, KEYS, BLOCK_V, WHOLE)
                base, r = powers(scaled_scores(x, m, row_e), delta, row_k, K, HARDWARE, PTX)
                curve += tl.sum(r, axis=1)
                s = r * base
                slope += tl.sum(s, axis=1)
                p = s * base
                total += tl.sum(p, axis=1)
                if DROPOUT:
                    own = ((b + block.sequence) * heads + h).to(tl.int32)
                    keeps = keep_mask(seed_ptr, (first + lanes)[:, None], (begin + tl.arange(0, KEYS))[None, :], own, threshold)
                    p, s = tl.where(keeps, p * inverse_keep, 0.0), tl.where(keeps, s * inverse_keep, 0.0)
                if HALF:
                    p, s = p * lift[:, None], s * lift_u[:, None]
                acc = tl.dot(p.to(v_ptr.dtype.element_ty), value, acc, input_precision=PRECISION)
                if KEEP:
                    acc_u = tl.dot(s.to(v_ptr.dtype.element_ty), value, acc_u, input_precision=PRECISION)
            if SINK:
                total, slope, curve = with_sink(total, slope, curve, sink, m, delta, row_e, row_k, K, HARDWARE, PTX)

            step, weight, final = finishing(delta, total, slope, curve, row_e, row_k, size, SOLVED, True)
            final = tl.where(bad, float("nan"), tl.where(active, final, 0.0))
            if KEEP:
                acc_u = acc_u / lift_u[:, None]
                linear = tl.where(step == 0.0, 0.0, overshoot(total, slope))
                acc = acc * (weight / lift)[:, None] - linear[:, None] * acc_u
                acc_u = tl.where(bad[:, None], float("nan"), acc_u / tl.where(slope == 0.0, 1.0, slope)[:, None])
                store_rows(u_ptr + out_at, acc_u, first, in_rows, VALUE_DIM, entries, TILE, BLOCK_V, WHOLE)
            else:
                acc = acc / (tl.where(total == 0.0, 1.0, total) * lift)[:, None]
            acc = tl.where(bad[:, None], float("nan"), acc)
            store_rows(out_ptr + out_at, acc, first, in_rows, VALUE_DIM, entries, TILE, BLOCK_V, WHOLE)

            known = active & (total > 0.0)
            done = good_enough(total, slope, curve, delta, row_e, row_k, size, CUT, KEEP) | stalls(total, before)
            rounds = tl.where(tl.max((known & (done == 0)).to(tl.int32), axis=0) > 0, rounds + 1, _ROUNDS)
            moved, _lower = next_iterate(delta, zero, high, total, slope, curve, row_e, row_k, False)
            delta = tl.where(known, moved, delta)

        tl.store(delta_ptr + row_at + first + lanes, final, mask=in_rows & (share == 0))
        if SUPPORT:
            support = tl.zeros((TILE,), tl.int32)
            for i in range(0, count * PARTS):
                start = tl.load(list_ptr + i // PARTS) * TILE + i % PARTS * KEYS
                y = tile_scores(q, q_row, k_at, k_row, start, block, rules, OPTIONS, HEAD_DIM, BLOCK_D, CHUNK, KEYS)
                support += tl.sum((scaled_scores(y, m, row_e) > (final - 1.0)[:, None]).to(tl.int32), axis=1)
            tl.store(support_ptr + row_at + first + lanes, support, mask=in_rows & (share == 0))
