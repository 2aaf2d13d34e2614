"""Gradients for keys and values.

A program holds a block of keys and loops over the live tiles of its column, for all query heads that share the keys.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.gradient import QUERIES, as_row, load_few, load_values, place_values, range_of, recompute
from diffmax.kernels.triton.attention.scores import products, rules_of
from diffmax.kernels.triton.attention.tiles import (
    TILE,
    WORD,
    bit_count,
    bits_between,
    bits_of_column,
    load_rows,
    locate_block,
    locate_other,
    position_shift,
    row_ptr,
    rows_inside,
    rows_of_keys,
    store_rows,
    walk,
)
from diffmax.kernels.triton.common.layout import head_exponent, vector_multiple
from diffmax.kernels.triton.common.scores import keep_mask, score_gradient


@triton.jit(do_not_specialize=["g_b", "g_h", "g_row", "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h",
                               "v_row", "mask_b", "mask_h", "mask_row", "mask_key", "bias_b", "bias_h", "bias_row",
                               "bias_key", "alibi_b", "heads", "group", "length", "n_keys", "n_sequences",
                               "max_keys", "n_blocks", "n_tiles", "n_words", "n_places", "scale", "e", "k", "left", "right",
                               "softcap", "threshold", "inverse_keep"])  # fmt: skip
def attention_bwd_dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, values_ptr, live_ptr,  # values (see `QueryValues`), live and all results are contiguous
    e_ptr, mask_ptr, bias_ptr, alibi_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,  # each only where a flag says so
    grad_k_ptr, grad_v_ptr,
    g_b, g_h, g_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row,
    mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b,
    heads, group, length, n_keys, n_sequences, max_keys, n_blocks, n_tiles, n_words, n_places,
    scale, e, k, left, right, softcap, threshold, inverse_keep,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
    DROPOUT: tl.constexpr,
    LIVE: tl.constexpr, SILENT: tl.constexpr, E_TENSOR: tl.constexpr,
    K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dK = scale * dS^T Q and dV = P^T dO, Eq. 5.  Grid: (B * H_kv * n_blocks,). BLOCK_M and BLOCK_N divide TILE.

    Tiles are keys by queries, so that products need no transposed weights. SILENT: queries may be silent for reasons other than
    their position; then NaN in them must not reach the products.
    """
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    VECTOR: tl.constexpr = 128 // q_ptr.dtype.element_ty.primitive_bitwidth
    index = tl.program_id(0)
    kv_heads = heads // group
    batch = index // n_blocks // kv_heads
    kv_head = index // n_blocks % kv_heads
    sequence, k_start, keys_here, first = locate_block(index % n_blocks, cu_k_ptr, n_sequences, n_keys, BLOCK_N, OPTIONS.PACKED)
    q_start, rows_here = locate_other(sequence, cu_q_ptr, n_sequences, length, OPTIONS.PACKED)
    keys_seen = keys_here
    if OPTIONS.PACKED:
        keys_seen = tl.minimum(keys_here, max_keys)
    shift = position_shift(rows_here, keys_seen, OPTIONS.LOWER_RIGHT)

    batch_wide, kv_wide = batch.to(tl.int64), kv_head.to(tl.int64)
    q_row, k_row = vector_multiple(q_row, ALIGNED, VECTOR), vector_multiple(k_row, ALIGNED, VECTOR)
    v_row, g_row = vector_multiple(v_row, ALIGNED, VECTOR), vector_multiple(g_row, ALIGNED, VECTOR)
    k_ptr = row_ptr(k_ptr, batch_wide, kv_wide, k_start, k_b, k_h, k_row, ALIGNED)
    v_ptr = row_ptr(v_ptr, batch_wide, kv_wide, k_start, v_b, v_h, v_row, ALIGNED)
    row_at = (batch_wide * kv_heads + kv_head) * n_keys + k_start

    keys = first + tl.arange(0, BLOCK_N)
    valid = rows_inside(first, keys_here, BLOCK_N)
    key = load_rows(k_ptr, first, valid, k_row, HEAD_DIM, BLOCK_N, BLOCK_D, HEAD_DIM == BLOCK_D)
    value = load_rows(v_ptr, first, valid, v_row, VALUE_DIM, BLOCK_N, BLOCK_V, VALUE_DIM == BLOCK_V)
    low, high = rows_of_keys(first, rows_here, keys_seen, shift, left, right, BLOCK_N, OPTIONS.WINDOW)
    high = tl.where(first < keys_seen, high, low)
    seen = range_of(first, right + shift, left - shift, rows_here, BLOCK_N, OPTIONS.WINDOW)
    # queries in range of some key: others may hold NaN
    first_wanted, end_wanted = 0, rows_here
    if OPTIONS.WINDOW:
        first_wanted, end_wanted = -right - shift, tl.minimum(rows_here, keys_seen - shift + left)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        head_wide = tl.cast(head, tl.int64)
        head_e, head_k = head_exponent(e_ptr, e, k, head, E_TENSOR, False)
        rules = rules_of(
            batch_wide, head_wide, shift, rows_here, keys_seen, mask_ptr, bias_ptr, alibi_ptr,
            mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b, left, right, scale, softcap,
            OPTIONS,
        )  # fmt: skip
        head_q = row_ptr(q_ptr, batch_wide, head_wide, q_start, q_b, q_h, q_row, ALIGNED)
        head_g = row_ptr(g_ptr, batch_wide, head_wide, q_start, g_b, g_h, g_row, ALIGNED)
        of_head = batch_wide * heads + head
        head_values, planes = place_values(values_ptr, of_head, q_start, sequence, n_places)
        head_live = live_ptr + (of_head * n_tiles + q_start // TILE + sequence) * n_words
        for word in range(low // (TILE * WORD), (high + TILE * WORD - 1) // (TILE * WORD)):
            bits = bits_between(word, low, high)
            if LIVE:
                key_word, key_bit = first // TILE // WORD, first // TILE % WORD
                row_tiles = (rows_here + TILE - 1) // TILE
                bits = bits & bits_of_column(head_live, word, key_word, key_bit, row_tiles, n_words)
            for step in range(bit_count(bits) * (TILE // BLOCK_M)):
                first_query, bits = walk(bits, word, step, BLOCK_M)
                rows = first_query + tl.arange(0, BLOCK_M)
                values = load_values(head_values, planes, first_query, BLOCK_M, HARDWARE)
                wanted = rows_inside(first_query, end_wanted, BLOCK_M)
                if OPTIONS.WINDOW:
                    wanted = wanted & (rows_inside(first_query, first_wanted, BLOCK_M) == 0)
                if SILENT:  # the tile waits for shift
                    wanted = wanted & (values.shift != float("inf"))
                q = load_few(head_q, first_query, wanted, q_row, HEAD_DIM, BLOCK_M, BLOCK_D, HEAD_DIM == BLOCK_D, PTX)
                g = load_few(head_g, first_query, wanted, g_row, VALUE_DIM, BLOCK_M, BLOCK_V, VALUE_DIM == BLOCK_V, PTX)
                values = as_row(values)
                if CHUNK < BLOCK_V:
                    d_p = products(
                        v_ptr, first, valid, v_row, head_g, first_query, wanted, g_row,
                        PRECISION, BLOCK_N, BLOCK_M, VALUE_DIM, BLOCK_V, CHUNK,
                    )  # fmt: skip
                else:
                    d_p = tl.dot(value, tl.trans(g), input_precision=PRECISION)
                if CHUNK < BLOCK_D:
                    x = products(
                        k_ptr, first, valid, k_row, head_q, first_query, wanted, q_row,
                        PRECISION, BLOCK_N, BLOCK_M, HEAD_DIM, BLOCK_D, CHUNK,
                    )  # fmt: skip
                else:
                    x = tl.dot(key, tl.trans(q), input_precision=PRECISION)
                b, s, _, mean, capped = recompute(
                    x, rows[None, :], keys[:, None], seen, first_query, QUERIES, BLOCK_M, values, rules, head_e, head_k,
                    OPTIONS, False, K, HARDWARE, PTX,
                )  # fmt: skip
                p = s * b
                if DROPOUT:
                    keep = keep_mask(seed_ptr, rows[None, :], keys[:, None], (batch + sequence) * heads + head, threshold)
                    p, d_p = tl.where(keep, p * inverse_keep, 0.0), tl.where(keep, d_p * inverse_keep, 0.0)
                acc_v = tl.dot(p.to(g.dtype), g, acc_v, input_precision=PRECISION)
                d_s = score_gradient(s * (d_p - mean), capped, rules, OPTIONS)
                acc_k = tl.dot(d_s.to(q.dtype), q, acc_k, input_precision=PRECISION)

    store_rows(
        grad_k_ptr + row_at * HEAD_DIM, acc_k * scale, first, valid, HEAD_DIM, HEAD_DIM, BLOCK_N, BLOCK_D, HEAD_DIM == BLOCK_D
    )
    store_rows(
        grad_v_ptr + row_at * VALUE_DIM, acc_v, first, valid, VALUE_DIM, VALUE_DIM, BLOCK_N, BLOCK_V, VALUE_DIM == BLOCK_V
    )
