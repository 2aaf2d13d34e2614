"""Gradients per query: for the query and its threshold; and what the other kernels need of queries.

A program holds a block of queries. For softmax a first pass over its keys finds the mean.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.tiles import (
    keys_of_rows,
    load_vector,
    locate_block,
    locate_other,
    position_shift,
    rows_inside,
)
from diffmax.kernels.triton.threshold.tiles import (
    Queries,
    as_column,
    by_given,
    exceeds,
    excess,
    level_of,
    load_tile,
    place_head,
    place_queries,
    probability,
    rules_of,
    scores_of,
    slopes,
    store_queries,
    store_tile,
    with_mass,
)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_row", "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h", "v_row",
                               "theta_b", "theta_h", "theta_row", "mask_b", "mask_h", "mask_row", "mask_key", "heads", "group",
                               "length", "n_keys", "n_sequences", "n_blocks", "places", "width", "left", "right", "scale",
                               "power"])  # fmt: skip
def threshold_bwd_dq_kernel(
    g_ptr, grad_mass_ptr, q_ptr, k_ptr, v_ptr, theta_ptr, lse_ptr,  # grad_mass, lse: contiguous
    bias_ptr, mask_ptr, cu_q_ptr, cu_k_ptr,  # each only where a flag says so; bias is contiguous
    grad_q_ptr, grad_theta_ptr, values_ptr,  # contiguous; values: for the other kernels, see `place_queries`
    g_b, g_h, g_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, theta_b, theta_h, theta_row,
    mask_b, mask_h, mask_row, mask_key,
    heads, group, length, n_keys, n_sequences, n_blocks, places, width, left, right, scale, power,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr, OPTIONS: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, POWER: tl.constexpr,
    MASS: tl.constexpr, NEEDS_THETA: tl.constexpr, PLANES: tl.constexpr, ROUNDED: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ = scale * dS K, dtheta = -sum_j G and for the other kernels `Queries`.  Grid: (B * H * n_blocks,).

    G is the gradient for u, dS = G for scores and p (G - mean) for softmax. MASS: mass has a gradient.
    """
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    index = tl.program_id(0)
    block = n_blocks - 1 - index % n_blocks
    batch, head = (index // n_blocks // heads).to(tl.int64), (index // n_blocks % heads).to(tl.int64)
    sequence, q_start, rows_here, first = locate_block(block, cu_q_ptr, n_sequences, length, BLOCK_M, OPTIONS.PACKED)
    k_start, keys_here = locate_other(sequence, cu_k_ptr, n_sequences, n_keys, OPTIONS.PACKED)
    shift = position_shift(rows_here, keys_here, OPTIONS.LOWER_RIGHT)

    head_g, g_row = place_head(g_ptr, batch, head, q_start, g_b, g_h, g_row, ALIGNED)
    head_q, q_row = place_head(q_ptr, batch, head, q_start, q_b, q_h, q_row, ALIGNED)
    head_k, k_row = place_head(k_ptr, batch, head // group, k_start, k_b, k_h, k_row, ALIGNED)
    head_v, v_row = place_head(v_ptr, batch, head // group, k_start, v_b, v_h, v_row, ALIGNED)
    row_at = (batch * heads + head) * length + q_start
    head_bias = bias_ptr + head * width
    rules = rules_of(
        batch, head, mask_ptr, mask_b, mask_h, mask_row, mask_key, left, right, scale, shift, rows_here, keys_here, SOFTMAX
    )
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows_inside(first, rows_here, BLOCK_M)
    theta_at = theta_ptr + batch * theta_b + head * theta_h + tl.cast(q_start, tl.int64) * theta_row
    theta = tl.load(theta_at + rows.to(tl.int64) * theta_row, mask=inside, other=float("inf"))
    q = load_tile(head_q, first, inside, q_row, HEAD_DIM, BLOCK_M, BLOCK_D)
    g = load_tile(head_g, first, inside, g_row, VALUE_DIM, BLOCK_M, BLOCK_V)
    low, high = keys_of_rows(first, rows_here, keys_here, shift, left, right, BLOCK_M, OPTIONS.WINDOW)
    high = tl.where(first < rows_here, high, low)
    low = low // BLOCK_N * BLOCK_N

    zero = tl.zeros((BLOCK_M,), tl.float32)
    level, mass, mean, grad_theta = zero, zero, zero, zero
    if MASS:
        mass = load_vector(grad_mass_ptr + row_at, first, rows_here, BLOCK_M, 0.0)
    if SOFTMAX:
        level = level_of(lse_ptr + row_at, first, rows_here, BLOCK_M)
    queries = Queries(theta, mass, level, mean)
    if SOFTMAX:
        for begin in range(low, high, BLOCK_N):
            valid = rows_inside(begin, keys_here, BLOCK_N)
            keys = begin + tl.arange(0, BLOCK_N)
            k = load_tile(head_k, begin, valid, k_row, HEAD_DIM, BLOCK_N, BLOCK_D)
            s, cut = scores_of(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), rows[:, None], keys[None, :], first, begin, rules,
                head_bias, width, OPTIONS, BIAS, SOFTMAX, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if exceeds(s, queries, 1.0, SOFTMAX, PTX):
                v = load_tile(head_v, begin, valid, v_row, VALUE_DIM, BLOCK_N, BLOCK_V)
                d_w = with_mass(tl.dot(g, tl.trans(v), input_precision=PRECISION), as_column(queries), MASS)
                p = probability(s, level[:, None], SOFTMAX, PTX)
                d_u = slopes(excess(p, s, theta[:, None], cut, SOFTMAX), d_w, power, POWER, PTX)
                mean += tl.sum(p * d_u, axis=1)
                grad_theta -= tl.sum(d_u, axis=1)

    values_ptr, places = place_queries(values_ptr, batch * heads + head, q_start, sequence, places, PLANES, BLOCK_M)
    store_queries(values_ptr, places, Queries(theta, mass, level, mean), first, BLOCK_M, MASS, SOFTMAX)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(low, high, BLOCK_N):
        valid = rows_inside(begin, keys_here, BLOCK_N)
        keys = begin + tl.arange(0, BLOCK_N)
        k = load_tile(head_k, begin, valid, k_row, HEAD_DIM, BLOCK_N, BLOCK_D)
        s, cut = scores_of(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), rows[:, None], keys[None, :], first, begin, rules,
            head_bias, width, OPTIONS, BIAS, SOFTMAX, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        u = probability(s, level[:, None], SOFTMAX, PTX)
        visited = exceeds(s, queries, 1.0, SOFTMAX, PTX)
        if visited:
            v = load_tile(head_v, begin, valid, v_row, VALUE_DIM, BLOCK_N, BLOCK_V)
            d_w = with_mass(tl.dot(g, tl.trans(v), input_precision=PRECISION), as_column(queries), MASS)
            d_s = slopes(excess(u, s, theta[:, None], cut, SOFTMAX), d_w, power, POWER, PTX)
            if SOFTMAX:
                d_s = u * (d_s - mean[:, None])
            else:
                grad_theta -= tl.sum(d_s, axis=1)
            acc = by_given(d_s, k, acc, PRECISION, ROUNDED)
        elif SOFTMAX:
            acc = by_given(-u * mean[:, None], k, acc, PRECISION, ROUNDED)
    store_tile(grad_q_ptr + row_at * HEAD_DIM, acc * scale, first, inside, HEAD_DIM, BLOCK_M, BLOCK_D)
    if NEEDS_THETA:
        tl.store(grad_theta_ptr + row_at + rows, grad_theta, mask=inside)
