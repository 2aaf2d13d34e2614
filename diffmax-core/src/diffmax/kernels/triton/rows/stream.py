"""Forward for rows that do not fit into registers, each streamed by one program."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import load_exponent, place, row_starts, whole_vectors
from diffmax.kernels.triton.common.numerics import (
    HALLEY_STEPS,
    expm1_of,
    finishing,
    first_iterate,
    next_iterate,
    unsolved,
)
from diffmax.kernels.triton.rows.tiles import largest_of_tiles, solver_sums, start_sums, store_weights


@triton.jit
def solve_alone(
    x_ptr, start, tiles, n, x_col, tops_ptr, m, e, k, delta, low, high, total, slope, curve, newton_steps,
    ACC: tl.constexpr, K: tl.constexpr, CUT: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Iterate from given sums until the row is solved: delta and its sums."""
    going = unsolved(total, slope, curve, delta, e, k, n.to(ACC), CUT)
    steps = 0
    while (tl.max(going.to(tl.int32), axis=0) > 0) & (steps < newton_steps + HALLEY_STEPS):
        moved, low = next_iterate(delta, low, high, total, slope, curve, e, k, steps < HALLEY_STEPS)
        stuck = moved == delta
        delta = moved
        total, slope, curve = solver_sums(
            x_ptr, start, 0, tiles, n, x_col, tops_ptr, m, e, k, delta, ACC, K, HARDWARE, PTX, LAYOUT, BLOCK
        )
        going = unsolved(total, slope, curve, delta, e, k, n.to(ACC), CUT) & (stuck == 0)
        steps += 1
    return delta, total, slope, curve


@triton.jit(do_not_specialize=["n", "size_1", "size_2", "x_0", "x_1", "x_2", "x_col", "p_0", "p_1", "p_2", "p_col",
                               "e_0", "e_1", "e_2", "e", "k", "e_bits", "newton_steps"])  # fmt: skip
def bisect_stream_kernel(
    x_ptr, p_ptr, m_ptr, delta_ptr, e_ptr, tops_ptr,  # tops: scratch, (rows, tiles)
    x_0, x_1, x_2, x_col, p_0, p_1, p_2, p_col, e_0, e_1, e_2,
    n, size_1, size_2,
    e, k, e_bits, newton_steps,
    X_LAYOUT: tl.constexpr, P_LAYOUT: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr,
    ENSURE_SUM_ONE: tl.constexpr, CUT: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p, m and delta of one row.  Grid: (rows,)."""
    ACC: tl.constexpr = m_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, X_LAYOUT, VECTOR)
    index_0, index_1, rows = place(tl.program_id(0), size_1, size_2, 1)
    row = (index_0 * size_1 + index_1) * size_2 + rows
    start = row_starts(index_0, index_1, rows, x_0, x_1, x_2, X_LAYOUT, VECTOR)
    p_start = row_starts(index_0, index_1, rows, p_0, p_1, p_2, P_LAYOUT, VECTOR)
    e_start = index_0 * e_0 + index_1 * e_1 + rows.to(tl.int64) * e_2
    row_e, row_k = load_exponent(e_ptr, e, k, e_bits, e_start, rows < size_2, ACC, E_TENSOR)
    tiles = tl.cdiv(n, BLOCK)
    tops_ptr += tl.program_id(0).to(tl.int64) * tiles

    m = largest_of_tiles(x_ptr, start, 0, tiles, n, x_col, tops_ptr, ACC, X_LAYOUT, BLOCK)
    tl.debug_barrier()  # other threads of the program read the tops
    z_sum, count = start_sums(x_ptr, start, 0, tiles, n, x_col, tops_ptr, m, row_e, ACC, X_LAYOUT, BLOCK)
    size = n.to(ACC)
    high = -expm1_of(-row_e * tl.log(size))
    delta = tl.minimum(first_iterate(z_sum, count, row_e), high)
    total, slope, curve = solver_sums(
        x_ptr, start, 0, tiles, n, x_col, tops_ptr, m, row_e, row_k, delta, ACC, K, HARDWARE, PTX, X_LAYOUT, BLOCK
    )
    delta, total, slope, curve = solve_alone(
        x_ptr, start, tiles, n, x_col, tops_ptr, m, row_e, row_k, delta, delta, high, total, slope, curve, newton_steps,
        ACC, K, CUT, HARDWARE, PTX, X_LAYOUT, BLOCK,
    )  # fmt: skip
    step, scale, final = finishing(delta, total, slope, curve, row_e, row_k, size, CUT, ENSURE_SUM_ONE)
    store_weights(
        x_ptr, start, p_ptr, p_start, 0, tiles, n, x_col, p_col, tops_ptr, m, row_e, row_k, delta, step, scale,
        ACC, K, HARDWARE, PTX, X_LAYOUT, P_LAYOUT, BLOCK,
    )  # fmt: skip
    tl.store(m_ptr + row, m)
    tl.store(delta_ptr + row, final)
