"""Products of matrices inside a compiled kernel, on the thread that calls: queries by keys, weights by values.

A tile of the result stays in registers while it is summed, and the right factor is read in vectors: values as they lie,
keys from panels in which the numbers of one dimension lie side by side (docs/decisions/0089-attention-in-one-region.md).
Left factors are rows anywhere: `offsets` says where each begins.
"""

import numpy as np
from numba.core import types

from diffmax.kernels.numba.one_row import write
from diffmax.kernels.numba.parts import jitable, part
from diffmax.kernels.numba.probe import numba_converts_float16
from diffmax.kernels.numba.simd import (
    BYTES,
    array_at,
    dots_of,
    get,
    has_avx512,
    load,
    places,
    product_of,
    splat,
    store,
    total,
    transpose_square,
)

# Rows and vectors of a tile: the sums, one row of the right factor and one number of the left one fill the registers, which
# are 32 that hold a whole vector with AVX-512, and fewer and smaller ones without.
ROWS, VECTORS = (8, 2) if has_avx512() else (4, 1)
PANEL_BYTES = VECTORS * BYTES
# Rows of values that are summed before the next rows of weights take their place: they stay in the nearest cache.
DEPTH = 128

# Whether float16 can be read and written at all.
HALVES = numba_converts_float16()

