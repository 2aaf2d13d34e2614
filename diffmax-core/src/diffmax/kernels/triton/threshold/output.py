"""Results of queries: weighted sums of values, and sums of weights.

A program holds a block of queries. For softmax a first pass over its keys finds the log-sum-exp. In the pass that adds values,
a tile whose largest probabilities do not exceed the thresholds of their queries ends after the product of queries and keys.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.evaluation import larger_or_nan
from diffmax.kernels.triton.attention.tiles import (
    keys_of_rows,
    locate_block,
    locate_other,
    position_shift,
    rows_inside,
)
from diffmax.kernels.triton.common.numerics import exp2_of
from diffmax.kernels.triton.threshold.tiles import (
    Queries,
    by_given,
    exceeds,
    excess,
    load_tile,
    place_head,
    probability,
    rules_of,
    scores_of,
    store_tile,
    weights,
)

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h", "v_row", "theta_b", "theta_h",
                               "theta_row", "mask_b", "mask_h", "mask_row", "mask_key", "heads", "group", "length", "n_keys",
                               "n_sequences", "n_blocks", "width", "left", "right", "scale", "power"])  # fmt: skip
def threshold_out_kernel(
    q_ptr, k_ptr, v_ptr, theta_ptr,
    bias_ptr, mask_ptr, cu_q_ptr, cu_k_ptr,  # each only where a flag says so; bias is contiguous
    out_ptr, mass_ptr, lse_ptr,  # contiguous
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, theta_b, theta_h, theta_row, mask_b, mask_h, mask_row, mask_key,
    heads, group, length, n_keys, n_sequences, n_blocks, width, left, right, scale, power,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr, OPTIONS: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, POWER: tl.constexpr,
    KEEP: tl.constexpr, ROUNDED: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out, mass, and with KEEP the log-sum-exp of softmax.  Grid: (B * H * n_blocks,).

    The last blocks run first: under causality they have the most work. SOFTMAX: u is softmax of the scores, else the scores.
    """
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    index = tl.program_id(0)
    block = n_blocks - 1 - index % n_blocks
    batch, head = (index // n_blocks // heads).to(tl.int64), (index // n_blocks % heads).to(tl.int64)
    sequence, q_start, rows_here, first = locate_block(block, cu_q_ptr, n_sequences, length, BLOCK_M, OPTIONS.PACKED)
    k_start, keys_here = locate_other(sequence, cu_k_ptr, n_sequences, n_keys, OPTIONS.PACKED)
    shift = position_shift(rows_here, keys_here, OPTIONS.LOWER_RIGHT)

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
    low, high = keys_of_rows(first, rows_here, keys_here, shift, left, right, BLOCK_M, OPTIONS.WINDOW)
    high = tl.where(first < rows_here, high, low)
    low = low // BLOCK_N * BLOCK_N

    level = tl.zeros((BLOCK_M,), tl.float32)
    inverse = level + 1.0
    if SOFTMAX:
        m = level - float("inf")
        total = level
        for begin in range(low, high, BLOCK_N):
            k = load_tile(head_k, begin, rows_inside(begin, keys_here, BLOCK_N), k_row, HEAD_DIM, BLOCK_N, BLOCK_D)
            keys = begin + tl.arange(0, BLOCK_N)
            s, _cut = scores_of(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), rows[:, None], keys[None, :], first, begin, rules,
                head_bias, width, OPTIONS, BIAS, SOFTMAX, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            top = larger_or_nan(m, tl.reduce(s, 1, larger_or_nan))
            level = tl.where(top == -float("inf"), 0.0, top)
            total = total * exp2_of(m - level, PTX) + tl.sum(exp2_of(s - level[:, None], PTX), axis=1)
            m = top
        level = tl.where(m == -float("inf"), 0.0, m)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        if KEEP:
            lse = tl.where(total == 0.0, -float("inf"), (m + tl.log2(total)) * _LN_2)
            tl.store(lse_ptr + row_at + rows, lse, mask=inside)

    queries = Queries(theta, theta, level, level)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(low, high, BLOCK_N):
        valid = rows_inside(begin, keys_here, BLOCK_N)
        k = load_tile(head_k, begin, valid, k_row, HEAD_DIM, BLOCK_N, BLOCK_D)
        keys = begin + tl.arange(0, BLOCK_N)
        s, cut = scores_of(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), rows[:, None], keys[None, :], first, begin, rules,
            head_bias, width, OPTIONS, BIAS, SOFTMAX, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if exceeds(s, queries, inverse, SOFTMAX, PTX):
            v = load_tile(head_v, begin, valid, v_row, VALUE_DIM, BLOCK_N, BLOCK_V)
            u = probability(s, level[:, None], SOFTMAX, PTX)
            if SOFTMAX:
                u *= inverse[:, None]
            w = weights(excess(u, s, theta[:, None], cut, SOFTMAX), power, POWER, PTX)
            mass += tl.sum(w, axis=1)
            acc = by_given(w, v, acc, PRECISION, ROUNDED)
    store_tile(out_ptr + row_at * VALUE_DIM, acc, first, inside, VALUE_DIM, BLOCK_M, BLOCK_V)
    tl.store(mass_ptr + row_at + rows, mass, mask=inside)
