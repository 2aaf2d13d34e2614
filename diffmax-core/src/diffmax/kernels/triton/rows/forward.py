"""Forward for rows that fit into registers: one read, the solver, one write."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.launch import SMALLEST_E_FOR_HARDWARE
from diffmax.kernels.triton.common.layout import columns, load_exponent, place, row_starts, whole_vectors
from diffmax.kernels.triton.common.numerics import HALLEY_STEPS, HARDWARE_ALL, HARDWARE_FIRST, integer_power
from diffmax.kernels.triton.rows.steps import (
    base,
    centred,
    ends_far,
    evaluated,
    exact_weights,
    first_delta,
    is_far,
    is_unsolved,
    linear_weights,
    next_delta,
    power_less_one,
    sloped,
    spoilt,
)

# The largest |S - 1| from which 16-bit weights take a linear step; float16's backward computes them from delta
_FAR_BFLOAT16 = tl.constexpr(4e-3)
_FAR_FLOAT16 = tl.constexpr(1e-3)

_SMALLEST_E = tl.constexpr(SMALLEST_E_FOR_HARDWARE)

_MOST_EARLY_STEPS = tl.constexpr(3)


@triton.jit
def solved_exactly(
    y, e, k, size, high, newton_steps, K: tl.constexpr, ENSURE_SUM_ONE: tl.constexpr, CUT: tl.constexpr,
    HARDWARE: tl.constexpr, PTX: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Weights, and delta for the backward: steps until the remaining one can be taken as a linear step of the weights."""
    LOGARITHM: tl.constexpr = 0 if HARDWARE == 1 else HARDWARE
    delta, low = first_delta(y, e, high, K, PTX)
    r, total, slope, curve = evaluated(y, delta, e, k, K, HARDWARE, PTX)
    far, c = is_unsolved(total, slope, curve, delta, e, k, size, K, CUT, PTX)
    if HARDWARE == 1:  # these sums are accurate enough for steps, but neither for weights nor to certify a bound
        early = ends_far(total, slope, curve, e, k, K, CUT, PTX)
        early_steps = 0
        while (tl.max(early.to(tl.int32), axis=0) > 0) & (early_steps < _MOST_EARLY_STEPS):
            moved, _ = next_delta(delta, low, high, total, slope, curve, e, k, True, K, PTX)
            delta = tl.where(early, moved, delta)
            _, total, slope, curve = evaluated(y, delta, e, k, K, HARDWARE, PTX)
            early = ends_far(total, slope, curve, e, k, K, CUT, PTX) & early
            early_steps += 1
        far = total > 0.0
    going = far
    steps = 0
    while (tl.max(going.to(tl.int32), axis=0) > 0) & (steps < newton_steps + HALLEY_STEPS):
        moved, lower = next_delta(delta, low, high, total, slope, curve, e, k, steps < HALLEY_STEPS, K, PTX)
        if HARDWARE == 1:
            lower = tl.where(steps == 0, low, lower)
        low = tl.where(going, lower, low)
        stuck = moved == delta
        delta = tl.where(going, moved, delta)
        r, total, slope, curve = evaluated(y, delta, e, k, K, LOGARITHM, PTX)
        far, c = is_unsolved(total, slope, curve, delta, e, k, size, K, CUT, PTX)
        going = far & going & (stuck == 0)
        steps += 1

    # Division by the sum changes all weights by one factor, although the error is in the small ones: only for unsolved rows
    near = (far == 0) & (total > 0.0)
    step = tl.where(near, e * c, 0.0)
    scale = tl.zeros_like(total) + 1.0
    if ENSURE_SUM_ONE:
        scale = tl.where(near | (total == 0.0), 1.0, 1.0 / total)
    final = tl.where(total > 0.0, tl.maximum(delta + step, 0.0), 0.0)
    if K > 0 and K != 10:
        p = integer_power(base(y, e, tl.minimum(1.0 - delta - step, 1.0), PTX), K) * scale[:, None]
    else:
        if not KEEP:
            r, _, _, _ = evaluated(y, delta, e, k, K, LOGARITHM, PTX)
        p = exact_weights(y, delta, r, e, k, step, scale, K, PTX)
    return p, final


