"""Gradients for queries: of the pairs of their chunk, and of what they read of the state before it."""

import triton
import triton.language as tl

from diffmax.kernels.triton.power.tiles import (
    decayed,
    given_by_computed,
    load_decays,
    load_tile,
    place_head,
    pulled,
    rounded_by_given,
    row_of,
    slope_of,
    store_tile,
)


@triton.jit(do_not_specialize=["grad_b", "grad_h", "grad_row", "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h",
                               "v_row", "heads", "group", "blocks", "chunks", "first_chunk", "x_chunks", "x_first", "slots",
                               "first_slot", "length", "n_keys", "size", "row", "scale"])  # fmt: skip
def power_bwd_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, g_ptr, x_ptr, weight_ptr, inverse_ptr, factor_ptr, variables_ptr, coefficients_ptr,
    state_ptr, grad_q_ptr, moved_ptr,
    grad_b, grad_h, grad_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row,
    heads, group, blocks, chunks, first_chunk, x_chunks, x_first, slots, first_slot, length, n_keys, size, row, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, DEGREE: tl.constexpr,
    ENTRIES: tl.constexpr, COUNT: tl.constexpr, SLOT: tl.constexpr,
    ALIGNED: tl.constexpr, GATES: tl.constexpr, PAIRS: tl.constexpr, STATE: tl.constexpr, FIRST_STATE: tl.constexpr,
    MOVED: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_T queries (docs/theory.md, Eq. 33).  Grid and flags: as of `power_out_kernel`.

    MOVED: the gradient for G at the queries' positions is stored too, as far as it comes from them (Eq. 34).
    """
    index = tl.program_id(0)
    block, chunk = index % blocks, first_chunk + index // blocks % chunks
    of_head = (index // blocks // chunks).to(tl.int64)
    batch, head = of_head // heads, of_head % heads
    kv_head = head // group
    of_kv = batch * (heads // group) + kv_head
    start, before = chunk * size, n_keys - length
    end = tl.minimum(size, n_keys - start)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    query = start - before + rows
    inside = (rows < end) & (query >= 0)
    at = of_head * length + query
    head_grad, grad_row = place_head(grad_ptr, batch, head, grad_b, grad_h, grad_row, ALIGNED)
    grad = load_tile(head_grad, query, grad_row, inside, VALUE_DIM, BLOCK_V)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)

    head_q, q_row = place_head(q_ptr, batch, head, q_b, q_h, q_row, ALIGNED)
    q = load_tile(head_q, query, q_row, inside, HEAD_DIM, BLOCK_D)

    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    moved = tl.zeros((BLOCK_T,), tl.float32)
    row = row_of(row)
    if STATE:
        entries_here = tl.where((chunk > 0) | FIRST_STATE, ENTRIES, 0)
        head_x = x_ptr + (of_head * x_chunks + (chunk - x_first)) * row * HEAD_DIM
        state_ptr += (of_kv * slots + (first_slot + chunk - first_chunk)) * SLOT
        for first in range(0, entries_here, BLOCK_P):
            entries = first + tl.arange(0, BLOCK_P)
            c = tl.load(coefficients_ptr + entries)
            sums = load_tile(state_ptr, entries, VALUE_DIM, entries < ENTRIES, VALUE_DIM, BLOCK_V) * c[:, None]
            norm = tl.load(state_ptr + ENTRIES * VALUE_DIM + entries, mask=entries < ENTRIES, other=0.0) * c
            d = given_by_computed(grad, tl.trans(sums), PARTS, PRECISION) + weight[:, None] * norm[None, :]
            acc = pulled(acc, d, head_x, row, variables_ptr, first, rows, DEGREE, COUNT, BLOCK_P, BLOCK_D, PARTS)
        acc *= tl.load(factor_ptr + at, mask=inside, other=0.0)[:, None]
        if MOVED:
            moved = tl.sum(acc * q.to(tl.float32), axis=1) * (scale / DEGREE)
    if PAIRS:
        k_ptr, k_row = place_head(k_ptr, batch, kv_head, k_b, k_h, k_row, ALIGNED)
        v_ptr, v_row = place_head(v_ptr, batch, kv_head, v_b, v_h, v_row, ALIGNED)
        inverse = tl.load(inverse_ptr + at, mask=inside, other=0.0)
        g_ptr += of_kv * 2 * n_keys + start
        high_q, low_q = load_decays(g_ptr, n_keys, rows, inside, GATES)
        for first in range(0, tl.minimum(end, (block + 1) * BLOCK_T), BLOCK_N):
            keys = first + tl.arange(0, BLOCK_N)
            there = keys < end
            k = load_tile(k_ptr, start + keys, k_row, there, HEAD_DIM, BLOCK_D)
            v = load_tile(v_ptr, start + keys, v_row, there, VALUE_DIM, BLOCK_V)
            high_k, low_k = load_decays(g_ptr, n_keys, keys, there, GATES)
            slope, w = slope_of(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, DEGREE)
            d_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION) + weight[:, None]
            seen = decayed(inverse[:, None], (high_q[:, None], low_q[:, None]), (high_k[None, :], low_k[None, :]), GATES)
            seen = tl.broadcast_to(seen, (BLOCK_T, BLOCK_N))
            if first + BLOCK_N > block * BLOCK_T:
                seen = tl.where(keys[None, :] <= rows[:, None], seen, 0.0)
            if MOVED:
                moved += tl.sum(d_p * (w * seen), axis=1)
            acc = rounded_by_given(d_p * slope * seen, k, acc, ROUNDED)
    store_tile(grad_q_ptr + of_head * length * HEAD_DIM, acc * scale, query, inside, HEAD_DIM, BLOCK_D)
    if MOVED:
        tl.store(moved_ptr + at, moved, mask=inside)
