"""Backward for rows that do not fit into registers: two passes, by one program per row or by one per chunk and launch."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import columns, load_e, row_starts, whole_vectors
from diffmax.kernels.triton.common.numerics import alpha_weight
from diffmax.kernels.triton.rows.gradient import slopes
from diffmax.kernels.triton.rows.split import whose


@triton.jit
def load_tiles(
    g_ptr, p_ptr, x_ptr, g_start, p_start, first, n, g_col, p_col, m, delta, e,
    FROM_X: tl.constexpr, PTX: tl.constexpr, G_LAYOUT: tl.constexpr, P_LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(1, BLOCK) tiles from column `first` on: the gradient, the weights, s and log2 p."""
    cols = first + tl.arange(0, BLOCK)
    inside = (cols < n)[None, :]
    at_p = (p_start + columns(cols, p_col, P_LAYOUT))[None, :]
    g = tl.load(g_ptr + (g_start + columns(cols, g_col, G_LAYOUT))[None, :], mask=inside, other=0.0).to(e.dtype)
    p = tl.load(p_ptr + at_p, mask=inside, other=0.0).to(e.dtype)
    x = p
    if FROM_X:
        x = tl.load(x_ptr + at_p, mask=inside, other=-float("inf")).to(e.dtype)
    SHORT: tl.constexpr = 128 // p_ptr.dtype.element_ty.primitive_bitwidth == 8  # Triton 3.2 compares no bitwidth
    weight, s, log_p = slopes(p, x, m, delta, e, FROM_X, SHORT, PTX)
    return g, weight, s, log_p


@triton.jit(do_not_specialize=["n", "size_1", "size_2", "chunks", "g_0", "g_1", "g_2", "g_col", "p_0", "p_1", "p_2", "p_col",
                               "e_0", "e_1", "e_2", "e", "e_bits"])  # fmt: skip
def bisect_bwd_long_kernel(
    g_ptr, p_ptr, x_ptr, m_ptr, delta_ptr, e_ptr, grad_x_ptr, grad_e_ptr, sums_ptr,  # sums: scratch, (rows, 2, CHUNKS)
    g_0, g_1, g_2, g_col, p_0, p_1, p_2, p_col, e_0, e_1, e_2,
    n, size_1, size_2, chunks,
    e, e_bits,
    G_LAYOUT: tl.constexpr, P_LAYOUT: tl.constexpr, E_TENSOR: tl.constexpr, FROM_X: tl.constexpr,
    NEEDS_E: tl.constexpr, PTX: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SUMS: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of a row.  Grid: (rows * chunks,).

    With one chunk per row a program does both passes; with more, a launch with SUMS stores partial sums for one with WRITES.
    grad_e: (rows, CHUNKS), the part of each chunk.
    """
    ACC: tl.constexpr = m_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // p_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, P_LAYOUT, VECTOR)
    index_0, index_1, rows, row, chunk, first, last = whose(tl.program_id(0), chunks, tl.cdiv(n, BLOCK), size_1, size_2)
    g_start = row_starts(index_0, index_1, rows, g_0, g_1, g_2, G_LAYOUT, VECTOR)
    p_start = row_starts(index_0, index_1, rows, p_0, p_1, p_2, P_LAYOUT, VECTOR)
    e_start = index_0 * e_0 + index_1 * e_1 + rows.to(tl.int64) * e_2
    row_e = load_e(e_ptr, e, e_bits, e_start, rows < size_2, ACC, E_TENSOR, False)
    m, delta = row_e, row_e
    lane = tl.arange(0, 1)
    if FROM_X:
        m, delta = tl.load(m_ptr + row + lane), tl.load(delta_ptr + row + lane)

    total = tl.zeros((1,), ACC)
    product = tl.zeros((1,), ACC)
    if SUMS:
        s_sum = tl.zeros((1, BLOCK), ACC)
        sg_sum = tl.zeros((1, BLOCK), ACC)
        for tile in range(first, last):
            g, _, s, _ = load_tiles(
                g_ptr, p_ptr, x_ptr, g_start, p_start, tile * BLOCK, n, g_col, p_col, m, delta, row_e,
                FROM_X, PTX, G_LAYOUT, P_LAYOUT, BLOCK,
            )  # fmt: skip
            s_sum += s
            sg_sum += s * g
        total, product = tl.sum(s_sum, axis=1), tl.sum(sg_sum, axis=1)
        if not WRITES:
            tl.store(sums_ptr + row * 2 * CHUNKS + chunk + lane, total)
            tl.store(sums_ptr + (row * 2 + 1) * CHUNKS + chunk + lane, product)
    if WRITES:
        if not SUMS:
            lanes = tl.arange(0, CHUNKS)
            used = lanes < chunks
            total += tl.sum(tl.load(sums_ptr + row * 2 * CHUNKS + lanes, mask=used, other=0.0), axis=0)
            product += tl.sum(tl.load(sums_ptr + (row * 2 + 1) * CHUNKS + lanes, mask=used, other=0.0), axis=0)
        mean = product / tl.where(total == 0.0, 1.0, total)
        e_sum = tl.zeros((1, BLOCK), ACC)
        for tile in range(first, last):
            g, weight, s, log_p = load_tiles(
                g_ptr, p_ptr, x_ptr, g_start, p_start, tile * BLOCK, n, g_col, p_col, m, delta, row_e,
                FROM_X, PTX, G_LAYOUT, P_LAYOUT, BLOCK,
            )  # fmt: skip
            centred = g - mean[:, None]
            cols = tile * BLOCK + tl.arange(0, BLOCK)
            at_p = (p_start + columns(cols, p_col, P_LAYOUT))[None, :]
            tl.store(grad_x_ptr + at_p, (s * centred).to(grad_x_ptr.dtype.element_ty), mask=(cols < n)[None, :])
            if NEEDS_E:
                e_sum += alpha_weight(weight, log_p, row_e, PTX) * centred
        if NEEDS_E:
            tl.store(grad_e_ptr + row * CHUNKS + chunk + lane, -tl.sum(e_sum, axis=1))