@triton.jit
def solved_to_16_bits(
    y, e, k, size, high, newton_steps, K: tl.constexpr, FAR: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Weights to 16 bits, and delta: one step (two for k = 2, where the first stands for the start), then slopes and S.

    From those the weights follow by a linear step; if S is far from 1, there are more steps.
    """
    delta, low = first_delta(y, e, high, K, PTX)
    for _ in tl.static_range(2 if K == 2 else 1):
        _, total, slope, curve = evaluated(y, delta, e, k, K, HARDWARE, PTX)
        moved, low = next_delta(delta, low, high, total, slope, curve, e, k, True, K, PTX)
        delta = tl.where(total > 0.0, moved, delta)
    slopes, total, slope = sloped(y, delta, e, k, K, HARDWARE, PTX)
    going, c = is_far(total, slope, e, k, size, K, FAR, PTX)
    steps = 0
    while (tl.max(going.to(tl.int32), axis=0) > 0) & (steps < newton_steps + HALLEY_STEPS):
        _, total, slope, curve = evaluated(y, delta, e, k, K, HARDWARE, PTX)
        moved, lower = next_delta(delta, low, high, total, slope, curve, e, k, steps < HALLEY_STEPS, K, PTX)
        low = tl.where(going, lower, low)
        stuck = moved == delta
        delta = tl.where(going, moved, delta)
        slopes, total, slope = sloped(y, delta, e, k, K, HARDWARE, PTX)
        far, c = is_far(total, slope, e, k, size, K, FAR, PTX)
        going = far & going & (stuck == 0)
        steps += 1

    c = tl.where(total > 0.0, c, 0.0)
    final = tl.where(total > 0.0, tl.maximum(delta + e * c, 0.0), 0.0)
    return linear_weights(y, delta, slopes, c, e, k, K, HARDWARE, PTX), final


@triton.jit
def solved(
    y, e, k, size, high, newton_steps, DTYPE: tl.constexpr, K: tl.constexpr, ENSURE_SUM_ONE: tl.constexpr, CUT: tl.constexpr,
    HARDWARE: tl.constexpr, PTX: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Weights of DTYPE, and delta for the backward."""
    if tl.float16 == DTYPE:
        return solved_to_16_bits(y, e, k, size, high, newton_steps, K, _FAR_FLOAT16, HARDWARE, PTX)
    elif tl.bfloat16 == DTYPE:
        return solved_to_16_bits(y, e, k, size, high, newton_steps, K, _FAR_BFLOAT16, HARDWARE, PTX)
    else:
        return solved_exactly(y, e, k, size, high, newton_steps, K, ENSURE_SUM_ONE, CUT, HARDWARE, PTX, KEEP)


@triton.jit(do_not_specialize=["n", "size_1", "size_2", "x_0", "x_1", "x_2", "x_col", "p_0", "p_1", "p_2", "p_col",
                               "e_0", "e_1", "e_2", "e", "k", "high", "e_bits", "newton_steps"])  # fmt: skip
def bisect_rows_kernel(
    x_ptr, p_ptr, m_ptr, delta_ptr, e_ptr,
    x_0, x_1, x_2, x_col, p_0, p_1, p_2, p_col, e_0, e_1, e_2,  # in elements; two outer dimensions, the rows, the columns
    n, size_1, size_2,
    e, k, high, e_bits, newton_steps,  # high: 1 - n^-e, Eq. 7
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

    m, y = centred(x)
    size = n.to(ACC)
    if E_TENSOR or tl.float64 == ACC:
        high = -power_less_one(size, row_e, PTX)
    else:
        high = tl.zeros_like(row_e) + high
    if E_TENSOR and tl.float32 == ACC:  # what a float e would choose, chosen where it is read
        QUICK: tl.constexpr = HARDWARE_ALL if VECTOR == 8 else HARDWARE_FIRST
        if tl.min(row_e, axis=0) >= _SMALLEST_E:
            p, final = solved(
                y, row_e, row_k, size, high, newton_steps, x_ptr.dtype.element_ty, K, ENSURE_SUM_ONE, CUT, QUICK, PTX, KEEP
            )
        else:
            p, final = solved(
                y, row_e, row_k, size, high, newton_steps, x_ptr.dtype.element_ty, K, ENSURE_SUM_ONE, CUT, HARDWARE, PTX, KEEP
            )
    else:
        p, final = solved(
            y, row_e, row_k, size, high, newton_steps, x_ptr.dtype.element_ty, K, ENSURE_SUM_ONE, CUT, HARDWARE, PTX, KEEP
        )
    poison = tl.where(spoilt(m) | (row_e != row_e), float("nan"), 0.0)
    p += poison[:, None]  # costs nothing where it is fused with a product
    final += poison
    starts = row_starts(index_0, index_1, rows, p_0, p_1, p_2, P_LAYOUT, VECTOR)
    p_ptrs = p_ptr + starts[:, None] + columns(cols, p_col, P_LAYOUT)[None, :]
    tl.store(p_ptrs, p.to(p_ptr.dtype.element_ty), mask=inside)
    places = (index_0 * size_1 + index_1) * size_2 + rows
    tl.store(m_ptr + places, m, mask=in_rows)
    tl.store(delta_ptr + places, final, mask=in_rows)
