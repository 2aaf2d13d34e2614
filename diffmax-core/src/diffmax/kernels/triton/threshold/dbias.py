"""The gradient for the relative bias: sums of dS over diagonals.

A program owns BLOCK distances of a head and walks over blocks of BLOCK queries. The keys at these distances lie within 2 BLOCK
of each other, and a gather brings each diagonal into a column. No two programs add to one number.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.tiles import locate_block, locate_other, position_shift, rows_inside
from diffmax.kernels.triton.threshold.tiles import (
    as_column,
    excess,
    load_queries,
    load_tile,
    place_head,
    place_queries,
    probability,
    rules_of,
    scores_of,
    slopes,
    some_above,
    with_mass,
)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_row", "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h", "v_row",
                               "mask_b", "mask_h", "mask_row", "mask_key", "heads", "group", "length", "n_keys",
                               "n_sequences", "n_blocks", "places", "items", "each", "distances", "width", "left", "right",
                               "scale", "power"])  # fmt: skip
def threshold_bwd_dbias_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, values_ptr,  # values: see `place_queries`
    bias_ptr, mask_ptr, cu_q_ptr, cu_k_ptr,  # the last three only where a flag says so; bias is contiguous
    parts_ptr,  # (shares, H, width), contiguous
    g_b, g_h, g_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, mask_b, mask_h, mask_row, mask_key,
    heads, group, length, n_keys, n_sequences, n_blocks, places, items, each, distances, width, left, right, scale, power,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr, OPTIONS: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, POWER: tl.constexpr,
    MASS: tl.constexpr, PLANES: tl.constexpr, QUERIES: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of `each` of the `items` blocks of queries of all batch entries.  Grid: (shares * H * distances,)."""
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    index = tl.program_id(0)
    share, head = index // distances // heads, (index // distances % heads).to(tl.int64)
    nearest = index % distances * BLOCK
    lanes, wide = tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK)
    # of row a, the entry at column a + BLOCK - 1 - b has the distance nearest + b
    diagonal = lanes[:, None] + BLOCK - 1 - lanes[None, :]
    head_bias = bias_ptr + head * width
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for item in range(share * each, tl.minimum(share * each + each, items)):
        batch = tl.cast(item // n_blocks, tl.int64)
        sequence, q_start, rows_here, first = locate_block(
            item % n_blocks, cu_q_ptr, n_sequences, length, BLOCK, OPTIONS.PACKED
        )
        k_start, keys_here = locate_other(sequence, cu_k_ptr, n_sequences, n_keys, OPTIONS.PACKED)
        shift = position_shift(rows_here, keys_here, OPTIONS.LOWER_RIGHT)
        begin = first + shift - nearest - BLOCK + 1
        if (first < rows_here) & (begin < keys_here) & (begin + 2 * BLOCK > 0):
            head_g, g_step = place_head(g_ptr, batch, head, q_start, g_b, g_h, g_row, ALIGNED)
            head_q, q_step = place_head(q_ptr, batch, head, q_start, q_b, q_h, q_row, ALIGNED)
            head_k, k_step = place_head(k_ptr, batch, head // group, k_start, k_b, k_h, k_row, ALIGNED)
            head_v, v_step = place_head(v_ptr, batch, head // group, k_start, v_b, v_h, v_row, ALIGNED)
            values, plane = place_queries(values_ptr, batch * heads + head, q_start, sequence, places, PLANES, QUERIES)
            queries = load_queries(values, plane, first, BLOCK, MASS, SOFTMAX)
            rules = rules_of(
                batch, head, mask_ptr, mask_b, mask_h, mask_row, mask_key, left, right, scale, shift, rows_here, keys_here,
                SOFTMAX,
            )  # fmt: skip
            rows, keys = first + lanes, begin + wide
            inside, valid = rows_inside(first, rows_here, BLOCK), (keys >= 0) & (keys < keys_here)
            q = load_tile(head_q, first, inside, q_step, HEAD_DIM, BLOCK, BLOCK_D)
            k = load_tile(head_k, begin, valid, k_step, HEAD_DIM, 2 * BLOCK, BLOCK_D)
            s, cut = scores_of(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), rows[:, None], keys[None, :], first, begin, rules,
                head_bias, width, OPTIONS, BIAS, SOFTMAX, BLOCK, 2 * BLOCK,
            )  # fmt: skip
            u = probability(s, queries.level[:, None], SOFTMAX, PTX)
            d_s = tl.zeros((BLOCK, 2 * BLOCK), tl.float32)
            y = excess(u, s, queries.theta[:, None], cut, SOFTMAX)
            if some_above(y):
                g = load_tile(head_g, first, inside, g_step, VALUE_DIM, BLOCK, BLOCK_V)
                v = load_tile(head_v, begin, valid, v_step, VALUE_DIM, 2 * BLOCK, BLOCK_V)
                d_w = with_mass(tl.dot(g, tl.trans(v), input_precision=PRECISION), as_column(queries), MASS)
                d_s = slopes(y, d_w, power, POWER, PTX)
            if SOFTMAX:
                d_s = u * (d_s - queries.mean[:, None])
            acc += tl.gather(d_s, diagonal, 1)
    there = nearest + lanes < width
    tl.store(parts_ptr + (share * heads + head) * width + nearest + lanes, tl.sum(acc, axis=0), mask=there)
