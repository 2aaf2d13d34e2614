"""Shared by threshold attention's kernels: scores of a tile with the relative bias, weights [u - theta]_+^power, their slopes.

A tile is queries by keys, or the transpose: `rows` and `keys` are positions, and values per query broadcast against the tile.
Scores of softmax are in units of ln 2, so that a weight is a power of 2. A hidden entry has the score -inf, and no weight.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from diffmax.kernels.triton.attention.evaluation import larger_or_nan, positive
from diffmax.kernels.triton.attention.tiles import load_rows, load_vector, row_ptr, store_rows
from diffmax.kernels.triton.common.layout import vector_multiple
from diffmax.kernels.triton.common.numerics import exp2_of, log2_of
from diffmax.kernels.triton.common.scores import ABSENT, PerPair, Rules, visible

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def unit_of(SOFTMAX: tl.constexpr):
    """The factor of scores: those of softmax are in units of ln 2."""
    return _LOG2_E if SOFTMAX else 1.0


@triton.jit
def place_head(ptr, batch, head, start, stride_b, stride_h, stride_row, ALIGNED: tl.constexpr):
    """The address of row `start` of a head, and the stride of its rows with its alignment hint. batch and head in int64."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    step = vector_multiple(stride_row, ALIGNED, VECTOR)
    return row_ptr(ptr, batch, head, start, stride_b, stride_h, step, ALIGNED), step


@triton.jit
def rules_of(
    batch, head, mask_ptr, mask_b, mask_h, mask_row, mask_key, left, right, scale, shift, n_rows, n_keys,
    SOFTMAX: tl.constexpr,
):  # fmt: skip
    """The arguments of the rules of the scores for a head. batch and head in int64."""
    mask = PerPair(mask_ptr + batch * mask_b + head * mask_h, mask_row, mask_key)
    return Rules(scale * unit_of(SOFTMAX), 0.0, 0.0, left, right, shift, n_rows, n_keys, mask, mask)


class Queries(NamedTuple):
    """What tiles need of their queries, each a vector, or a column or row of a tile. Behind the last one nothing has a weight.

    Attributes:
        theta: The threshold.
        mass: The gradient for the sum of weights.
        level: The log-sum-exp of the scores in units of ln 2, 0 where nothing is visible.
        mean: sum_j p_j G_j of softmax.
    """

    theta: Any
    mass: Any
    level: Any
    mean: Any


@triton.jit
def as_column(queries):
    """For a tile of queries by keys."""
    return Queries(queries.theta[:, None], queries.mass[:, None], queries.level[:, None], queries.mean[:, None])


@triton.jit
def as_row(queries):
    """For a tile of keys by queries."""
    return Queries(queries.theta[None, :], queries.mass[None, :], queries.level[None, :], queries.mean[None, :])


