"""Shared by power attention's kernels: monomials of tokens, products of computed with given numbers, weights, rows.

A state holds one row for each monomial, in lexicographic order. `variables` (p, COUNT) has the variables of each, as uint8, and
COUNT is a multiple of every tile: behind the last monomial there are some whose coefficient is 0. Tokens of which monomials are
computed lie in `columns`: float32, and for each chunk a row per variable, with zeros behind the chunk's last token.
"""

import triton
import triton.language as tl

from diffmax.kernels.triton.common.layout import vector_multiple

_MULTIPLE = tl.constexpr(16)  # of which a row of columns is one


@triton.jit
def row_of(row):
    """`row`, with the hint that it is a multiple of 16."""
    return vector_multiple(row, True, _MULTIPLE)


@triton.jit
def place_head(ptr, batch, head, stride_b, stride_h, stride_row, ALIGNED: tl.constexpr):
    """The address of a head, and the stride of its rows with its alignment hint. batch and head in int64."""
    VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    return ptr + vector_multiple(batch * stride_b + head * stride_h, ALIGNED, VECTOR), vector_multiple(
        stride_row, ALIGNED, VECTOR
    )


@triton.jit
def column(x_ptr, row, variables_ptr, entries, tokens, PLACE: tl.constexpr, COUNT: tl.constexpr):
    """The variable at this place of each monomial, for each token; `entries` and `tokens` broadcast against each other.

    row: the distance of variables in memory, from `row_of`.
    """
    variables = tl.load(variables_ptr + PLACE * COUNT + entries).to(tl.int32)
    return tl.load(x_ptr + variables * row + tokens)


