"""Gradients for keys and values: of the pairs of their chunk, and of the state after it."""

import triton
import triton.language as tl

from diffmax.kernels.triton.power.tiles import (
    computed_by_computed,
    decayed,
    given_by_computed,
    load_decays,
    load_tile,
    monomials,
    place_head,
    pulled,
    rounded_by_given,
    row_of,
    slope_of,
    store_tile,
)


@triton.jit(do_not_specialize=["grad_b", "grad_h", "grad_row", "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h",
                               "v_row", "kv_heads", "group", "blocks", "chunks", "first_chunk", "all_chunks", "slots",
                               "first_slot", "length", "n_keys", "size", "row", "scale"])  # fmt: skip
def power_bwd_dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, g_ptr, x_ptr, weight_ptr, inverse_ptr, until_ptr, variables_ptr, state_ptr,
    grad_k_ptr, grad_v_ptr, moved_ptr,
    grad_b, grad_h, grad_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row,
    kv_heads, group, blocks, chunks, first_chunk, all_chunks, slots, first_slot, length, n_keys, size, row, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, DEGREE: tl.constexpr,
    ENTRIES: tl.constexpr, COUNT: tl.constexpr, SLOT: tl.constexpr,
    ALIGNED: tl.constexpr, GATES: tl.constexpr, STATE: tl.constexpr, LAST_STATE: tl.constexpr,
    MOVED: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_T keys (docs/theory.md, Eq. 33).  Grid: (B * H_kv * chunks * blocks of a chunk,).

    STATE: the state after some chunk has a gradient; LAST_STATE: that after the last one too. `state` has a head's, of which
    the first is for the state before chunk `first_chunk`. MOVED: what keys take from the gradient for G at their positions is
    stored too (Eq. 34).
    """
    index = tl.program_id(0)
    block, chunk = index % blocks, first_chunk + index // blocks % chunks
    of_kv = (index // blocks // chunks).to(tl.int64)
    batch, kv_head = of_kv // kv_heads, of_kv % kv_heads
    start, before = chunk * size, n_keys - length
    end = tl.minimum(size, n_keys - start)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < end
    k_ptr, k_row = place_head(k_ptr, batch, kv_head, k_b, k_h, k_row, ALIGNED)
    v_ptr, v_row = place_head(v_ptr, batch, kv_head, v_b, v_h, v_row, ALIGNED)
    k = load_tile(k_ptr, start + rows, k_row, inside, HEAD_DIM, BLOCK_D)
    v = load_tile(v_ptr, start + rows, v_row, inside, VALUE_DIM, BLOCK_V)

    acc_k = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    moved = tl.zeros((BLOCK_T,), tl.float32)
    row = row_of(row)
    if STATE:
        entries_here = tl.where((chunk < all_chunks - 1) | LAST_STATE, ENTRIES, 0)
        head_x = x_ptr + (of_kv * all_chunks + chunk) * row * HEAD_DIM
        state_ptr += (of_kv * slots + (first_slot + chunk - first_chunk)) * SLOT
        for first in range(0, entries_here, BLOCK_P):
            entries = first + tl.arange(0, BLOCK_P)
            sums = load_tile(state_ptr, entries, VALUE_DIM, entries < ENTRIES, VALUE_DIM, BLOCK_V)
            norm = tl.load(state_ptr + ENTRIES * VALUE_DIM + entries, mask=entries < ENTRIES, other=0.0)
            m = monomials(head_x, row, variables_ptr, entries[None, :], rows[:, None], -1, DEGREE, COUNT)
            acc_v = computed_by_computed(m, sums, acc_v, SPLIT, PRECISION)
            d = given_by_computed(v, tl.trans(sums), PARTS, PRECISION) + norm[None, :]
            acc_k = pulled(acc_k, d, head_x, row, variables_ptr, first, rows, DEGREE, COUNT, BLOCK_P, BLOCK_D, PARTS)
        if GATES:
            until = tl.load(until_ptr + of_kv * n_keys + start + rows, mask=inside, other=0.0)
            acc_k *= until[:, None]
            acc_v *= until[:, None]
        if MOVED:
            moved = tl.sum(acc_k * k.to(tl.float32), axis=1) / DEGREE
    g_ptr += of_kv * 2 * n_keys + start
    high_k, low_k = load_decays(g_ptr, n_keys, rows, inside, GATES)
    lowest = tl.maximum(block * BLOCK_T, before - start) // BLOCK_N * BLOCK_N
    for member in range(group):
        head = kv_head * group + member
        of_head = of_kv * group + member
        head_q, step_q = place_head(q_ptr, batch, head, q_b, q_h, q_row, ALIGNED)
        head_grad, step_grad = place_head(grad_ptr, batch, head, grad_b, grad_h, grad_row, ALIGNED)
        for first in range(lowest, end, BLOCK_N):
            places = first + tl.arange(0, BLOCK_N)
            query = start - before + places
            there = (places < end) & (query >= 0)
            q = load_tile(head_q, query, step_q, there, HEAD_DIM, BLOCK_D)
            grad = load_tile(head_grad, query, step_grad, there, VALUE_DIM, BLOCK_V)
            weight = tl.load(weight_ptr + of_head * length + query, mask=there, other=0.0)
            inverse = tl.load(inverse_ptr + of_head * length + query, mask=there, other=0.0)
            high_q, low_q = load_decays(g_ptr, n_keys, places, there, GATES)
            slope, w = slope_of(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale, DEGREE)
            d_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION) + weight[None, :]
            seen = decayed(inverse[None, :], (high_q[None, :], low_q[None, :]), (high_k[:, None], low_k[:, None]), GATES)
            seen = tl.broadcast_to(seen, (BLOCK_T, BLOCK_N))
            if (first < block * BLOCK_T + BLOCK_T) | (first + BLOCK_N > end) | (start + first < before):
                seen = tl.where((rows[:, None] <= places[None, :]) & there[None, :], seen, 0.0)
            w *= seen
            if MOVED:
                moved += tl.sum(d_p * w, axis=1)
            acc_v = rounded_by_given(w, grad, acc_v, ROUNDED)
            acc_k = rounded_by_given(d_p * slope * seen * scale, q, acc_k, ROUNDED)
    store_tile(grad_k_ptr + of_kv * n_keys * HEAD_DIM, acc_k, start + rows, inside, HEAD_DIM, BLOCK_D)
    store_tile(grad_v_ptr + of_kv * n_keys * VALUE_DIM, acc_v, start + rows, inside, VALUE_DIM, BLOCK_V)
    if MOVED:
        tl.store(moved_ptr + of_kv * n_keys + start + rows, moved, mask=inside)
