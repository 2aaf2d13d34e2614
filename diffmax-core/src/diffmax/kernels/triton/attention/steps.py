"""Decisions of attention's forward for a block of queries: a start from a sample, the live tiles, and when to stop.

The largest score of a tile per query, stored in the first pass, determines for every later threshold whether the tile is dead.
Equations: docs/theory.md; the reasons for this order: docs/decisions/0055-attention-forward-on-a-gpu.md.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.evaluation import is_dead, larger_or_nan, level_at, sums_of
from diffmax.kernels.triton.attention.tiles import TILE, WORD
from diffmax.kernels.triton.common.numerics import START_CUT, expm1_of, first_iterate, next_iterate, overshoot

# Tiles whose largest scores are checked at a time
_AT_ONCE = tl.constexpr(32)
_BITS_AT_ONCE = tl.constexpr(128)

# From this k on, sums change smoothly as entries enter and leave them
_LARGE_K = tl.constexpr(5.0)


@triton.jit
def root_of_sample(
    x, m, high, e, k, unit, share, K: tl.constexpr, POWER: tl.constexpr, PTX: tl.constexpr, PARTIAL: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """The delta, relative to m, of a row whose other keys are like those in x. e, k and unit are scalars.

    share: the number of keys that each key of the sample represents. The result is an estimate, and certifies nothing.
    """
    x = x * unit - m[:, None]
    z = x * e
    near = z > START_CUT
    delta = first_iterate(tl.sum(tl.where(near, z, 0.0), axis=1) * share, tl.sum(near.to(tl.float32), axis=1) * share, e)
    delta = tl.minimum(delta, high)
    low = tl.zeros_like(delta)
    row_e, row_k = low + e, low + k
    for _ in tl.static_range(STEPS):
        parts = sums_of(x, level_at(m, delta, unit, e, POWER, True), k, K, POWER, PTX, PARTIAL)
        total, slope, curve = tl.sum(parts[0], axis=1), tl.sum(parts[1], axis=1), tl.sum(parts[2], axis=1)
        moved, bound = next_iterate(delta, low, high, total * share, slope * share, curve * share, row_e, row_k, True)
        usable = (total > 0.0) & (tl.abs(moved) < float("inf"))
        delta, low = tl.where(usable, moved, delta), tl.where(usable, bound, low)
    return delta


@triton.jit
def step_of_sample(total, slope, curve, delta, high, e, k, share):
    """One step from the `partial_sums` of a sample, each of whose keys represents `share` keys."""
    total, slope, curve = (tl.sum(total, axis=1) * share, tl.sum(slope, axis=1) * share, tl.sum(curve, axis=1) * share)
    moved, _low = next_iterate(delta, delta * 0.0 - float("inf"), high, total, slope, curve, e, k, True)
    return tl.where((total > 0.0) & (tl.abs(moved) < float("inf")), moved, delta)


@triton.jit
def tiles_of_sample(tiles, e):
    """How many tiles of keys, spread evenly, improve the estimate: one in 16. For a small k no estimate saves an evaluation."""
    count = tl.where(tiles >= 32, tl.minimum(tiles // 16, 8), 0)
    return tl.where(e * _LARGE_K <= 1.0, count, 0)


@triton.jit
def spread_keys(low, span, first, step):
    """Of 64 step positions, spread evenly over the `span` keys from `low` on, every step-th from the first on."""
    odd, parts = 2 * (first + step * tl.arange(0, TILE)) + 1, 2 * TILE * step
    # odd * span / parts without overflow of the int32 product
    return low + odd * (span // parts) + odd * (span % parts) // parts


@triton.jit
def list_live(tops_ptr, list_ptr, tiles, level, EXACT: tl.constexpr):
    """Write the list of tiles that hold a score above the threshold of some row; return its length. NaN keeps all tiles."""
    lanes = tl.arange(0, TILE)
    count = tiles * 0
    for first in range(0, tiles, _AT_ONCE):
        tile = first + tl.arange(0, _AT_ONCE)
        alive = _alive(tops_ptr, tile, tiles, lanes, level, EXACT).to(tl.int32)
        tl.store(list_ptr + count + tl.cumsum(alive, 0) - 1, tile, mask=alive > 0)
        count += tl.sum(alive)
    return count


@triton.jit
def tops_of(x, in_rows):
    """The largest score of each row of a tile, or NaN; -inf for rows that do not exist."""
    return tl.where(in_rows, tl.reduce(x, 1, larger_or_nan), -float("inf"))


@triton.jit
def rows_alive(top, level, EXACT: tl.constexpr):
    """1 for each row in which a tile with these largest scores has a nonzero weight, or NaN; else 0."""
    return (is_dead(top, level.m, level.t, level, EXACT) == 0).to(tl.int32)


@triton.jit
def list_set_bits(live_ptr, list_ptr, words, rows, ROWS: tl.constexpr):
    """Write the list of the bits that are set in one of the first `rows` rows of `live`, at most ROWS; return its length."""
    count = words * 0
    for first in range(0, words * WORD, _BITS_AT_ONCE):
        bit = first + tl.arange(0, _BITS_AT_ONCE)
        word = tl.load(live_ptr + bit // WORD, mask=(bit < words * WORD) & (rows > 0), other=0)
        for row in tl.static_range(1, ROWS):
            word |= tl.load(live_ptr + row * words + bit // WORD, mask=(bit < words * WORD) & (row < rows), other=0)
        is_set = (word >> (bit % WORD)) & 1
        tl.store(list_ptr + count + tl.cumsum(is_set, 0) - 1, bit, mask=is_set > 0)
        count += tl.sum(is_set)
    return count


@triton.jit
def store_live(tops_ptr, live_ptr, first_tile, tiles, words, level, wanted, EXACT: tl.constexpr):
    """Store the block's words of `live`, for key tiles first_tile, first_tile + 1, ...; all other bits are clear."""
    lanes = tl.arange(0, TILE)
    for word in range(0, words):
        bits = tl.arange(0, WORD)
        tile = word * WORD + bits - first_tile
        alive = _alive(tops_ptr, tile, tiles, lanes, level, EXACT).to(tl.int32)
        tl.store(live_ptr + word, tl.sum(alive << bits).to(tl.int32), mask=wanted)


