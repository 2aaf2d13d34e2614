"""Results of queries: the pairs of their chunk, and what they read of the state before it, divided by the sum of weights."""

import triton
import triton.language as tl

from diffmax.kernels.triton.power.tiles import (
    as_columns,
    computed_by_computed,
    computed_by_given,
    decayed,
    even_power,
    load_decays,
    load_tile,
    monomials,
    place_head,
    rounded_by_given,
    row_of,
    store_tile,
)


@triton.jit(do_not_specialize=["q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h", "v_row", "heads", "group", "blocks",
                               "chunks", "first_chunk", "x_chunks", "x_first", "slots", "first_slot", "length", "n_keys",
                               "size", "row", "scale"])  # fmt: skip
def power_out_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, x_ptr, since_ptr, variables_ptr, coefficients_ptr, state_ptr, out_ptr, exact_ptr, total_ptr,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row,
    heads, group, blocks, chunks, first_chunk, x_chunks, x_first, slots, first_slot, length, n_keys, size, row, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, DEGREE: tl.constexpr,
    ENTRIES: tl.constexpr, COUNT: tl.constexpr, SLOT: tl.constexpr,
    ALIGNED: tl.constexpr, GATES: tl.constexpr, PAIRS: tl.constexpr, STATE: tl.constexpr, FIRST_STATE: tl.constexpr,
    KEEP: tl.constexpr, EXACT: tl.constexpr,
    WIDE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and total of BLOCK_T queries (docs/theory.md, Eq. 30).  Grid: (B * H * chunks * blocks of a chunk,).

    PAIRS: there are keys. STATE: some chunk has a state before it; FIRST_STATE: the first one too. KEEP: total is stored;
    EXACT: the result before it is rounded too. WIDE: weights and monomials keep the digits of float32.
    x (columns of scaled queries) begins with chunk x_first, the states of a head with that before chunk `first_chunk`.
    PRECISION and ROUNDED: of products of float32, and of those of weights with values.
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

    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    row = row_of(row)
    if STATE:
        entries_here = tl.where((chunk > 0) | FIRST_STATE, ENTRIES, 0)
        head_x = x_ptr + (of_head * x_chunks + (chunk - x_first)) * row * HEAD_DIM
        state_ptr += (of_kv * slots + (first_slot + chunk - first_chunk)) * SLOT
        totals = tl.zeros((BLOCK_T, 16), tl.float32)
        for first in range(0, entries_here, BLOCK_P):
            entries = first + tl.arange(0, BLOCK_P)
            c = tl.load(coefficients_ptr + entries)
            sums = load_tile(state_ptr, entries, VALUE_DIM, entries < ENTRIES, VALUE_DIM, BLOCK_V) * c[:, None]
            norm = tl.load(state_ptr + ENTRIES * VALUE_DIM + entries, mask=entries < ENTRIES, other=0.0) * c
            m = monomials(head_x, row, variables_ptr, entries[None, :], rows[:, None], -1, DEGREE, COUNT)
            acc = computed_by_computed(m, sums, acc, SPLIT, PRECISION)
            totals = computed_by_given(m, as_columns(norm, SPLIT > 0), totals, SPLIT, PRECISION)
        total = tl.sum(totals, axis=1)
        if GATES:
            since = tl.load(since_ptr + of_kv * n_keys + start + rows, mask=inside, other=0.0)
            acc *= since[:, None]
            total *= since
    if PAIRS:
        head_q, q_row = place_head(q_ptr, batch, head, q_b, q_h, q_row, ALIGNED)
        k_ptr, k_row = place_head(k_ptr, batch, kv_head, k_b, k_h, k_row, ALIGNED)
        v_ptr, v_row = place_head(v_ptr, batch, kv_head, v_b, v_h, v_row, ALIGNED)
        q = load_tile(head_q, query, q_row, inside, HEAD_DIM, BLOCK_D)
        g_ptr += of_kv * 2 * n_keys + start
        high_q, low_q = load_decays(g_ptr, n_keys, rows, inside, GATES)
        for first in range(0, tl.minimum(end, (block + 1) * BLOCK_T), BLOCK_N):
            keys = first + tl.arange(0, BLOCK_N)
            there = keys < end
            k = load_tile(k_ptr, start + keys, k_row, there, HEAD_DIM, BLOCK_D)
            v = load_tile(v_ptr, start + keys, v_row, there, VALUE_DIM, BLOCK_V)
            high_k, low_k = load_decays(g_ptr, n_keys, keys, there, GATES)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            w = decayed(even_power(s, DEGREE), (high_q[:, None], low_q[:, None]), (high_k[None, :], low_k[None, :]), GATES)
            if first + BLOCK_N > block * BLOCK_T:
                w = tl.where(keys[None, :] <= rows[:, None], w, 0.0)
            total += tl.sum(w, axis=1)
            if WIDE:
                acc = computed_by_given(w, v, acc, 3, PRECISION)
            else:
                acc = rounded_by_given(w, v, acc, ROUNDED)
    out = tl.where((total == 0.0)[:, None], 0.0, acc / tl.where(total == 0.0, 1.0, total)[:, None])
    out = tl.where((total == float("inf"))[:, None], float("nan"), out)
    store_tile(out_ptr + of_head * length * VALUE_DIM, out, query, inside, VALUE_DIM, BLOCK_V)
    if EXACT:
        store_tile(exact_ptr + of_head * length * VALUE_DIM, out, query, inside, VALUE_DIM, BLOCK_V)
    if KEEP:
        tl.store(total_ptr + of_head * length + query, total, mask=inside)
