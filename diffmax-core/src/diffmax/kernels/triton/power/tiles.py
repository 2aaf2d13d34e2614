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
def computed_by_given(a, b, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, for computed a (float32) and given b: with bfloat16, a is a sum of PARTS numbers of eight digits."""
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        low = rest.to(tl.bfloat16)
        if PARTS == 3:
            acc = tl.dot((rest - low.to(tl.float32)).to(tl.bfloat16), b, acc)
        return tl.dot(high, b, tl.dot(low, b, acc))
    else:
        return tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def given_by_computed(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """a b, for given a and computed b (float32)."""
    if a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        low = rest.to(tl.bfloat16)
        acc = tl.dot(a, low)
        if PARTS == 3:
            acc = tl.dot(a, (rest - low.to(tl.float32)).to(tl.bfloat16), acc)
        return tl.dot(a, high, acc)
    else:
        return tl.dot(a.to(tl.float32), b, input_precision=PRECISION)


@triton.jit
def computed_by_computed(a, b, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, both float32: if SPLIT, in three products of parts of eight digits, which leaves an error of 2^-16."""
    if SPLIT:
        high_a, high_b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        low_a, low_b = (a - high_a.to(tl.float32)).to(tl.bfloat16), (b - high_b.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(high_a, low_b, tl.dot(low_a, high_b, acc))
        return tl.dot(high_a, high_b, acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


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
def decay(high_query, low_query, high_key, low_key, visible, GATES: tl.constexpr):
    """exp(G_query - G_key) where visible, else 0. G is a sum of two float32: their difference keeps the digits of both."""
    if GATES:
        return tl.where(visible, tl.exp((high_query - high_key) + (low_query - low_key)), 0.0)
    else:
        return tl.where(visible, 1.0, 0.0)


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
