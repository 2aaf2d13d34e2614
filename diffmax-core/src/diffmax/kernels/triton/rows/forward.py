"""Forward for rows that fit into registers: one read, the solver, one write."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import columns, load_exponent, place, row_starts, whole_vectors
from diffmax.kernels.triton.common.numerics import (
    HALLEY_STEPS,
    cheap_powers,
    expm1_of,
    finishing,
    first_iterate,
    next_iterate,
    powers,
    scaled_scores,
    sums,
    sums_near_top,
    unsolved,
    weights,
    weights_at,
)


@triton.jit(do_not_specialize=["n", "size_1", "size_2", "x_0", "x_1", "x_2", "x_col", "p_0", "p_1", "p_2", "p_col",
                               "e_0", "e_1", "e_2", "e", "k", "e_bits", "newton_steps"])  # fmt: skip
def bisect_rows_kernel(
    x_ptr, p_ptr, m_ptr, delta_ptr, e_ptr,
    x_0, x_1, x_2, x_col, p_0, p_1, p_2, p_col, e_0, e_1, e_2,  # in elements; two outer dimensions, the rows, the columns
    n, size_1, size_2,
    e, k, e_bits, newton_steps,
    X_LAYOUT: tl.constexpr, P_LAYOUT: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr,
    ENSURE_SUM_ONE: tl.constexpr, CUT: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """p, m and delta of ROWS rows of at most BLOCK entries.  Grid: (size_0 * size_1 * cdiv(size_2, ROWS),)."""
    ACC: tl.constexpr = m_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, X_LAYOUT, VECTOR)
    index_0, index_1, rows = place(tl.program_id(0), size_1, size_2, ROWS)
    cols = tl.arange(0, BLOCK)
    in_rows = rows < size_2
    inside = in_rows[:, None] & (cols < n)[None, :]
    starts = row_starts(index_0, index_1, rows, x_0, x_1, x_2, X_LAYOUT, VECTOR)
    x = tl.load(x_ptr + starts[:, None] + columns(cols, x_col, X_LAYOUT)[None, :], mask=inside, other=-float("inf")).to(ACC)
    e_starts = index_0 * e_0 + index_1 * e_1 + rows.to(tl.int64) * e_2
    row_e, row_k = load_exponent(e_ptr, e, k, e_bits, e_starts, in_rows, ACC, E_TENSOR)

    m = tl.max(x, axis=1)
    z = scaled_scores(x, m, row_e)
    LOGARITHM: tl.constexpr = 0 if HARDWARE == 1 else HARDWARE
    CHEAP: tl.constexpr = K > 0 or LOGARITHM > 0
    z_sum, count = sums_near_top(z)
    delta = first_iterate(z_sum, count, row_e)
    size = n.to(ACC)
    high = -expm1_of(-row_e * tl.log(size))  # delta <= 1 - n^-e, Eq. 7
    delta = tl.minimum(delta, high)
    low = delta

    if CHEAP or HARDWARE == 1:
        first_b, r = cheap_powers(z, delta, row_k, K, PTX)
    else:
        first_b, r = powers(z, delta, row_k, K, LOGARITHM, PTX)
    total, slope, curve = sums(first_b, r)
    if HARDWARE == 1:  # these sums are accurate enough for a step, but not for weights
        going = total > 0.0
    else:
        going = unsolved(total, slope, curve, delta, row_e, row_k, size, CUT)
    steps = 0
    while (tl.max(going.to(tl.int32), axis=0) > 0) & (steps < newton_steps + HALLEY_STEPS):
        moved, lower = next_iterate(delta, low, high, total, slope, curve, row_e, row_k, steps < HALLEY_STEPS)
        if HARDWARE == 1:
            lower = tl.where(steps == 0, low, lower)  # the first sums are not exact enough to certify a bound
        low = tl.where(going, lower, low)
        stuck = moved == delta
        delta = tl.where(going, moved, delta)
        if CHEAP:
            b, r = cheap_powers(z, delta, row_k, K, PTX)
        else:
            b, r = powers(z, delta, row_k, K, LOGARITHM, PTX)
        total, slope, curve = sums(b, r)
        going = unsolved(total, slope, curve, delta, row_e, row_k, size, CUT) & going & (stuck == 0)
        steps += 1

    step, scale, final = finishing(delta, total, slope, curve, row_e, row_k, size, CUT, ENSURE_SUM_ONE)
    if CHEAP and K != 10:
        p = weights_at(z, final, row_k, scale, K, PTX)
    else:
        if not KEEP:
            _, r = powers(z, delta, row_k, K, LOGARITHM, PTX)
        p = weights(z, delta, r, row_k, step, scale, CHEAP)
    starts = row_starts(index_0, index_1, rows, p_0, p_1, p_2, P_LAYOUT, VECTOR)
    p_ptrs = p_ptr + starts[:, None] + columns(cols, p_col, P_LAYOUT)[None, :]
    tl.store(p_ptrs, p.to(p_ptr.dtype.element_ty), mask=inside)
    places = (index_0 * size_1 + index_1) * size_2 + rows
    tl.store(m_ptr + places, m, mask=in_rows)
    tl.store(delta_ptr + places, final, mask=in_rows)