@triton.jit
def _alive(tops_ptr, tile, tiles, lanes, level, EXACT: tl.constexpr):
    inside = (tile >= 0) & (tile < tiles)
    tops = tl.load(tops_ptr + tile[:, None] * TILE + lanes[None, :], mask=inside[:, None], other=-float("inf"))
    dead = is_dead(tops, level.m[None, :], level.t[None, :], level, EXACT)
    return (tl.min(dead.to(tl.int32), axis=1) == 0) & inside


@triton.jit
def good_enough(
    total, slope, delta, e, k, size, CUT: tl.constexpr, SUM: tl.constexpr, LINEAR: tl.constexpr
):  # fmt: skip
    """Whether the output from weights at this delta is accurate to rounding.

    LINEAR: the output gets the remaining linear step; U does not, so CUT bounds its error. Otherwise the output is divided by
    the sum, which leaves of its distance from 1 about a third, the part in which weights differ.
    """
    if LINEAR:
        return linear_suffices(total, slope, delta, e, k, size, CUT) | (total == 0.0)
    else:
        return (tl.abs(total - 1.0) <= SUM) | (total == 0.0)


@triton.jit
def linear_suffices(total, slope, delta, e, k, size, CUT: tl.constexpr):
    """Whether a linear step makes the weights accurate to rounding: their errors are of second order in the step.

    The sum of these errors is (S - 1)^2 / 2, times a factor of about 1. For k < 2 the slope of the weights is unbounded, and
    delta must be accurate to its last digits.
    """
    c = tl.abs(overshoot(total, slope))
    fine = (c <= CUT * (1.0 - delta)) & (tl.abs(total - 1.0) <= 2.0 * CUT)
    # to the right of the root, entries may be missing from the sums, each less than (e c)^k
    fine = fine & ((total >= 1.0) | (size * e * c * e * c <= 2.0 * CUT * CUT))
    return tl.where(k >= 2.0, fine, c <= 2.0 * CUT * CUT + 2.0**-23)


@triton.jit
def promises(total, slope, curve, delta, e, k, bends, CUT: tl.constexpr, SUM: tl.constexpr, LINEAR: tl.constexpr):
    """Whether the step from these sums is predicted to end where `good_enough` holds.

    The prediction is the error of Newton's step on the norm, or of Halley's, as decision 0090 measured it. It may be wrong: the
    pass that writes the output checks its own sums. For k < 2 there is none, and steps continue until they are small.
    """
    c = tl.abs(overshoot(total, slope))
    h = tl.abs(tl.log(tl.where(total > 0.0, total, 1.0)))
    spread = tl.maximum(curve * total / (slope * slope) - 1.0, 0.0)
    newton = h * h * (spread + 0.02)  # predicted distance of S from 1
    halley = h * h * h * spread * e
    large = k >= _LARGE_K
    # right of the root, entries may be missing from the sums, which matters for a small k
    halley = tl.where(large, halley * (1.0 / 3.0), tl.where(total >= 1.0, halley, newton * tl.minimum(h, 1.0)))
    missing = tl.where(bends, halley, newton)
    near = tl.where(large, h <= 1.5, c <= 0.25 * (1.0 - delta))
    if LINEAR:
        fine = (missing <= CUT * (1.0 - delta) * slope) & (missing <= 2.0 * CUT)
        fine = tl.where(k >= 2.0, fine, c <= CUT * CUT + 2.0**-24)
    else:
        fine = tl.where(k >= 2.0, missing, h) <= 0.5 * SUM
    return fine & near & (total > 0.0)


@triton.jit
def stalls(total, before):
    """Whether an evaluation near the root is no better than the previous one: only rounding is left."""
    error = tl.abs(total - 1.0)
    return (error < 1e-3) & (error > 0.5 * tl.abs(before - 1.0))


@triton.jit
def largest_delta(size, e):
    """1 - n^-e of Eq. 7."""
    return -expm1_of(-e * tl.log(size))
