"""Forward for few long rows, each split over several programs, so that one row fills the device.

The host never waits: the number of launches is fixed. The first finds the largest score, the second the sums for the first
iterate, then one launch per expected iterate passes on partial sums. Then one program per row ends the solver (and iterates
alone if the row is still unsolved), and the last launch writes the weights. All programs of a row add the partial sums in the
same order, so all get the same bits, in every run.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import load_e, load_exponent, place, row_starts, whole_vectors
from diffmax.kernels.triton.common.numerics import expm1_of, finishing, first_iterate, next_iterate, unsolved
from diffmax.kernels.triton.rows.stream import solve_alone
from diffmax.kernels.triton.rows.tiles import largest_of_tiles, solver_sums, start_sums, store_weights

# sums_ptr: (stage, row, 3, CHUNKS), of which `chunks` are used. state_ptr: (stage, row, 3): delta, its lower bound, solved.


@triton.jit
def whose(pid, chunks, tiles, size_1, size_2):
    """The offset of the program's row, its index, its chunk, and the tiles of the chunk."""
    index_0, index_1, rows = place(pid // chunks, size_1, size_2, 1)
    per_chunk = tl.cdiv(tiles, chunks)
    chunk = pid % chunks
    first = chunk * per_chunk
    return index_0, index_1, rows, (pid // chunks).to(tl.int64), chunk, first, tl.minimum(first + per_chunk, tiles)


@triton.jit
def add_up(sums_ptr, row, chunks, WHICH: tl.constexpr, CHUNKS: tl.constexpr):
    """One of the three sums of a row over all chunks, (1,)."""
    lanes = tl.arange(0, CHUNKS)
    parts = tl.load(sums_ptr + (row * 3 + WHICH) * CHUNKS + lanes, mask=lanes < chunks, other=0.0)
    return tl.zeros((1,), parts.dtype) + tl.sum(parts, axis=0)


@triton.jit
def largest(chunk_tops_ptr, row, chunks, CHUNKS: tl.constexpr):
    """The largest score of a row, (1,)."""
    lanes = tl.arange(0, CHUNKS)
    tops = tl.load(chunk_tops_ptr + row * CHUNKS + lanes, mask=lanes < chunks, other=-float("inf"))
    return tl.zeros((1,), tops.dtype) + tl.max(tops, axis=0)


@triton.jit
def put_sums(sums_ptr, row, chunk, first, second, third, CHUNKS: tl.constexpr):
    """Store a program's part of the three sums."""
    lane = tl.arange(0, 1)
    tl.store(sums_ptr + (row * 3 + 0) * CHUNKS + chunk + lane, first)
    tl.store(sums_ptr + (row * 3 + 1) * CHUNKS + chunk + lane, second)
    tl.store(sums_ptr + (row * 3 + 2) * CHUNKS + chunk + lane, third)


@triton.jit(do_not_specialize=["x_0", "x_1", "x_2", "x_col", "n", "size_1", "size_2", "chunks"])
def split_top_kernel(
    x_ptr, tops_ptr, chunk_tops_ptr,
    x_0, x_1, x_2, x_col, n, size_1, size_2, chunks,
    X_LAYOUT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The largest score of each tile and of each chunk.  Grid: (rows * chunks,)."""
    ACC: tl.constexpr = tops_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, X_LAYOUT, VECTOR)
    tiles = tl.cdiv(n, BLOCK)
    index_0, index_1, rows, row, chunk, first, last = whose(tl.program_id(0), chunks, tiles, size_1, size_2)
    start = row_starts(index_0, index_1, rows, x_0, x_1, x_2, X_LAYOUT, VECTOR)
    m = largest_of_tiles(x_ptr, start, first, last, n, x_col, tops_ptr + row * tiles, ACC, X_LAYOUT, BLOCK)
    tl.store(chunk_tops_ptr + row * CHUNKS + chunk + tl.arange(0, 1), m)


@triton.jit(do_not_specialize=["x_0", "x_1", "x_2", "x_col", "e_0", "e_1", "e_2", "n", "size_1", "size_2", "chunks",
                               "e", "k", "e_bits"])  # fmt: skip
def split_start_kernel(
    x_ptr, e_ptr, tops_ptr, chunk_tops_ptr, sums_ptr,
    x_0, x_1, x_2, x_col, e_0, e_1, e_2, n, size_1, size_2, chunks,
    e, k, e_bits,
    X_LAYOUT: tl.constexpr, E_TENSOR: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The part of each chunk in the sums for the first iterate, stored as stage 0.  Grid: (rows * chunks,)."""
    ACC: tl.constexpr = tops_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, X_LAYOUT, VECTOR)
    tiles = tl.cdiv(n, BLOCK)
    index_0, index_1, rows, row, chunk, first, last = whose(tl.program_id(0), chunks, tiles, size_1, size_2)
    start = row_starts(index_0, index_1, rows, x_0, x_1, x_2, X_LAYOUT, VECTOR)
    e_start = index_0 * e_0 + index_1 * e_1 + rows.to(tl.int64) * e_2
    row_e = load_e(e_ptr, e, e_bits, e_start, rows < size_2, ACC, E_TENSOR, True)
    m = largest(chunk_tops_ptr, row, chunks, CHUNKS)
    z_sum, count = start_sums(x_ptr, start, first, last, n, x_col, tops_ptr + row * tiles, m, row_e, ACC, X_LAYOUT, BLOCK)
    put_sums(sums_ptr, row, chunk, z_sum, count, tl.zeros((1,), ACC), CHUNKS)


@triton.jit(do_not_specialize=["x_0", "x_1", "x_2", "x_col", "e_0", "e_1", "e_2", "n", "size_1", "size_2", "n_rows", "chunks",
                               "stage", "e", "k", "e_bits"])  # fmt: skip
def split_step_kernel(
    x_ptr, e_ptr, tops_ptr, chunk_tops_ptr, sums_ptr, state_ptr,
    x_0, x_1, x_2, x_col, e_0, e_1, e_2, n, size_1, size_2, n_rows, chunks, stage,
    e, k, e_bits,
    X_LAYOUT: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr, CUT: tl.constexpr,
    HARDWARE: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """From the sums of stage - 1, the iterate of `stage` and the part of each chunk in its sums.  Grid: (rows * chunks,)."""
    ACC: tl.constexpr = tops_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, X_LAYOUT, VECTOR)
    tiles = tl.cdiv(n, BLOCK)
    index_0, index_1, rows, row, chunk, first, last = whose(tl.program_id(0), chunks, tiles, size_1, size_2)
    start = row_starts(index_0, index_1, rows, x_0, x_1, x_2, X_LAYOUT, VECTOR)
    e_start = index_0 * e_0 + index_1 * e_1 + rows.to(tl.int64) * e_2
    row_e, row_k = load_exponent(e_ptr, e, k, e_bits, e_start, rows < size_2, ACC, E_TENSOR)
    m = largest(chunk_tops_ptr, row, chunks, CHUNKS)
    size = n.to(ACC)
    high = -expm1_of(-row_e * tl.log(size))
    before_sums = sums_ptr + (stage - 1).to(tl.int64) * n_rows * 3 * CHUNKS
    own_sums = sums_ptr + stage.to(tl.int64) * n_rows * 3 * CHUNKS
    lane = tl.arange(0, 1)
    before = state_ptr + ((stage - 1).to(tl.int64) * n_rows + row) * 3 + lane
    own = state_ptr + (stage.to(tl.int64) * n_rows + row) * 3 + lane

    total = add_up(before_sums, row, chunks, 0, CHUNKS)
    slope = add_up(before_sums, row, chunks, 1, CHUNKS)
    curve = add_up(before_sums, row, chunks, 2, CHUNKS)
    if FIRST:
        delta = tl.minimum(first_iterate(total, slope, row_e), high)
        low = delta
        solved = tl.zeros((1,), tl.int32)
    else:
        old, old_low = tl.load(before), tl.load(before + 1)
        solved = ((tl.load(before + 2) > 0.0) | (unsolved(total, slope, curve, old, row_e, row_k, size, CUT) == 0)).to(tl.int32)
        delta, low = next_iterate(old, old_low, high, total, slope, curve, row_e, row_k, True)
        delta = tl.where(solved > 0, old, delta)
        low = tl.where(solved > 0, old_low, low)
    if chunk == 0:
        tl.store(own, delta)
        tl.store(own + 1, low)
        tl.store(own + 2, solved.to(ACC))
    if tl.max(solved, axis=0) > 0:
        part = before_sums + row * 3 * CHUNKS + chunk + lane
        put_sums(own_sums, row, chunk, tl.load(part), tl.load(part + CHUNKS), tl.load(part + 2 * CHUNKS), CHUNKS)
    else:
        total, slope, curve = solver_sums(
            x_ptr, start, first, last, n, x_col, tops_ptr + row * tiles, m, row_e, row_k, delta,
            ACC, K, HARDWARE, PTX, X_LAYOUT, BLOCK,
        )  # fmt: skip
        put_sums(own_sums, row, chunk, total, slope, curve, CHUNKS)


@triton.jit(do_not_specialize=["x_0", "x_1", "x_2", "x_col", "e_0", "e_1", "e_2", "n", "size_1", "size_2", "n_rows", "chunks",
                               "stage", "e", "k", "e_bits", "newton_steps"])  # fmt: skip
def split_finish_kernel(
    x_ptr, m_ptr, delta_ptr, e_ptr, tops_ptr, chunk_tops_ptr, sums_ptr, state_ptr, ends_ptr,
    x_0, x_1, x_2, x_col, e_0, e_1, e_2, n, size_1, size_2, n_rows, chunks, stage,
    e, k, e_bits, newton_steps,
    X_LAYOUT: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr, ENSURE_SUM_ONE: tl.constexpr, CUT: tl.constexpr,
    HARDWARE: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """End the solver from the sums of `stage`: m and delta, and delta, step and scale for the weights.  Grid: (rows,)."""
    ACC: tl.constexpr = m_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, X_LAYOUT, VECTOR)
    tiles = tl.cdiv(n, BLOCK)
    index_0, index_1, rows, row, _, _, _ = whose(tl.program_id(0), 1, tiles, size_1, size_2)
    start = row_starts(index_0, index_1, rows, x_0, x_1, x_2, X_LAYOUT, VECTOR)
    e_start = index_0 * e_0 + index_1 * e_1 + rows.to(tl.int64) * e_2
    row_e, row_k = load_exponent(e_ptr, e, k, e_bits, e_start, rows < size_2, ACC, E_TENSOR)
    m = largest(chunk_tops_ptr, row, chunks, CHUNKS)
    size = n.to(ACC)
    high = -expm1_of(-row_e * tl.log(size))
    sums_ptr += stage.to(tl.int64) * n_rows * 3 * CHUNKS
    lane = tl.arange(0, 1)
    state = state_ptr + (stage.to(tl.int64) * n_rows + row) * 3 + lane
    delta, low = tl.load(state), tl.load(state + 1)
    total = add_up(sums_ptr, row, chunks, 0, CHUNKS)
    slope = add_up(sums_ptr, row, chunks, 1, CHUNKS)
    curve = add_up(sums_ptr, row, chunks, 2, CHUNKS)
    delta, total, slope, curve = solve_alone(
        x_ptr, start, tiles, n, x_col, tops_ptr + row * tiles, m, row_e, row_k, delta, low, high, total, slope, curve,
        newton_steps, ACC, K, CUT, HARDWARE, PTX, X_LAYOUT, BLOCK,
    )  # fmt: skip
    step, scale, final = finishing(delta, total, slope, curve, row_e, row_k, size, CUT, ENSURE_SUM_ONE)
    tl.store(m_ptr + row + lane, m)
    tl.store(delta_ptr + row + lane, final)
    ends = ends_ptr + row * 3 + lane
    tl.store(ends, delta)
    tl.store(ends + 1, step)
    tl.store(ends + 2, scale)


@triton.jit(do_not_specialize=["x_0", "x_1", "x_2", "x_col", "p_0", "p_1", "p_2", "p_col", "e_0", "e_1", "e_2", "n", "size_1",
                               "size_2", "chunks", "e", "k", "e_bits"])  # fmt: skip
def split_write_kernel(
    x_ptr, p_ptr, m_ptr, e_ptr, tops_ptr, ends_ptr,
    x_0, x_1, x_2, x_col, p_0, p_1, p_2, p_col, e_0, e_1, e_2, n, size_1, size_2, chunks,
    e, k, e_bits,
    X_LAYOUT: tl.constexpr, P_LAYOUT: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr,
    HARDWARE: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights of a chunk.  Grid: (rows * chunks,)."""
    ACC: tl.constexpr = m_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    n = whole_vectors(n, X_LAYOUT, VECTOR)
    tiles = tl.cdiv(n, BLOCK)
    index_0, index_1, rows, row, _, first, last = whose(tl.program_id(0), chunks, tiles, size_1, size_2)
    start = row_starts(index_0, index_1, rows, x_0, x_1, x_2, X_LAYOUT, VECTOR)
    p_start = row_starts(index_0, index_1, rows, p_0, p_1, p_2, P_LAYOUT, VECTOR)
    e_start = index_0 * e_0 + index_1 * e_1 + rows.to(tl.int64) * e_2
    row_e, row_k = load_exponent(e_ptr, e, k, e_bits, e_start, rows < size_2, ACC, E_TENSOR)
    lane = tl.arange(0, 1)
    m = tl.load(m_ptr + row + lane)
    ends = ends_ptr + row * 3 + lane
    store_weights(
        x_ptr, start, p_ptr, p_start, first, last, n, x_col, p_col, tops_ptr + row * tiles, m, row_e, row_k,
        tl.load(ends), tl.load(ends + 1), tl.load(ends + 2),
        ACC, K, HARDWARE, PTX, X_LAYOUT, P_LAYOUT, BLOCK,
    )  # fmt: skip
