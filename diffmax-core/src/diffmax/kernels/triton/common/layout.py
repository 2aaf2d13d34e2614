"""Where a program's rows lie: the program's number, offsets that the compiler knows to be aligned, e per row."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import checked_e

STRIDED = tl.constexpr(0)
COLUMNS = tl.constexpr(1)  # a row's entries are neighbours
ROWS_ADJACENT = tl.constexpr(2)  # the rows of a program are neighbours
ALIGNED = tl.constexpr(3)  # like COLUMNS, and every row starts at, and is, a multiple of 16 bytes


@triton.jit
def place(pid, size_1, size_2, ROWS: tl.constexpr):
    """Indices into the two outer dimensions, and the program's rows in the innermost one."""
    blocks = tl.cdiv(size_2, ROWS)
    outer = pid // blocks
    rows = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    return (outer // size_1).to(tl.int64), (outer % size_1).to(tl.int64), rows


@triton.jit
def whole_vectors(size, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """`size`, for the compiler a multiple of VECTOR where the layout promises it."""
    if LAYOUT == ALIGNED:
        return size // VECTOR * VECTOR
    else:
        return size


@triton.jit
def row_starts(index_0, index_1, rows, stride_0, stride_1, stride_2, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """Offset of each row's first entry, in int64 and in elements."""
    base = index_0 * stride_0 + index_1 * stride_1
    rows = rows.to(tl.int64)
    if LAYOUT == ROWS_ADJACENT:
        return base + rows
    else:
        return whole_vectors(base, LAYOUT, VECTOR) + rows * whole_vectors(stride_2, LAYOUT, VECTOR)


@triton.jit
def columns(cols, stride, LAYOUT: tl.constexpr):
    """Offset of entries within their row."""
    if LAYOUT == COLUMNS or LAYOUT == ALIGNED:  # noqa: SIM109  (Triton knows no tuples of constants)
        return cols
    else:
        return cols.to(tl.int64) * stride


@triton.jit
def load_e(e_ptr, e, k, e_bits, offsets, in_rows, ACC: tl.constexpr, E_TENSOR: tl.constexpr):
    """e = 1 - alpha and k = 1/e of each row. A float comes as float32, and for float64 as its bits (arguments are float32)."""
    if E_TENSOR:
        row_e = checked_e(tl.load(e_ptr + offsets, mask=in_rows, other=1.0).to(ACC))
        return row_e, 1.0 / row_e
    elif ACC == tl.float64:  # noqa: SIM300  (ACC is no constant to Python)
        row_e = tl.zeros(in_rows.shape, ACC) + e_bits.to(tl.float64, bitcast=True)
        return row_e, 1.0 / row_e
    else:
        zero = tl.zeros(in_rows.shape, ACC)
        return zero + e, zero + k