@triton.jit
def place_queries(ptr, of_head, q_start, sequence, places, PLANES: tl.constexpr, QUERIES: tl.constexpr):
    """The address of the `Queries` of a sequence, and the distance of planes. of_head in int64.

    A head has PLANES of `places` numbers, a multiple of QUERIES; sequences begin at multiples of it.
    """
    return ptr + of_head * PLANES * places + (q_start // QUERIES + sequence) * QUERIES, places


@triton.jit
def store_queries(ptr, places, queries, first, ROWS: tl.constexpr, MASS: tl.constexpr, SOFTMAX: tl.constexpr):
    """Write those from `first` on, also behind the last one, so that loads need no masks."""
    rows = first + tl.arange(0, ROWS)
    tl.store(ptr + rows, queries.theta)
    if SOFTMAX:
        tl.store(ptr + places + rows, queries.level)
        tl.store(ptr + 2 * places + rows, queries.mean)
    if MASS:
        tl.store(ptr + (3 if SOFTMAX else 1) * places + rows, queries.mass)


@triton.jit
def load_queries(ptr, places, first, ROWS: tl.constexpr, MASS: tl.constexpr, SOFTMAX: tl.constexpr):
    """The inverse of `store_queries`."""
    rows = first + tl.arange(0, ROWS)
    theta = tl.load(ptr + rows)
    mass, level, mean = theta * 0.0, theta, theta
    if SOFTMAX:
        level, mean = tl.load(ptr + places + rows), tl.load(ptr + 2 * places + rows)
    if MASS:
        mass = tl.load(ptr + (3 if SOFTMAX else 1) * places + rows)
    return Queries(theta, mass, level, mean)


@triton.jit
def only_inside(queries, inside):
    """Those not inside have no weight, whatever they hold."""
    theta, level = tl.where(inside, queries.theta, float("inf")), tl.where(inside, queries.level, float("inf"))
    return Queries(theta, tl.where(inside, queries.mass, 0.0), level, tl.where(inside, queries.mean, 0.0))


@triton.jit
def scores_of(
    x, rows, keys, first_row, first_key, rules, bias_ptr, width,
    OPTIONS: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Scores from products x, -inf where hidden; and whether some may be. Keys before the first one are hidden.

    bias_ptr: the head's.
    """
    s = x * rules.scale
    most = first_row + ROWS - 1 + rules.shift - first_key  # the largest and the least distance in the tile
    least = first_row + rules.shift - (first_key + KEYS - 1)
    cut = (first_key < 0) | (first_key + KEYS > rules.n_keys)
    if OPTIONS.WINDOW:
        cut = cut | (-least > rules.right) | (most > rules.left)
    if OPTIONS.MASK != ABSENT:
        cut = True
    if cut:
        there = (keys >= 0) & (keys < rules.n_keys)
        s = tl.where(visible(rows, tl.maximum(keys, 0), there, rules, OPTIONS), s, -float("inf"))
    if BIAS:
        if (most >= 0) & (least < width):
            distance = rows + rules.shift - keys
            bias = tl.load(bias_ptr + distance, mask=(distance >= 0) & (distance < width), other=0.0)
            s += bias * unit_of(SOFTMAX)
            cut = True  # a bias of -inf hides too
    return s, cut


@triton.jit
def level_of(lse_ptr, first, length, ROWS: tl.constexpr):
    """The log-sum-exp of ROWS queries in units of ln 2, 0 where nothing is visible, +inf behind the last query."""
    lse = load_vector(lse_ptr, first, length, ROWS, float("inf"))
    return tl.where(lse == -float("inf"), 0.0, lse * _LOG2_E)


@triton.jit
def probability(s, level, SOFTMAX: tl.constexpr, PTX: tl.constexpr):
    """softmax(s) for the log-sum-exp `level`; else the scores."""
    if SOFTMAX:
        return exp2_of(s - level, PTX)
    else:
        return s


@triton.jit
def excess(u, s, theta, cut, SOFTMAX: tl.constexpr):
    """u - theta, -inf where hidden."""
    y = u - theta
    if SOFTMAX:  # else u is -inf there
        if cut:
            y = tl.where(s == -float("inf"), -float("inf"), y)
    return y


@triton.jit
def exceeds(s, queries, inverse, SOFTMAX: tl.constexpr, PTX: tl.constexpr):
    """Whether a tile of queries by keys has a weight that is not 0: the largest score of each query tells. NaN is not 0."""
    top = tl.reduce(s, 1, larger_or_nan)
    y = excess(probability(top, queries.level, SOFTMAX, PTX) * inverse, top, queries.theta, True, SOFTMAX)
    return tl.max(tl.where(y <= 0.0, 0, 1), axis=0) > 0


@triton.jit
def some_above(y):
    """Whether a tile has an excess above 0, or NaN."""
    return tl.max(tl.where(tl.reduce(y, 1, larger_or_nan) <= 0.0, 0, 1), axis=0) > 0


@triton.jit
def with_mass(d_w, queries, MASS: tl.constexpr):
    """The gradient for weights, of which d_w is that by the results."""
    if MASS:
        return d_w + queries.mass
    else:
        return d_w


@triton.jit
def weights(y, power, POWER: tl.constexpr, PTX: tl.constexpr):
    """[y]_+^power. POWER: the exponent if it is 1 or 2, else 0."""
    b = positive(y)
    if POWER == 1:
        return b
    elif POWER == 2:
        return b * b
    else:
        return _power(b, power, PTX)


@triton.jit
def slopes(y, d_w, power, POWER: tl.constexpr, PTX: tl.constexpr):
    """The derivative of `weights` times d_w; 0 where there is no weight."""
    if POWER == 2:
        d_w = d_w * (2.0 * positive(y))
    elif POWER == 0:
        d_w = d_w * (power * _power(positive(y), power - 1.0, PTX))
    return tl.where(y > 0.0, d_w, positive(y))  # NaN stays


@triton.jit
def _power(b, power, PTX: tl.constexpr):
    """b^power for b >= 0, and 0 for 0."""
    found = exp2_of(power * log2_of(b), PTX)
    return tl.where(b > 0.0, found, b)


@triton.jit
def by_given(a, b, acc, PRECISION: tl.constexpr, ROUNDED: tl.constexpr):
    """acc + a b, for computed a (float32) and a given tile b, as exact as b's dtype asks for.

    bfloat16 rounds a. float16 does not: weights of scores have no bound, those of softmax may be tiny.
    """
    if b.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.bfloat16), b, acc)
    elif b.dtype == tl.float16:
        return tl.dot(a, b.to(tl.float32), acc, input_precision=ROUNDED)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_tile(ptr, first, valid, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) from row `first` on, 0 for rows that are not valid and behind the SIZE entries of a row."""
    return load_rows(ptr, first, valid, stride, SIZE, ROWS, BLOCK, SIZE == BLOCK)


@triton.jit
def store_tile(ptr, tile, first, valid, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_tile`, for rows that follow each other in memory."""
    store_rows(ptr, tile, first, valid, SIZE, SIZE, ROWS, BLOCK, SIZE == BLOCK)
