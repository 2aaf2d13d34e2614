"""Gradients per query: for the query, e and the sink.

A program holds a block of queries and loops over its live tiles.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.evaluation import partial_sums
from diffmax.kernels.triton.attention.gradient import (
    KEYS,
    as_column,
    base_of,
    load_few,
    place_values,
    range_of,
    recompute,
    slopes_of,
    store_values,
    values_of,
)
from diffmax.kernels.triton.attention.scores import products, rules_of
from diffmax.kernels.triton.attention.tiles import (
    TILE,
    WORD,
    bit_count,
    bits_between,
    keys_of_rows,
    load_rows,
    load_vector,
    locate_block,
    locate_other,
    position_shift,
    row_ptr,
    rows_inside,
    store_rows,
    walk,
)
from diffmax.kernels.triton.common.layout import head_exponent, vector_multiple
from diffmax.kernels.triton.common.scores import keep_mask, score_gradient


@triton.jit
def bits_of_rows(live_ptr, word, first_tile, n_tiles, n_words, TILES: tl.constexpr):
    """Bit i: whether key tile word * WORD + i is live for one of TILES query tiles. live_ptr: first words of the sequence."""
    bits = tl.load(live_ptr + first_tile.to(tl.int64) * n_words + word)
    for other in tl.static_range(1, TILES):
        tile = first_tile + other
        bits = bits | tl.load(live_ptr + tile.to(tl.int64) * n_words + word, mask=tile < n_tiles, other=0)
    return bits


@triton.jit(do_not_specialize=["g_b", "g_h", "g_row", "q_b", "q_h", "q_row", "k_b", "k_h", "k_row", "v_b", "v_h",
                               "v_row", "mask_b", "mask_h", "mask_row", "mask_key", "bias_b", "bias_h", "bias_row",
                               "bias_key", "alibi_b", "heads", "group", "length", "n_keys", "n_sequences",
                               "max_keys", "n_blocks", "n_tiles", "n_words", "n_places", "scale", "e", "k", "left", "right",
                               "softcap", "threshold", "inverse_keep"])  # fmt: skip
def attention_bwd_dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, m_ptr, delta_ptr, u_ptr, live_ptr,  # m, delta, u, live and all results are contiguous
    e_ptr, mask_ptr, bias_ptr, alibi_ptr, sink_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,  # each only where a flag says so
    grad_q_ptr, grad_e_ptr, grad_sink_ptr, values_ptr,  # values: for the other kernels, see `QueryValues`
    g_b, g_h, g_row, q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row,
    mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b,
    heads, group, length, n_keys, n_sequences, max_keys, n_blocks, n_tiles, n_words, n_places,
    scale, e, k, left, right, softcap, threshold, inverse_keep,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ALIGNED: tl.constexpr, OPTIONS: tl.constexpr,
    SINK: tl.constexpr, DROPOUT: tl.constexpr,
    LIVE: tl.constexpr, E_TENSOR: tl.constexpr, NEEDS_E: tl.constexpr, NEEDS_SINK: tl.constexpr,
    K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dQ = scale * dS K with dS = s (dP - mean), Eq. 5.  Grid: (B * H * n_blocks,).

    BLOCK_N divides TILE; BLOCK_M divides TILE or is a multiple of it. The last blocks run first: under causality they have the
    most work.
    """
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    FEW: tl.constexpr = E_TENSOR and PTX and BLOCK_D + BLOCK_V > 128  # then the compiler would spill
    VECTOR: tl.constexpr = 128 // q_ptr.dtype.element_ty.primitive_bitwidth
    index = tl.program_id(0)
    block = n_blocks - 1 - index % n_blocks
    batch = index // n_blocks // heads
    head = index // n_blocks % heads
    sequence, q_start, rows_here, first = locate_block(block, cu_q_ptr, n_sequences, length, BLOCK_M, OPTIONS.PACKED)
    k_start, keys_here = locate_other(sequence, cu_k_ptr, n_sequences, n_keys, OPTIONS.PACKED)
    if OPTIONS.PACKED:
        keys_here = tl.minimum(keys_here, max_keys)
    shift = position_shift(rows_here, keys_here, OPTIONS.LOWER_RIGHT)

    batch_wide, head_wide, kv_wide = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    q_row, k_row = vector_multiple(q_row, ALIGNED, VECTOR), vector_multiple(k_row, ALIGNED, VECTOR)
    v_row, g_row = vector_multiple(v_row, ALIGNED, VECTOR), vector_multiple(g_row, ALIGNED, VECTOR)
    q_ptr = row_ptr(q_ptr, batch_wide, head_wide, q_start, q_b, q_h, q_row, ALIGNED)
    g_ptr = row_ptr(g_ptr, batch_wide, head_wide, q_start, g_b, g_h, g_row, ALIGNED)
    k_ptr = row_ptr(k_ptr, batch_wide, kv_wide, k_start, k_b, k_h, k_row, ALIGNED)
    v_ptr = row_ptr(v_ptr, batch_wide, kv_wide, k_start, v_b, v_h, v_row, ALIGNED)
    of_head = batch_wide * heads + head
    row_at = of_head * length + q_start
    values_ptr, n_places = place_values(values_ptr, of_head, q_start, sequence, n_places)
    live_ptr += (of_head * n_tiles + q_start // TILE + sequence) * n_words

    e, k = head_exponent(e_ptr, e, k, head, E_TENSOR, False)
    rules = rules_of(
        batch_wide, head_wide, shift, rows_here, keys_here, mask_ptr, bias_ptr, alibi_ptr,
        mask_b, mask_h, mask_row, mask_key, bias_b, bias_h, bias_row, bias_key, alibi_b, left, right, scale, softcap, OPTIONS,
    )  # fmt: skip
    rows = first + tl.arange(0, BLOCK_M)
    m = load_vector(m_ptr + row_at, first, rows_here, BLOCK_M, -float("inf"))
    delta = load_vector(delta_ptr + row_at, first, rows_here, BLOCK_M, 0.0)
    # a spoilt query is not silent, whatever its m; with a sink m is finite, and silent queries are known only at the end
    heard = (m != -float("inf")) | (delta != delta)
    q = load_rows(q_ptr, first, heard, q_row, HEAD_DIM, BLOCK_M, BLOCK_D, HEAD_DIM == BLOCK_D)
    g = load_rows(g_ptr, first, heard, g_row, VALUE_DIM, BLOCK_M, BLOCK_V, VALUE_DIM == BLOCK_V)
    u = load_rows(u_ptr + row_at * VALUE_DIM, first, heard, VALUE_DIM, VALUE_DIM, BLOCK_M, BLOCK_V, VALUE_DIM == BLOCK_V)
    mean = tl.sum(g.to(tl.float32) * u.to(tl.float32), axis=1)
    of_rows = values_of(m, delta, heard, mean, e, K, HARDWARE)
    if not SINK:
        store_values(values_ptr, of_rows, n_places, first, rows_here, BLOCK_M, HARDWARE)
    values = as_column(of_rows)

    low, high = keys_of_rows(first, rows_here, keys_here, shift, left, right, BLOCK_M, OPTIONS.WINDOW)
    high = tl.where(first < rows_here, high, low)
    seen = range_of(first, left - shift, right + shift, keys_here, BLOCK_M, OPTIONS.WINDOW)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc_e = tl.zeros((BLOCK_M, PARTIAL), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for word in range(low // (TILE * WORD), (high + TILE * WORD - 1) // (TILE * WORD)):
        bits = bits_between(word, low, high)
        if LIVE:
            row_tiles = (rows_here + TILE - 1) // TILE
            bits = bits & bits_of_rows(live_ptr, word, first // TILE, row_tiles, n_words, (BLOCK_M + TILE - 1) // TILE)
        for step in range(bit_count(bits) * (TILE // BLOCK_N)):
            first_key, bits = walk(bits, word, step, BLOCK_N)
            keys = first_key + tl.arange(0, BLOCK_N)
            valid = rows_inside(first_key, keys_here, BLOCK_N)
            key = load_few(k_ptr, first_key, valid, k_row, HEAD_DIM, BLOCK_N, BLOCK_D, HEAD_DIM == BLOCK_D, FEW)
            if CHUNK < BLOCK_D or CHUNK < BLOCK_V:
                d_p = products(
                    g_ptr, first, heard, g_row, v_ptr, first_key, valid, v_row,
                    PRECISION, BLOCK_M, BLOCK_N, VALUE_DIM, BLOCK_V, min(CHUNK, BLOCK_V),
                )  # fmt: skip
                x = products(
                    q_ptr, first, heard, q_row, k_ptr, first_key, valid, k_row,
                    PRECISION, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, min(CHUNK, BLOCK_D),
                )  # fmt: skip
            else:
                value = load_few(v_ptr, first_key, valid, v_row, VALUE_DIM, BLOCK_N, BLOCK_V, VALUE_DIM == BLOCK_V, FEW)
                d_p = tl.dot(g, tl.trans(value), input_precision=PRECISION)
                x = tl.dot(q, tl.trans(key), input_precision=PRECISION)
            _, s, w, mean_here, capped = recompute(
                x, rows[:, None], keys[None, :], seen, first_key, KEYS, BLOCK_N, values, rules, e, k,
                OPTIONS, NEEDS_E, K, HARDWARE, PTX,
            )  # fmt: skip
            if SINK:
                total += tl.sum(s, axis=1)
            if DROPOUT:
                keep = keep_mask(seed_ptr, rows[:, None], keys[None, :], (batch + sequence) * heads + head, threshold)
                d_p = tl.where(keep, d_p * inverse_keep, 0.0)
            d_s = s * (d_p - mean_here)
            if NEEDS_E:
                acc_e += partial_sums(d_s * w, PARTIAL)
            acc = tl.dot(score_gradient(d_s, capped, rules, OPTIONS).to(key.dtype), key, acc, input_precision=PRECISION)

    acc_e = tl.sum(acc_e, axis=1)
    if SINK:
        heard = total != 0.0
        mean, acc_e = tl.where(heard, mean, 0.0), tl.where(heard, acc_e, 0.0)
        acc = tl.where(heard[:, None], acc, 0.0)
        base = base_of(tl.load(sink_ptr + head), 1.0, of_rows, e, K, HARDWARE)
        _, s, w = slopes_of(base, e, k, NEEDS_E, K, HARDWARE, PTX)
        if NEEDS_SINK:
            tl.store(grad_sink_ptr + row_at + rows, -s * mean, mask=rows < rows_here)
        if NEEDS_E:
            acc_e -= s * w * mean
        of_rows = values_of(m, delta, heard, mean, e, K, HARDWARE)
        store_values(values_ptr, of_rows, n_places, first, rows_here, BLOCK_M, HARDWARE)
    store_rows(
        grad_q_ptr + row_at * HEAD_DIM, acc * scale, first, rows < rows_here, HEAD_DIM, HEAD_DIM,
        BLOCK_M, BLOCK_D, HEAD_DIM == BLOCK_D,
    )  # fmt: skip
    if NEEDS_E:
        tl.store(grad_e_ptr + row_at + rows, -acc_e * k * k, mask=rows < rows_here)
