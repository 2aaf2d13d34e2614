"""Backward for rows that fit into registers: each input is read once, each output is written once."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import columns, load_e, place, row_starts, whole_vectors
from diffmax.kernels.triton.common.numerics import alpha_weight
from diffmax.kernels.triton.rows.gradient import slopes


@triton.jit(do_not_specialize=["n", "size_1", "size_2", "g_0", "g_1", "g_2", "g_col", "p_0", "p_1", "p_2", "p_col",
                               "e_0", "e_1", "e_2", "e", "e_bits"])  # fmt: skip
def bisect_bwd_rows_kernel(
    g_ptr, p_ptr, x_ptr, m_ptr, delta_ptr, e_ptr, grad_x_ptr, grad_e_ptr,  # x only if FROM_X
    g_0, g_1, g_2, g_col, p_0, p_1, p_2, p_col, e_0, e_1, e_2,  # x and grad_x have the strides of p
    n, size_1, size_2,
    e, e_bits,
    G_LAYOUT: tl.constexpr, P_LAYOUT: tl.constexpr, E_TENSOR: tl.constexpr, FROM_X: tl.constexpr,
    NEEDS_E: tl.constexpr, PTX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients for x (Eq. 3) and, per row, for e (Eq. 4).  Grid: (size_0 * size_1 * cdiv(size_2, ROWS),)."""
    ACC: tl.constexpr = m_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // p_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, P_LAYOUT, VECTOR)
    index_0, index_1, rows = place(tl.program_id(0), size_1, size_2, ROWS)
    cols = tl.arange(0, BLOCK)
    in_rows = rows < size_2
    inside = in_rows[:, None] & (cols < n)[None, :]
    at_p = (
        row_starts(index_0, index_1, rows, p_0, p_1, p_2, P_LAYOUT, VECTOR)[:, None] + columns(cols, p_col, P_LAYOUT)[None, :]
    )
    at_g = (
        row_starts(index_0, index_1, rows, g_0, g_1, g_2, G_LAYOUT, VECTOR)[:, None] + columns(cols, g_col, G_LAYOUT)[None, :]
    )
    p = tl.load(p_ptr + at_p, mask=inside, other=0.0).to(ACC)
    g = tl.load(g_ptr + at_g, mask=inside, other=0.0).to(ACC)
    e_starts = index_0 * e_0 + index_1 * e_1 + rows.to(tl.int64) * e_2
    row_e = load_e(e_ptr, e, e_bits, e_starts, in_rows, ACC, E_TENSOR, False)
    places = (index_0 * size_1 + index_1) * size_2 + rows
    x, m, delta = p, row_e, row_e
    if FROM_X:
        x = tl.load(x_ptr + at_p, mask=inside, other=-float("inf")).to(ACC)
        m = tl.load(m_ptr + places, mask=in_rows, other=0.0)
        delta = tl.load(delta_ptr + places, mask=in_rows, other=0.0)

    weight, s, log_p = slopes(p, x, m, delta, row_e, FROM_X, VECTOR == 8, PTX)
    total = tl.sum(s, axis=1)
    mean = tl.sum(s * g, axis=1) / tl.where(total == 0.0, 1.0, total)
    centred = g - mean[:, None]
    tl.store(grad_x_ptr + at_p, (s * centred).to(grad_x_ptr.dtype.element_ty), mask=inside)
    if NEEDS_E:
        w = alpha_weight(weight, log_p, row_e, PTX)
        tl.store(grad_e_ptr + places, -tl.sum(w * centred, axis=1), mask=in_rows)
