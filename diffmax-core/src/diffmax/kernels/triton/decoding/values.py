"""Fifth launch of decoding: each split's part of the sums, and of the output, from the values of keys that have a weight."""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from diffmax.kernels.triton.common.numerics import once
from diffmax.kernels.triton.decoding.tiles import (
    SUMS,
    SUPPORT,
    exponents,
    load_tile,
    rows_of,
    stretch,
    tokens_of,
    weights_of,
    whose,
    write_slot,
    write_sums,
)


@triton.jit
def times_values(weights, values):
    """weights @ values: the weights as two numbers of the values' dtype, so that no digit of theirs is lost."""
    if values.dtype == tl.float32:
        return tl.dot(weights, values, input_precision="ieee")
    else:
        coarse = weights.to(values.dtype)
        return tl.dot(coarse, values) + tl.dot((weights - coarse.to(tl.float32)).to(values.dtype), values)


@triton.jit(do_not_specialize=[
    "table_b", "new", "room", "page_size", "parts", "kv_heads", "group", "length",
    "blocks", "splits", "most_tiles", "left", "e", "k",
])  # fmt: skip
def kvcache_values_kernel(
    v_ptr, seqlens_ptr, places_ptr, table_ptr, e_ptr,
    tops_ptr, scores_ptr, work_ptr, state_ptr, partial_ptr, filled_ptr,
    v_b, v_s, v_h, v_d, table_b,
    new, room, page_size, parts, kv_heads, group, length, blocks, splits, most_tiles, left,
    e, k,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PAGED: tl.constexpr, HAS_NEW: tl.constexpr, PLACES: tl.constexpr,
    WINDOW: tl.constexpr, E_TENSOR: tl.constexpr, K: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """partial (block, split, 2, BLOCK_M, BLOCK_V) where `filled`, and the sums.  Grid: as the first launch."""
    MOVE: tl.constexpr = "mov.f32 $0, $1;" if PTX else "v_mov_b32 $0, $1" if is_hip() else None
    REGISTERS: tl.constexpr = "=f,f" if PTX else "=v,v"
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    b, kv_head, held, head, _query, in_rows, span = whose(
        block, rows, seqlens_ptr, places_ptr, kv_heads, group, length, blocks, new, room, PLACES, BLOCK_M
    )
    first, last = stretch(split, splits, span, length, left, page_size, parts, HAS_NEW, WINDOW)
    row_e, row_k = exponents(e_ptr, e, k, head, E_TENSOR)
    m = tl.load(state_ptr + block * 2 * BLOCK_M + rows, mask=in_rows, other=-float("inf"))
    delta = tl.load(state_ptr + (block * 2 + 1) * BLOCK_M + rows, mask=in_rows, other=0.0)
    out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    tilt = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)  # the same with the weights' slopes
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    slopes, curve, support = total, total, total
    filled = tl.full((), 0.0, tl.float32)
    tops_at = tops_ptr + block * most_tiles * BLOCK_M + rows
    top = tl.load(tops_at + first * BLOCK_M, mask=in_rows & (first < last), other=-float("inf"))
    for tile in range(first, last):
        # the next tile's is on its way while this one is worked on
        following = tl.load(tops_at + (tile + 1) * BLOCK_M, mask=in_rows & (tile + 1 < last), other=-float("inf"))
        base, r, alive = weights_of(
            scores_ptr, block, tile, rows, top, most_tiles, m, delta, row_e, row_k, K, PTX, BLOCK_M, BLOCK_N
        )
        if alive:
            filled += 1.0
            if E_TENSOR:
                base, r = once(base, MOVE, REGISTERS), once(r, MOVE, REGISTERS)
            s = r * base
            p = s * base
            total += p
            slopes += s
            curve += r
            support += (base > 0.0).to(tl.float32)
            place, there = tokens_of(tile, page_size, parts, span, BLOCK_N)
            wanted = there & (tl.max((base > 0.0).to(tl.int32), axis=0) > 0)
            at = rows_of(table_ptr, b, held, tile, place, parts, page_size, table_b, v_b, v_s, PAGED)
            values = load_tile(v_ptr, at, column, wanted, kv_head, v_h, v_d, VALUE_DIM)
            out += times_values(p, values)
            tilt += times_values(s, values)
        top = following
    write_sums(work_ptr, block, SUMS, split, total, slopes, curve, BLOCK_M, SPLITS)
    write_slot(work_ptr, block, SUPPORT, split, tl.sum(support, axis=1), BLOCK_M, SPLITS)
    tl.store(filled_ptr + block * splits + split, filled)
    if filled > 0.0:
        at = (((block * splits + split) * 2) * BLOCK_M + rows)[:, None] * BLOCK_V + column[None, :]
        tl.store(partial_ptr + at, out)
        tl.store(partial_ptr + at + BLOCK_M * BLOCK_V, tilt)
