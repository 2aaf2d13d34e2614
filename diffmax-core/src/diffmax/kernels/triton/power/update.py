"""What the tokens of a chunk add to a state: sums over them of monomials times values, and of monomials."""

import triton
import triton.language as tl

from diffmax.kernels.triton.power.tiles import as_columns, computed_by_given, monomials, place_head, row_of


@triton.jit(do_not_specialize=["v_b", "v_h", "v_row", "kv_heads", "group", "chunks", "first_chunk", "x_chunks", "x_first",
                               "slots", "first_slot", "length", "before", "size", "row"])  # fmt: skip
def power_update_kernel(
    x_ptr, v_ptr, factor_ptr, weight_ptr, variables_ptr, coefficients_ptr, state_ptr,
    v_b, v_h, v_row,
    kv_heads, group, chunks, first_chunk, x_chunks, x_first, slots, first_slot, length, before, size, row,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, DEGREE: tl.constexpr,
    ENTRIES: tl.constexpr, COUNT: tl.constexpr, SLOT: tl.constexpr,
    ALIGNED: tl.constexpr, FACTOR: tl.constexpr, QUERIES: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """state[e] = sum_t m_e(x_t) factor_t [v_t, weight_t].  Grid: (B * H_kv * chunks * tiles of monomials * blocks of values,).

    Token t of `length` ones has the position t + before, `size` positions are a chunk, and `slots` states lie in memory for a
    head: that of chunk `first_chunk` is `first_slot`. x begins with chunk x_first. QUERIES: x are scaled queries and v the
    gradients for results, in all heads of a group; monomials have coefficients. Otherwise weights are 1. FACTOR: or 1 too.
    """
    TILES: tl.constexpr = (ENTRIES + BLOCK_P - 1) // BLOCK_P
    VALUES: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    index = tl.program_id(0)
    values, tile = index % VALUES, index // VALUES % TILES
    chunk, head = index // (VALUES * TILES) % chunks, (index // (VALUES * TILES) // chunks).to(tl.int64)
    batch, kv_head = head // kv_heads, head % kv_heads
    start = (first_chunk + chunk) * size
    low, high = tl.maximum(start, before), tl.minimum(start + size, before + length)
    end = tl.where(high > low, high - start, 0)

    row = row_of(row)
    entries = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = values * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_P, BLOCK_V), tl.float32)
    norms = tl.zeros((BLOCK_P, 16), tl.float32)
    for member in range(group):
        own = head * group + member
        head_v, step = place_head(v_ptr, batch, kv_head * group + member, v_b, v_h, v_row, ALIGNED)
        head_x = x_ptr + (own * x_chunks + (first_chunk + chunk - x_first)) * row * HEAD_DIM
        for first in range((low - start) // BLOCK_T * BLOCK_T, end, BLOCK_T):
            tokens = first + tl.arange(0, BLOCK_T)
            token = start - before + tokens
            inside = (token >= 0) & (tokens < end)
            m = monomials(head_x, row, variables_ptr, entries[:, None], tokens[None, :], -1, DEGREE, COUNT)
            if FACTOR:
                m *= tl.load(factor_ptr + own * length + token, mask=inside, other=0.0)[None, :]
            mask = inside[:, None]
            if VALUE_DIM % BLOCK_V != 0:
                mask = mask & (columns < VALUE_DIM)[None, :]
            v = tl.load(head_v + token.to(tl.int64)[:, None] * step + columns[None, :], mask=mask, other=0.0)
            acc = computed_by_given(m, v, acc, PARTS, PRECISION)
            weight = tl.full((BLOCK_T,), 1.0, tl.float32)
            if QUERIES:
                weight = tl.load(weight_ptr + own * length + token, mask=inside, other=0.0)
            norms = computed_by_given(m, as_columns(weight, v.dtype == tl.bfloat16), norms, PARTS, PRECISION)
    norm = tl.sum(norms, axis=1)
    if QUERIES:
        c = tl.load(coefficients_ptr + entries)
        acc *= c[:, None]
        norm *= c
    state_ptr += (head * slots + first_slot + chunk) * SLOT
    mask = (entries < ENTRIES)[:, None] & (columns < VALUE_DIM)[None, :]
    tl.store(state_ptr + entries.to(tl.int64)[:, None] * VALUE_DIM + columns[None, :], acc, mask=mask)
    tl.store(state_ptr + ENTRIES * VALUE_DIM + entries, norm, mask=(entries < ENTRIES) & (values == 0))