@triton.jit
def monomials(
    x_ptr, row, variables_ptr, entries, tokens, LEFT_OUT: tl.constexpr, DEGREE: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """The monomials of tokens, but for the variable at place LEFT_OUT; -1: with all."""
    FIRST: tl.constexpr = 1 if LEFT_OUT == 0 else 0
    found = column(x_ptr, row, variables_ptr, entries, tokens, FIRST, COUNT)
    for place in tl.static_range(FIRST + 1, DEGREE):
        if place != LEFT_OUT:
            found *= column(x_ptr, row, variables_ptr, entries, tokens, place, COUNT)
    return found


@triton.jit
def pulled(
    acc, of_monomials, x_ptr, row, variables_ptr, first, tokens,
    DEGREE: tl.constexpr, COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """acc (tokens, BLOCK_D), and the gradient for tokens of what has this gradient for BLOCK_P monomials (tokens, BLOCK_P).

    It belongs to one column for each place of a monomial: a product with ones and zeros adds it there.
    """
    entries = first + tl.arange(0, BLOCK_P)
    for place in tl.static_range(DEGREE):
        others = monomials(x_ptr, row, variables_ptr, entries[None, :], tokens[:, None], place, DEGREE, COUNT)
        variables = tl.load(variables_ptr + place * COUNT + entries).to(tl.int32)
        there = tl.where(variables[:, None] == tl.arange(0, BLOCK_D)[None, :], 1.0, 0.0).to(tl.bfloat16)
        acc = computed_by_given(of_monomials * others, there, acc, PARTS, "ieee")
    return acc


@triton.jit
def rounded_by_given(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, for weights a and a given tile b, as exact as b's dtype asks for: bfloat16 rounds a.

    Weights have no bound, so float16 does not take them.
    """
    if b.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.bfloat16), b, acc)
    else:
        return tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def leading(x):
    """x without the last 16 of its bits: what bfloat16 holds. Rounding would convert there and back, which is slow."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def computed_by_given(a, b, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, for computed a (float32) and given b: with bfloat16, a is a sum of PARTS numbers of eight digits."""
    if b.dtype == tl.bfloat16:
        high = leading(a)
        low = a - high
        if PARTS == 3:
            rest, low = low, leading(low)
            acc = tl.dot((rest - low).to(tl.bfloat16), b, acc)
        return tl.dot(high.to(tl.bfloat16), b, tl.dot(low.to(tl.bfloat16), b, acc))
    else:
        return tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def given_by_computed(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """a b, for given a and computed b (float32)."""
    if a.dtype == tl.bfloat16:
        high = leading(b)
        low = b - high
        if PARTS == 3:
            rest, low = low, leading(low)
            acc = tl.dot(a, low.to(tl.bfloat16), tl.dot(a, (rest - low).to(tl.bfloat16)))
        else:
            acc = tl.dot(a, low.to(tl.bfloat16))
        return tl.dot(a, high.to(tl.bfloat16), acc)
    else:
        return tl.dot(a.to(tl.float32), b, input_precision=PRECISION)


@triton.jit
def computed_by_computed(a, b, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, both float32; with SPLIT, in products of that many parts of eight digits: 2 leave an error of 2^-16."""
    if SPLIT == 0:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        high_a, high_b = leading(a), leading(b)
        low_a, low_b = a - high_a, b - high_b
        if SPLIT == 3:
            rest_a, rest_b = low_a, low_b
            low_a, low_b = leading(rest_a), leading(rest_b)
            last_a, last_b = (rest_a - low_a).to(tl.bfloat16), (rest_b - low_b).to(tl.bfloat16)
            acc = tl.dot(high_a.to(tl.bfloat16), last_b, tl.dot(last_a, high_b.to(tl.bfloat16), acc))
            acc = tl.dot(low_a.to(tl.bfloat16), low_b.to(tl.bfloat16), acc)
        acc = tl.dot(low_a.to(tl.bfloat16), high_b.to(tl.bfloat16), acc)
        acc = tl.dot(high_a.to(tl.bfloat16), low_b.to(tl.bfloat16), acc)
        return tl.dot(high_a.to(tl.bfloat16), high_b.to(tl.bfloat16), acc)


@triton.jit
def as_columns(x, NARROW: tl.constexpr):
    """(rows, 16) whose columns sum up to x: a product with it is a sum, without a barrier. NARROW: in bfloat16."""
    column = tl.arange(0, 16)[None, :]
    if NARROW:
        high = leading(x)
        low = leading(x - high)
        parts = tl.where(column == 1, low[:, None], tl.where(column == 2, (x - high - low)[:, None], 0.0))
        return tl.where(column == 0, high[:, None], parts).to(tl.bfloat16)
    else:
        return tl.where(column == 0, x[:, None], 0.0)


@triton.jit
def even_power(x, DEGREE: tl.constexpr):
    """x^p for an even p from 0."""
    if DEGREE == 0:
        return x * 0.0 + 1.0
    else:
        square = x * x
        found = square
        for _ in tl.static_range(DEGREE // 2 - 1):
            found *= square
        return found


@triton.jit
def slope_of(x, DEGREE: tl.constexpr):
    """p x^(p - 1) and x^p."""
    if DEGREE == 2:
        return 2.0 * x, x * x
    else:
        below = even_power(x, DEGREE - 2) * x
        return DEGREE * below, below * x


@triton.jit
def decayed(w, query, key, GATES: tl.constexpr):
    """w times exp(G_query - G_key), which may be anything where the query does not see the key.

    G is a pair of float32 whose sum it is, and broadcasts: so the difference keeps the digits of both.
    """
    if GATES:
        return w * tl.exp((query[0] - key[0]) + (query[1] - key[1]))
    else:
        return w


@triton.jit
def load_decays(g_ptr, plane, places, inside, GATES: tl.constexpr):
    """Both parts of G at these places, 0 where they are not inside."""
    if GATES:
        high = tl.load(g_ptr + places, mask=inside, other=0.0)
        return high, tl.load(g_ptr + plane + places, mask=inside, other=0.0)
    else:
        nothing = tl.zeros(places.shape, tl.float32)
        return nothing, nothing


@triton.jit
def load_tile(ptr, rows, stride, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK), 0 where a row is not inside, and behind its SIZE entries."""
    columns = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if SIZE != BLOCK:
        mask = mask & (columns < SIZE)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_tile`, for rows that follow each other in memory."""
    columns = tl.arange(0, BLOCK)
    mask = inside[:, None]
    if SIZE != BLOCK:
        mask = mask & (columns < SIZE)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * SIZE + columns[None, :], tile.to(ptr.dtype.element_ty), mask=mask)
