"""Shared by attention's backward kernels: from a tile of products to b, s = b^(k-1) and p = s b, recomputed (Eq. 5).

A tile is queries by keys, or the transpose: `rows`, `keys`, and the values per query have shapes that broadcast. The first
kernel stores these values for the others, `QueryValues`.

A query whose weights are all 0 is silent: it propagates no gradient, not even NaN. Its m is +inf here, which makes its bases 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.tiles import TILE, load_rows
from diffmax.kernels.triton.common.launch import SMALLEST_E_FOR_HARDWARE
from diffmax.kernels.triton.common.layout import vector_multiple
from diffmax.kernels.triton.common.numerics import exp2_of, integer_power, log2_1p, log2_by_hardware, log2_of
from diffmax.kernels.triton.common.scores import ABSENT, load_per_pair, score

# Values of HARDWARE, the use of the hardware's logarithm: never (float32); in 16 bits always, or as e requires
NEVER = tl.constexpr(0)
ALWAYS = tl.constexpr(1)
BY_E = tl.constexpr(2)
_SMALLEST_E = tl.constexpr(SMALLEST_E_FOR_HARDWARE)

# Axes of a tile
QUERIES = tl.constexpr(0)
KEYS = tl.constexpr(1)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST_SLOPE_EXPONENT = tl.constexpr(2.0**-20)

# ((1 + u) ln(1 + u) - u) / u^2 on [-1/4, 0], highest power first; relative error 1.5e-8
_G5 = tl.constexpr(-0.0440182)
_G4 = tl.constexpr(0.02695256)
_G3 = tl.constexpr(-0.0508681)
_G2 = tl.constexpr(0.083281726)
_G1 = tl.constexpr(-0.16666774)
_G0 = tl.constexpr(0.5)


class QueryValues(NamedTuple):
    """What the tiles of a block of queries need, each a vector, or a column or row of a tile.

    Attributes:
        shift, offset: The constants of `base_of`. shift is +inf for silent queries.
        mean: The mean of dP; 0 for silent queries.
    """

    shift: Any
    offset: Any
    mean: Any


@triton.jit
def values_of(m, delta, heard, mean, e, K: tl.constexpr, HARDWARE: tl.constexpr):
    """The values for m and delta of the forward.

    In 16 bits, shift is e m + delta - 1, which rounds no more than the products of queries and keys do. In float32 the base is
    computed from x - m, and 1 - delta is the offset. Where a power needs the digits that b loses, 1 is not yet added.
    """
    shift, offset = m, least_of(e, K, HARDWARE) + 1.0 - delta
    if HARDWARE != NEVER:
        shift, offset = e * m - offset, mean
    return QueryValues(tl.where(heard, shift, float("inf")), offset, mean)


@triton.jit
def load_few(ptr, first, valid, stride, size, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, FEW: tl.constexpr):
    """`load_rows`; if FEW, with a multiplication per row in the loop, instead of two registers that hold its offset."""
    if FEW:
        rows, cols = first + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        inside = valid[:, None]
        if not WHOLE:
            inside = inside & (cols < size)[None, :]
        return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    else:
        return load_rows(ptr, first, valid, stride, size, ROWS, BLOCK, WHOLE)


@triton.jit
def place_values(ptr, of_head, q_start, sequence, n_places):
    """The address of the values of a sequence, which begin at a tile like the tiles of `live`. of_head in int64.

    A head has n_places, a multiple of `TILE`, for each of three numbers.
    """
    n_places = vector_multiple(n_places, True, TILE)
    return ptr + of_head * 3 * n_places + (q_start // TILE + sequence) * TILE, n_places


@triton.jit
def store_values(ptr, values, n_places, first, length, ROWS: tl.constexpr, HARDWARE: tl.constexpr):
    """Write the values of the queries from `first` on."""
    rows = first + tl.arange(0, ROWS)
    tl.store(ptr + rows, values.shift, mask=rows < length)
    tl.store(ptr + n_places + rows, values.mean, mask=rows < length)
    if HARDWARE == NEVER:
        tl.store(ptr + 2 * n_places + rows, values.offset, mask=rows < length)


@triton.jit
def load_values(ptr, n_places, first, ROWS: tl.constexpr, HARDWARE: tl.constexpr):
    """The inverse of `store_values`; anything after the last query, because masks would take instructions."""
    rows = first + tl.arange(0, ROWS)
    shift, mean = tl.load(ptr + rows), tl.load(ptr + n_places + rows)
    offset = mean
    if HARDWARE == NEVER:
        offset = tl.load(ptr + 2 * n_places + rows)
    return QueryValues(shift, offset, mean)


@triton.jit
def as_column(values):
    """The values for a tile of queries by keys."""
    return QueryValues(values.shift[:, None], values.offset[:, None], values.mean[:, None])


@triton.jit
def as_row(values):
    """The values for a tile of keys by queries."""
    return QueryValues(values.shift[None, :], values.offset[None, :], values.mean[None, :])


@triton.jit
def base_of(x, factor, values, e, K: tl.constexpr, HARDWARE: tl.constexpr):
    """e (factor x - m) + 1 - delta, whose positive part is b, or that less 1: see `values_of`."""
    if HARDWARE == NEVER:
        return e * (x * factor - values.shift) + values.offset
    else:
        return x * (factor * e) - values.shift


@triton.jit
def least_of(e, K: tl.constexpr, HARDWARE: tl.constexpr):
    """What stands for b = 0: 0, or -1 where a power needs the digits of b - 1."""
    if K > 0 or HARDWARE == ALWAYS:
        return 0.0
    elif HARDWARE == BY_E:
        return tl.where(e >= _SMALLEST_E, 0.0, -1.0)
    else:
        return -1.0


@triton.jit
def at_least(base, least: tl.constexpr):
    """The base, clamped where b is 0. NaN stays."""
    return tl.maximum(base, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def slopes_of(base, e, k, NEEDS_E: tl.constexpr, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr):
    """b, s and, if NEEDS_E, the weight of Eq. 6 in units of s k^2, from `base_of`. If the base is NaN, all three are."""
    if K > 0:
        b = at_least(base, 0.0)
        return b, integer_power(b, K - 1), curve(b, b - 1.0, log2_of(b), NEEDS_E)
    elif HARDWARE == ALWAYS:
        b = at_least(base, 0.0)
        s, log_b = slope_by_hardware(b, k, PTX)
        return b, s, rough_curve(b, log_b, NEEDS_E)
    elif HARDWARE == BY_E:
        if e >= _SMALLEST_E:
            b = at_least(base, 0.0)
            s, log_b = slope_by_hardware(b, k, PTX)
            w = rough_curve(b, log_b, NEEDS_E)
        else:
            u = at_least(base, -1.0)
            b = u + 1.0
            s = slope_near_softmax(b, u, k, PTX)
            w = near_curve(b, u, NEEDS_E)
        return b, s, w
    else:
        u = at_least(base, -1.0)
        b = u + 1.0
        log_b = log2_1p(u, False, PTX)  # a number where b is 0
        s = tl.where(b == 0.0, 0.0, exp2_of((k - 1.0) * log_b, PTX))
        return b, s, curve(b, u, log_b, NEEDS_E)


@triton.jit
def slope_by_hardware(b, k, PTX: tl.constexpr):
    """s and log2 b, -inf for 0. For k = 1 the exponent stays above 0, so that s is 0 there."""
    log_b = log2_by_hardware(b, PTX)
    return exp2_of(tl.maximum(k - 1.0, _LEAST_SLOPE_EXPONENT) * log_b, PTX), log_b


@triton.jit
def slope_near_softmax(b, u, k, PTX: tl.constexpr):
    """s for a large k, which multiplies errors of log2 b: a series near b = 1, and otherwise s is tiny.

    The terms after u^4 are 2e-7 of the logarithm.
    """
    series = u * (_LOG2_E + u * (-_LOG2_E / 2 + u * (_LOG2_E / 3 - u * (_LOG2_E / 4))))
    return exp2_of((k - 1.0) * tl.where(u > -1.0 / 32, series, log2_by_hardware(b, PTX)), PTX)


@triton.jit
def curve(b, u, log_b, NEEDS_E: tl.constexpr):
    """(1 + u) ln(1 + u) - u, where b = 1 + u: w of Eq. 6 is s k^2 times this, because p^-e = 1/b."""
    if NEEDS_E:
        return tl.where(u > -0.25, near_curve(b, u, True), b * log_b * _LN_2 - u)
    else:
        return b


@triton.jit
def near_curve(b, u, NEEDS_E: tl.constexpr):
    """`curve` for -1/4 <= u <= 0; of the right size down to -1."""
    if NEEDS_E:
        series = tl.fma(u, _G5, _G4)
        series = tl.fma(u, series, _G3)
        series = tl.fma(u, series, _G2)
        series = tl.fma(u, series, _G1)
        return u * u * tl.fma(u, series, _G0)
    else:
        return b


@triton.jit
def rough_curve(b, log_b, NEEDS_E: tl.constexpr):
    """`curve` with an error of 2^-22, for 16 bits: b (ln b - 1) + 1."""
    if NEEDS_E:
        return tl.fma(b, tl.fma(tl.maximum(log_b, -127.0), _LN_2, -1.0), 1.0)
    else:
        return b


class Range(NamedTuple):
    """Positions that some entries see: keys that queries see, or queries that see keys.

    Attributes:
        low, high: What each entry sees, [low, high).
        from_all, to_all: What all of them see, [from_all, to_all).
    """

    low: Any
    high: Any
    from_all: Any
    to_all: Any


@triton.jit
def range_of(first, before, after, end, SIZE: tl.constexpr, WINDOW: tl.constexpr):
    """What positions first, ..., first + SIZE - 1, a column, see of [0, end): from `before` before each to `after` after it.

    Two bounds for each, so that an entry of a tile takes two comparisons, and the loop holds no number per entry.
    """
    if WINDOW:
        places = (first + tl.arange(0, SIZE))[:, None]
        return Range(
            places - before, tl.minimum(places + after + 1, end), first + SIZE - 1 - before, tl.minimum(first + after + 1, end)
        )
    else:
        return Range(end * 0, end, end * 0, end)


@triton.jit
def recompute(
    x, rows, keys, seen, first_other, OTHER: tl.constexpr, SIZE: tl.constexpr, values, rules, e, k,
    OPTIONS: tl.constexpr, NEEDS_E: tl.constexpr, K: tl.constexpr, HARDWARE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """From products x: the results of `slopes_of`, the mean of dP, and the capped scores for `score_gradient`.

    seen: the `Range` on the axis OTHER, QUERIES or KEYS, where the tile has SIZE entries from first_other on.
    """
    capped, factor = x, rules.scale
    if OPTIONS.SOFTCAP or OPTIONS.ALIBI or OPTIONS.BIAS != ABSENT:
        x, capped = score(x, rows, keys, rules, OPTIONS)
        factor = 1.0
    base = base_of(x, factor, values, e, K, HARDWARE)
    mean = values.mean
    cut = (first_other < seen.from_all) | (first_other + SIZE > seen.to_all)
    if OPTIONS.MASK != ABSENT:
        cut = True
    if cut:
        others = keys if OTHER == KEYS else rows
        visible = (others >= seen.low) & (others < seen.high)
        if OPTIONS.MASK != ABSENT:
            visible = visible & (load_per_pair(rules.mask, rows, keys, rules, OPTIONS.MASK, 0) != 0)  # one byte per entry
        base = tl.where(visible, base, -float("inf"))
        if OTHER == QUERIES:  # there are no means after the last query
            mean = tl.where(rows < rules.n_rows, mean, 0.0)
    b, s, w = slopes_of(base, e, k, NEEDS_E, K, HARDWARE, PTX)
    return b, s, w, mean, capped
