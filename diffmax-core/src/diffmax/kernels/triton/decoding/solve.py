"""Fourth launch of decoding: tau of each row, by a program of its own.

On the lists where they hold every candidate; else by a second step from the guess. The last launch says whether it was enough.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.numerics import (
    HALLEY_STEPS,
    HARDWARE_NONE,
    next_iterate,
    scaled_scores,
    sums_at,
    unsolved,
    with_sink,
)
from diffmax.kernels.triton.decoding.tiles import (
    COUNT,
    LISTED,
    STEPPED_SUMS,
    exponents,
    first_step,
    read_slot,
    slot,
    step_from,
    whose,
)


@triton.jit(do_not_specialize=["new", "room", "kv_heads", "group", "length", "blocks", "splits", "steps", "e", "k"])
def kvcache_solve_kernel(
    seqlens_ptr, places_ptr, e_ptr, sink_ptr, work_ptr, lists_ptr, state_ptr,
    new, room, kv_heads, group, length, blocks, splits, steps, e, k,
    PLACES: tl.constexpr, HAS_SINK: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr, CUT: tl.constexpr,
    PTX: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """m and delta of a row.  Grid: (blocks of rows, rows of a block)."""
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1) + tl.arange(0, 1)
    _b, _kv_head, _held, head, _query, _there, span = whose(
        block, row, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES, BLOCK_M
    )
    _opens, _begin, end = span
    row_e, row_k = exponents(e_ptr, e, k, head, E_TENSOR)
    zero = tl.zeros((1,), tl.float32)
    sink = zero - float("inf")
    if HAS_SINK:
        sink = tl.load(sink_ptr + head)
    m, low, stepped = first_step(work_ptr, block, row, splits, sink, row_e, row_k, HAS_SINK, K, PTX, BLOCK_M, SPLITS)
    again, _ = step_from(
        work_ptr, block, STEPPED_SUMS, row, splits, stepped, low, sink, m, row_e, row_k, HAS_SINK, K, PTX, BLOCK_M, SPLITS
    )
    size = zero + end.to(tl.float32)
    whole = tl.max(read_slot(work_ptr, block, COUNT, row, splits, 0.0, BLOCK_M, SPLITS), axis=1) <= LISTED
    places = tl.arange(0, LISTED * SPLITS)[None, :]
    entry, lane = places // SPLITS, places % SPLITS
    counts = tl.load(slot(work_ptr, block, COUNT, row, BLOCK_M, SPLITS) + lane, mask=lane < splits, other=0.0)
    held = whole[:, None] & (entry < counts)
    at = ((block * LISTED + entry) * BLOCK_M + row[:, None]) * SPLITS + lane
    z = scaled_scores(tl.load(lists_ptr + at, mask=held, other=-float("inf")), m, row_e)
    delta, floor, step = low, low, 0
    going = tl.max(whole.to(tl.int32), axis=0)
    while (going > 0) & (step < steps):
        total, slopes, curve = sums_at(z, delta, row_k, K, HARDWARE_NONE, PTX)
        if HAS_SINK:
            total, slopes, curve = with_sink(total, slopes, curve, sink, m, delta, row_e, row_k, K, HARDWARE_NONE, PTX)
        far = whole & unsolved(total, slopes, curve, delta, row_e, row_k, size, CUT)
        going = tl.max(far.to(tl.int32), axis=0)
        bends = far & (step < HALLEY_STEPS)
        total, slopes = tl.where(far, total, 1.0), tl.where(far, slopes, 1.0)
        moved_to, lifted = next_iterate(delta, floor, zero + 1.0, total, slopes, curve, row_e, row_k, bends)
        delta, floor = tl.where(far, moved_to, delta), tl.where(far, lifted, floor)
        step += 1
    tl.store(state_ptr + block * 2 * BLOCK_M + row, m)
    tl.store(state_ptr + (block * 2 + 1) * BLOCK_M + row, tl.where(whole, delta, again))
