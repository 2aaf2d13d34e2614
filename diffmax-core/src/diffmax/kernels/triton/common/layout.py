"""Offsets of a program's rows: the program's index, alignment hints for the compiler, e per row."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import bounded_e

STRIDED = tl.constexpr(0)
COLUMNS = tl.constexpr(1)  # the entries of a row are adjacent
ROWS_ADJACENT = tl.constexpr(2)  # the rows of a program are adjacent
ALIGNED = tl.constexpr(3)  # like COLUMNS, and start and length of every row are multiples of 16 bytes


@triton.jit
def place(pid, size_1, size_2, ROWS: tl.constexpr):
    """Indices into the two outer dimensions, and the program's rows in the innermost one."""
    blocks = tl.cdiv(size_2, ROWS)
    index_0, index_1 = pid * 0, pid * 0
    if pid >= blocks:  # divisions take as long as a step of the solver
        outer = pid // blocks
        index_0, index_1 = outer // size_1, outer % size_1
        pid = pid % blocks
    return index_0.to(tl.int64), index_1.to(tl.int64), pid * ROWS + tl.arange(0, ROWS)


@triton.jit
def vector_multiple(size, IS_MULTIPLE: tl.constexpr, VECTOR: tl.constexpr):
    """`size`, with the hint that it is a multiple of VECTOR, a power of two from 2 to 16 or 64, if IS_MULTIPLE."""
    SHIFT: tl.constexpr = 6 if VECTOR == 64 else 4 if VECTOR == 16 else 3 if VECTOR == 8 else 2 if VECTOR == 4 else 1
    tl.static_assert(1 << SHIFT == VECTOR)
    if IS_MULTIPLE:
        return (size >> SHIFT) * VECTOR
    else:
        return size


@triton.jit
def whole_vectors(size, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """`size`, with the hint that it is a multiple of VECTOR if the layout guarantees it."""
    return vector_multiple(size, LAYOUT == ALIGNED, VECTOR)


@triton.jit
def row_starts(index_0, index_1, rows, stride_0, stride_1, stride_2, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """Offset of the first entry of each row, int64, in elements."""
    base = index_0 * stride_0 + index_1 * stride_1
    rows = rows.to(tl.int64)
    if LAYOUT == ROWS_ADJACENT:
        return base + rows
    else:
        return whole_vectors(base, LAYOUT, VECTOR) + rows * whole_vectors(stride_2, LAYOUT, VECTOR)


@triton.jit
def columns(cols, stride, LAYOUT: tl.constexpr):
    """Offset of entries in their row."""
    if LAYOUT == COLUMNS or LAYOUT == ALIGNED:  # noqa: SIM109  (Triton knows no tuples of constants)
        return cols
    else:
        return cols.to(tl.int64) * stride


@triton.jit
def load_e(e_ptr, e, e_bits, offsets, in_rows, ACC: tl.constexpr, E_TENSOR: tl.constexpr, CHECKED: tl.constexpr):
    """e = 1 - alpha of each row. A float is passed as float32, for float64 as its bits (float arguments are float32)."""
    if E_TENSOR:
        return bounded_e(tl.load(e_ptr + offsets, mask=in_rows, other=1.0).to(ACC), CHECKED)
    elif ACC == tl.float64:  # noqa: SIM300  (ACC is no constant to Python)
        return tl.zeros(in_rows.shape, ACC) + e_bits.to(tl.float64, bitcast=True)
    else:
        return tl.zeros(in_rows.shape, ACC) + e


@triton.jit
def load_exponent(e_ptr, e, k, e_bits, offsets, in_rows, ACC: tl.constexpr, E_TENSOR: tl.constexpr):
    """e, checked, and k = 1/e of each row."""
    row_e = load_e(e_ptr, e, e_bits, offsets, in_rows, ACC, E_TENSOR, True)
    if E_TENSOR or tl.float64 == ACC:
        return row_e, 1.0 / row_e
    else:
        return row_e, tl.zeros(in_rows.shape, ACC) + k


@triton.jit
def head_exponent(e_ptr, e, k, head, E_TENSOR: tl.constexpr, CHECKED: tl.constexpr):
    """e and k of one or several heads of attention, in float32; the same for all heads if e is a float."""
    if E_TENSOR:
        head_e = bounded_e(tl.load(e_ptr + head).to(tl.float32), CHECKED)
        return head_e, 1.0 / head_e
    else:
        return e, k
