"""Gradients for keys and values.

A program holds a block of keys and loops over the queries that see them, for all query heads that share the keys.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.tiles import (
    locate_block,
    locate_other,
    position_shift,
    rows_inside,
    rows_of_keys,
)
from diffmax.kernels.triton.threshold.tiles import (
    as_row,
    by_given,
    excess,
    load_queries,
    load_tile,
    only_inside,
    place_head,
    place_queries,
    probability,
    rules_of,
    scores_of,
    slopes,
    some_above,
    store_tile,
    weights,
    with_mass,
)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_row", "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h", "v_row",
                               "mask_b", "mask_h", "mask_row", "mask_key", "heads", "group", "length", "n_keys",
                               "n_sequences", "n_blocks", "places", "width", "left", "right", "scale",
                               "power"])  # fmt: skip
def threshold_bwd_dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, values_ptr,  # values: see `place_queries`
    bias_ptr, mask_ptr, cu_q_ptr, cu_k_ptr,  # each only where a flag says so; bias is contiguous
    grad_k_ptr, grad_v_ptr,  # contiguous
    g_b, g_h, g_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, mask_b, mask_h, mask_row, mask_key,
    heads, group, length, n_keys, n_sequences, n_blocks, places, width, left, right, scale, power,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr, OPTIONS: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, POWER: tl.constexpr,
    MASS: tl.constexpr, PLANES: tl.constexpr, QUERIES: tl.constexpr, ROUNDED: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK = scale * dS^T Q and dV = W^T dO.  Grid: (B * H_kv * n_blocks,).

    Tiles are keys by queries, so that products need no transposed weights.
    """
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    index = tl.program_id(0)
    kv_heads = heads // group
    batch, kv_head = (index // n_blocks // kv_heads).to(tl.int64), (index // n_blocks % kv_heads).to(tl.int64)
    sequence, k_start, keys_here, first = locate_block(index % n_blocks, cu_k_ptr, n_sequences, n_keys, BLOCK_N, OPTIONS.PACKED)
    q_start, rows_here = locate_other(sequence, cu_q_ptr, n_sequences, length, OPTIONS.PACKED)
    shift = position_shift(rows_here, keys_here, OPTIONS.LOWER_RIGHT)

    head_k, k_row = place_head(k_ptr, batch, kv_head, k_start, k_b, k_h, k_row, ALIGNED)
    head_v, v_row = place_head(v_ptr, batch, kv_head, k_start, v_b, v_h, v_row, ALIGNED)
    keys = first + tl.arange(0, BLOCK_N)
    valid = rows_inside(first, keys_here, BLOCK_N)
    k = load_tile(head_k, first, valid, k_row, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_tile(head_v, first, valid, v_row, VALUE_DIM, BLOCK_N, BLOCK_V)
    low, high = rows_of_keys(first, rows_here, keys_here, shift, left, right, BLOCK_N, OPTIONS.WINDOW)
    high = tl.where(first < keys_here, high, low)

    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        head_g, g_step = place_head(g_ptr, batch, head, q_start, g_b, g_h, g_row, ALIGNED)
        head_q, q_step = place_head(q_ptr, batch, head, q_start, q_b, q_h, q_row, ALIGNED)
        head_bias = bias_ptr + head * width
        values, plane = place_queries(values_ptr, batch * heads + head, q_start, sequence, places, PLANES, QUERIES)
        rules = rules_of(
            batch, head, mask_ptr, mask_b, mask_h, mask_row, mask_key, left, right, scale, shift, rows_here, keys_here, SOFTMAX
        )
        for begin in range(low // BLOCK_M * BLOCK_M, high, BLOCK_M):
            rows = begin + tl.arange(0, BLOCK_M)
            inside = (rows >= low) & (rows < high)  # others may hold NaN
            queries = load_queries(values, plane, begin, BLOCK_M, MASS, SOFTMAX)
            if begin < low:
                queries = only_inside(queries, inside)
            q = load_tile(head_q, begin, inside, q_step, HEAD_DIM, BLOCK_M, BLOCK_D)
            s, cut = scores_of(
                tl.dot(k, tl.trans(q), input_precision=PRECISION), rows[None, :], keys[:, None], begin, first, rules,
                head_bias, width, OPTIONS, BIAS, SOFTMAX, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            of = as_row(queries)
            u = probability(s, of.level, SOFTMAX, PTX)
            y = excess(u, s, of.theta, cut, SOFTMAX)
            visited = some_above(y)
            if visited:
                g = load_tile(head_g, begin, inside, g_step, VALUE_DIM, BLOCK_M, BLOCK_V)
                d_w = with_mass(tl.dot(v, tl.trans(g), input_precision=PRECISION), of, MASS)
                d_s = slopes(y, d_w, power, POWER, PTX)
                if SOFTMAX:
                    d_s = u * (d_s - of.mean)
                acc_v = by_given(weights(y, power, POWER, PTX), g, acc_v, PRECISION, ROUNDED)
                acc_k = by_given(d_s, q, acc_k, PRECISION, ROUNDED)
            elif SOFTMAX:
                acc_k = by_given(-u * of.mean, q, acc_k, PRECISION, ROUNDED)
    row_at = (batch * kv_heads + kv_head) * n_keys + k_start
    store_tile(grad_k_ptr + row_at * HEAD_DIM, acc_k * scale, first, valid, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(grad_v_ptr + row_at * VALUE_DIM, acc_v, first, valid, VALUE_DIM, BLOCK_N, BLOCK_V)