_product = product_of(ROWS, VECTORS)
_column = product_of(ROWS, 1)
_dots = dots_of(ROWS * VECTORS // 2)


@jitable
def bytes_of(kind, array):
    """Of a number of a kind, see `copy_rows`."""
    return array.itemsize if kind == 0 else 2


@jitable
def panel_width(array):
    """Keys that lie side by side in a panel."""
    return VECTORS * places(array)


@jitable
def pack(address, kind, step, count, depth, panels, rows, padded):
    """Write `count` rows of `depth` numbers, `step` apart, of a kind (see `copy_rows`), as panels; what the last lacks is 0.

    `rows` is memory for the rows of a panel, `padded` the depth in whole vectors.
    """
    across = panel_width(panels)
    for first in range(0, count, across):
        some = min(across, count - first)
        copy_rows(address + first * step * bytes_of(kind, panels), kind, step, some, depth, 1.0, rows, padded)
        pack_panel(rows, some, depth, panels[first * depth :], padded)


@jitable
def pack_panel(rows, count, depth, panel, padded):
    """Write a panel of `count` rows, arguments as of `pack`."""
    width = places(panel)
    across = panel_width(panel)
    for i in range(count * padded, across * padded):
        rows[i] = 0.0
    for column in range(0, across, width):
        whole = depth // width * width
        for k in range(0, whole, width):
            transpose_square(rows, column * padded + k, padded, panel, k * across + column, across)
        for k in range(whole, depth):
            for j in range(column, column + width):
                panel[k * across + j] = rows[j * padded + k]


@jitable
def multiply_panels(a, a_rows, rows, panels, depth, start, stop, c, c_rows):
    """c[c_rows[r] + j] = a[a_rows[r] :][:depth] . packed row start + j, for whole panels from start to stop."""
    across = panel_width(panels)
    for first in range(start, stop, across):
        for r in range(0, rows, ROWS):
            _product(a, a_rows, 1, panels, first * depth, across, depth, c, c_rows, first - start, r, False)


@jitable
def multiply_directly(a, a_rows, rows, b, b_step, count, depth, c, c_rows, c_at):
    """c[c_rows[r] + c_at + j] = a[a_rows[r] :][:depth] . b[j b_step :][:depth] for j < count; `depth` is whole vectors.

    It sums each product by itself, which for few rows costs less than `pack`.
    """
    width = places(c)
    whole = count // width * width
    for r in range(rows):
        row, out = a_rows[r], c_rows[r] + c_at
        for j in range(0, whole, width):
            _dots(a, row, b, j * b_step, b_step, depth, c, out + j)
        for j in range(whole, count):
            s = splat(c, 0.0)
            for k in range(0, depth, width):
                s = s + load(a, row + k) * load(b, j * b_step + k)
            c[out + j] = total(s)


@jitable
def multiply_rows(a, a_rows, a_step, rows, b, b_at, b_step, depth, c, c_rows, size, more):
    """c[c_rows[r] + j] = sum over k < depth of a[a_rows[r] + k a_step] b[b_at + k b_step + j] for j < size; added if `more`.

    `size` is a number of whole vectors, `rows` a multiple of ROWS.
    """
    width = places(c)
    across = VECTORS * width
    whole = size // across * across
    for k in range(0, depth, DEPTH):
        count = min(DEPTH, depth - k)
        added = more or k > 0
        for r in range(0, rows, ROWS):
            for j in range(0, whole, across):
                _product(a[k * a_step :], a_rows, a_step, b, b_at + k * b_step + j, b_step, count, c, c_rows, j, r, added)
            for j in range(whole, size, width):
                _column(a[k * a_step :], a_rows, a_step, b, b_at + k * b_step + j, b_step, count, c, c_rows, j, r, added)


@jitable
def gather_rows(weights, index, count, b, b_step, c, c_at, size, more):
    """c[c_at + j] = sum over i < count of weights[i] b[index[i] b_step + j] for j < size, whole vectors; added if `more`."""
    width = places(c)
    if not more:
        for j in range(c_at, c_at + size, width):
            store(c, j, splat(c, 0.0))
    whole = size // (4 * width) * (4 * width)
    for j in range(0, whole, 4 * width):
        s0, s1 = load(c, c_at + j), load(c, c_at + j + width)
        s2, s3 = load(c, c_at + j + 2 * width), load(c, c_at + j + 3 * width)
        for i in range(count):
            factor = splat(c, weights[i])
            at = index[i] * b_step + j
            s0, s1 = s0 + factor * load(b, at), s1 + factor * load(b, at + width)
            s2, s3 = s2 + factor * load(b, at + 2 * width), s3 + factor * load(b, at + 3 * width)
        store(c, c_at + j, s0)
        store(c, c_at + j + width, s1)
        store(c, c_at + j + 2 * width, s2)
        store(c, c_at + j + 3 * width, s3)
    for j in range(whole, size, width):
        s0 = load(c, c_at + j)
        for i in range(count):
            s0 = s0 + splat(c, weights[i]) * load(b, index[i] * b_step + j)
        store(c, c_at + j, s0)


@jitable
def scatter_rows(weights, index, count, row, c, c_step, size):
    """c[index[i] c_step + j] += weights[i] row[j] for i < count and j < size, a number of whole vectors."""
    width = places(c)
    for j in range(0, size, width):
        values = load(row, j)
        for i in range(count):
            at = index[i] * c_step + j
            store(c, at, load(c, at) + splat(c, weights[i]) * values)


@jitable
def _copied(source, step, count, size, scale, target, target_step):
    width = places(target)
    whole = size // width * width
    factor = splat(target, scale)
    for r in range(count):
        for j in range(0, whole, width):
            store(target, r * target_step + j, load(source, r * step + j) * factor)
    if whole == size:
        return
    if whole < target_step:
        for r in range(count):
            store(target, r * target_step + whole, splat(target, 0.0))
    if whole > 0:
        for r in range(count):  # the last vector ends with the row
            store(target, r * target_step + size - width, load(source, r * step + size - width) * factor)
    else:
        for r in range(count):
            for j in range(size):
                target[r * target_step + j] = get(source, r * step + j) * scale


def copy_rows(address, kind, step, count, size, scale, target, target_step):
    """Rows of `size` numbers, `step` apart, times the scale, in the type that one computes in, filled up with zeros.

    `kind`: 0 for numbers of that type, 1 for bfloat16, 2 for float16.
    """


@part(copy_rows)
def _copy_rows(address, kind, step, count, size, scale, target, target_step):
    if target.dtype == types.float64:

        def copy(address, kind, step, count, size, scale, target, target_step):
            _copied(array_at(address, count * step + size, np.float64), step, count, size, scale, target, target_step)

        return copy

    def copy_any(address, kind, step, count, size, scale, target, target_step):
        if kind == 0:
            _copied(array_at(address, count * step + size, np.float32), step, count, size, scale, target, target_step)
        elif kind == 1:
            _copied(array_at(address, count * step + size, np.uint16), step, count, size, scale, target, target_step)
        elif HALVES:
            _copied(array_at(address, count * step + size, np.int16), step, count, size, scale, target, target_step)

    return copy_any


def write_row(address, kind, size, row, factor):
    """Write row[:size] * factor in the type of a kind, see `copy_rows`."""


@part(write_row)
def _write_row(address, kind, size, row, factor):
    if row.dtype == types.float64:
        return lambda address, kind, size, row, factor: write(array_at(address, size, np.float64), size, row, factor)

    def write_any(address, kind, size, row, factor):
        if kind == 0:
            write(array_at(address, size, np.float32), size, row, factor)
        elif kind == 1:
            write(array_at(address, size, np.uint16), size, row, factor)
        elif HALVES:
            write(array_at(address, size, np.int16), size, row, factor)

    return write_any
