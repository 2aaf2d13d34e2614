"""Passes over a part of a long row, tile by tile. A dead tile, known by its largest score, is not loaded again."""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import columns
from diffmax.kernels.triton.common.numerics import START_CUT, powers, scaled_scores, weights, weights_at


@triton.jit
def load_tile(x_ptr, start, first, n, x_col, ACC: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """(1, BLOCK) scores from column `first` on, -inf beyond the row."""
    cols = first + tl.arange(0, BLOCK)
    return tl.load((x_ptr + start + columns(cols, x_col, LAYOUT))[None, :], mask=(cols < n)[None, :], other=-float("inf")).to(
        ACC
    )


@triton.jit
def largest_of_tiles(
    x_ptr, start, first_tile, last_tile, n, x_col, tops_ptr,
    ACC: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the largest score of each tile at tops_ptr, +inf for a tile with NaN; return the largest of all, (1,)."""
    m = tl.full((1,), -float("inf"), ACC)
    for tile in range(first_tile, last_tile):
        x = load_tile(x_ptr, start, tile * BLOCK, n, x_col, ACC, LAYOUT, BLOCK)
        top = tl.max(tl.where(x != x, float("inf"), x), axis=1)
        tl.store(tops_ptr + tile + tl.arange(0, 1), top)
        m = tl.maximum(m, top)
    return m


@triton.jit
def start_sums(
    x_ptr, start, first_tile, last_tile, n, x_col, tops_ptr, m, e,
    ACC: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum and number, each (1,), of the entries for `first_iterate`."""
    z_sum = tl.zeros((1, BLOCK), ACC)
    count = tl.zeros((1, BLOCK), ACC)
    for tile in range(first_tile, last_tile):
        top = scaled_scores(tl.load(tops_ptr + tile + tl.arange(0, 1))[:, None], m, e)
        if tl.max(top) > START_CUT:
            z = scaled_scores(load_tile(x_ptr, start, tile * BLOCK, n, x_col, ACC, LAYOUT, BLOCK), m, e)
            near = z > START_CUT
            z_sum += tl.where(near, z, 0.0)
            count += near.to(ACC)
    return tl.sum(z_sum, axis=1), tl.sum(count, axis=1)


@triton.jit
def solver_sums(
    x_ptr, start, first_tile, last_tile, n, x_col, tops_ptr, m, e, k, delta,
    ACC: tl.constexpr, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S, S_1 and the sum of [z - t]^(k-2) over the tiles, each (1,)."""
    total = tl.zeros((1, BLOCK), ACC)
    slope = tl.zeros((1, BLOCK), ACC)
    curve = tl.zeros((1, BLOCK), ACC)
    for tile in range(first_tile, last_tile):
        top = scaled_scores(tl.load(tops_ptr + tile + tl.arange(0, 1))[:, None], m, e)
        # written so that NaN counts as live
        if tl.max((top - delta[:, None] <= -1.0).to(tl.int32)) == 0:
            z = scaled_scores(load_tile(x_ptr, start, tile * BLOCK, n, x_col, ACC, LAYOUT, BLOCK), m, e)
            b, r = powers(z, delta, k, K, HARDWARE, PTX)
            slopes = r * b
            total += slopes * b
            slope += slopes
            curve += r
    return tl.sum(total, axis=1), tl.sum(slope, axis=1), tl.sum(curve, axis=1)


@triton.jit
def store_weights(
    x_ptr, start, p_ptr, p_start, first_tile, last_tile, n, x_col, p_col, tops_ptr, m, e, k, delta, step, scale,
    ACC: tl.constexpr, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr,
    LAYOUT: tl.constexpr, P_LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weights of the tiles; a dead tile is not read."""
    last_delta = delta + tl.minimum(step, 0.0)
    for tile in range(first_tile, last_tile):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        p = tl.zeros((1, BLOCK), ACC) * scale[:, None]  # NaN if the row is NaN
        top = scaled_scores(tl.load(tops_ptr + tile + tl.arange(0, 1))[:, None], m, e)
        if tl.max((top - last_delta[:, None] <= -1.0).to(tl.int32)) == 0:
            z = scaled_scores(load_tile(x_ptr, start, tile * BLOCK, n, x_col, ACC, LAYOUT, BLOCK), m, e)
            if (K > 0 and K != 10) or HARDWARE > 0:
                p = weights_at(z, tl.maximum(delta + step, 0.0), k, scale, K, PTX)
            else:
                _, r = powers(z, delta, k, K, HARDWARE, PTX)
                p = weights(z, delta, r, k, step, scale, K > 0)
        p_ptrs = (p_ptr + p_start + columns(cols, p_col, P_LAYOUT))[None, :]
        tl.store(p_ptrs, p.to(p_ptr.dtype.element_ty), mask=(cols < n)[None, :])
