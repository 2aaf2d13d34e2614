"""Gradient for an additive bias, summed over the broadcast dimensions.

A program holds a tile of the bias and loops over all tiles of scores that it is added to.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.gradient import KEYS, as_column, load_values, place_values, range_of, recompute
from diffmax.kernels.triton.attention.scores import products, rules_of
from diffmax.kernels.triton.attention.tiles import TILE, WORD, keys_of_rows, position_shift, row_ptr
from diffmax.kernels.triton.common.layout import head_exponent, vector_multiple
from diffmax.kernels.triton.common.scores import keep_mask


@triton.jit(do_not_specialize=["g_b", "g_h", "g_row", "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h",
                               "v_row", "mask_b", "mask_h", "mask_row", "mask_key", "bias_b", "bias_h", "bias_row",
                               "bias_key", "alibi_b", "heads", "group", "length", "n_keys", "n_tiles", "n_words", "n_places",
                               "bias_heads", "row_blocks", "key_blocks", "batches_each", "heads_each", "rows_each",
                               "keys_each", "scale", "e", "k", "left", "right", "softcap", "threshold",
                               "inverse_keep"])  # fmt: skip
def attention_bwd_dbias_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, values_ptr, live_ptr,  # values (see `QueryValues`), live and the result are contiguous
    e_ptr, mask_ptr, bias_ptr, alibi_ptr, seed_ptr,  # each only where a flag says so
    grad_bias_ptr,
    g_b, g_h, g_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row,
    mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b,
    heads, group, length, n_keys, n_tiles, n_words, n_places,
    bias_heads, row_blocks, key_blocks,  # sizes of the bias: 1 where it is broadcast
    batches_each, heads_each, rows_each, keys_each,  # what the tile is added to: batch entries, heads, blocks of rows, of keys
    scale, e, k, left, right, softcap, threshold, inverse_keep,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
    DROPOUT: tl.constexpr,
    LIVE: tl.constexpr, E_TENSOR: tl.constexpr, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,
    K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sum of dS.  Grid: (bias batches * bias_heads * row_blocks * key_blocks,). BLOCK_M and BLOCK_N divide TILE."""
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    VECTOR: tl.constexpr = 128 // q_ptr.dtype.element_ty.primitive_bitwidth
    index = tl.program_id(0)
    key_block = index % key_blocks
    row_block = index // key_blocks % row_blocks
    bias_head = index // key_blocks // row_blocks % bias_heads
    bias_batch = index // key_blocks // row_blocks // bias_heads
    q_row, k_row = vector_multiple(q_row, ALIGNED, VECTOR), vector_multiple(k_row, ALIGNED, VECTOR)
    v_row, g_row = vector_multiple(v_row, ALIGNED, VECTOR), vector_multiple(g_row, ALIGNED, VECTOR)
    shift = position_shift(length, n_keys, OPTIONS.LOWER_RIGHT)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(batches_each * heads_each * rows_each * keys_each):
        first_key = (key_block * keys_each + step % keys_each) * BLOCK_N
        first = (row_block * rows_each + step // keys_each % rows_each) * BLOCK_M
        head = bias_head * heads_each + step // keys_each // rows_each % heads_each
        batch = bias_batch * batches_each + step // keys_each // rows_each // heads_each
        batch_wide, head_wide, kv_wide = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
        of_head = batch_wide * heads + head
        low, high = keys_of_rows(first, length, n_keys, shift, left, right, BLOCK_M, OPTIONS.WINDOW)
        meets = (first_key < high) & (first_key + BLOCK_N > low)
        if LIVE:
            tile = first_key // TILE
            bits = tl.load(live_ptr + (of_head * n_tiles + first // TILE) * n_words + tile // WORD)
            meets = meets & (((bits >> (tile % WORD)) & 1) != 0)
        if meets:
            rows, keys = first + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
            head_e, head_k = head_exponent(e_ptr, e, k, head, E_TENSOR, False)
            rules = rules_of(
                batch_wide, head_wide, shift, length, n_keys, mask_ptr, bias_ptr, alibi_ptr,
                mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b, left, right, scale, softcap,
                OPTIONS,
            )  # fmt: skip
            head_q = row_ptr(q_ptr, batch_wide, head_wide, 0, q_b, q_h, q_row, ALIGNED)
            head_g = row_ptr(g_ptr, batch_wide, head_wide, 0, g_b, g_h, g_row, ALIGNED)
            head_key = row_ptr(k_ptr, batch_wide, kv_wide, 0, k_b, k_h, k_row, ALIGNED)
            head_v = row_ptr(v_ptr, batch_wide, kv_wide, 0, v_b, v_h, v_row, ALIGNED)
            head_values, planes = place_values(values_ptr, of_head, 0, 0, n_places)
            values = load_values(head_values, planes, first, BLOCK_M, HARDWARE)
            heard, values = (values.shift != float("inf")) & (rows < length), as_column(values)
            seen = range_of(first, left - shift, right + shift, n_keys, BLOCK_M, OPTIONS.WINDOW)
            d_p = products(
                head_g, first, rows < length, g_row, head_v, first_key, keys < n_keys, v_row,
                PRECISION, BLOCK_M, BLOCK_N, VALUE_DIM, BLOCK_V, min(CHUNK, BLOCK_V),
            )  # fmt: skip
            x = products(
                head_q, first, rows < length, q_row, head_key, first_key, keys < n_keys, k_row,
                PRECISION, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, min(CHUNK, BLOCK_D),
            )  # fmt: skip
            _, s, _, mean, _ = recompute(
                x, rows[:, None], keys[None, :], seen, first_key, KEYS, BLOCK_N, values, rules, head_e, head_k,
                OPTIONS, False, K, HARDWARE, PTX,
            )  # fmt: skip
            if DROPOUT:
                keep = keep_mask(seed_ptr, rows[:, None], keys[None, :], batch * heads + head, threshold)
                d_p = tl.where(keep, d_p * inverse_keep, 0.0)
            acc += tl.where(heard[:, None], s * (d_p - mean), 0.0)

    rows, keys = row_block * BLOCK_M + tl.arange(0, BLOCK_M), key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    bias_at = bias_batch.to(tl.int64) * bias_heads + bias_head
    if ONE_ROW and ONE_KEY:
        tl.store(grad_bias_ptr + bias_at, tl.sum(acc))
    elif ONE_ROW:
        tl.store(grad_bias_ptr + bias_at * n_keys + keys, tl.sum(acc, axis=0), mask=keys < n_keys)
    elif ONE_KEY:
        tl.store(grad_bias_ptr + bias_at * length + rows, tl.sum(acc, axis=1), mask=rows < length)
    else:
        offsets = (bias_at * length + rows[:, None]) * n_keys + keys[None, :]
        tl.store(grad_bias_ptr + offsets, acc, mask=(rows < length)[:, None] & (keys < n_keys)[None, :])
