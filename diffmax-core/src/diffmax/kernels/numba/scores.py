"""The rules of attention's scores (`diffmax.operators.attention.scores`), compiled: what acts on a row of scaled products."""

import math

from numba.core import types

from diffmax.kernels.numba.functions import exp_m1
from diffmax.kernels.numba.parts import jitable, part
from diffmax.kernels.numba.simd import is_nan, lanes, load, nonzero, places, select, splat, store


@jitable
def tanh(x):
    """Hyperbolic tangent and its derivative, which loses no digits where the tangent is near 1; NaN of NaN."""
    t = exp_m1(select(x > 0.0, x, 0.0 - x) * -2.0)
    more = t + 2.0
    size = (0.0 - t) / more
    return select(is_nan(x), x, select(x < 0.0, 0.0 - size, size)), (t + 1.0) * 4.0 / (more * more)


def cap(row, slope, padded, softcap):
    """c tanh(score / c), and its derivative where there is room for it."""


@part(cap)
def _cap(row, slope, padded, softcap):
    if row.dtype == types.float64:  # the last digits count: the processor's own function, one by one

        def precise(row, slope, padded, softcap):
            for i in range(padded):
                share = math.tanh(row[i] / softcap)
                row[i] = softcap * share
                if len(slope) > 0:
                    slope[i] = 1.0 - share * share

        return precise

    def quick(row, slope, padded, softcap):
        for i in range(0, padded, places(row)):
            capped, derivative = tanh(load(row, i) / softcap)
            store(row, i, capped * softcap)
            if len(slope) > 0:
                store(slope, i, derivative)

    return quick


@jitable
def add_bias(row, bias, step, stop):
    """Add bias[j * step] to the scores before `stop`."""
    width = places(row)
    if step == 0:
        for j in range(stop):
            row[j] += bias[0]
        return
    whole = stop // width * width
    for j in range(0, whole, width):
        store(row, j, load(row, j) + load(bias, j))
    for j in range(whole, stop):
        row[j] += bias[j]


@jitable
def subtract_distance(row, padded, first, slope):
    """Subtract slope |distance|, where `first` is the position of column 0 less the query's."""
    width = places(row)
    for i in range(0, padded, width):
        distance = lanes(row) + float(first + i)
        distance = select(distance < 0.0, 0.0 - distance, distance)
        store(row, i, load(row, i) - distance * slope)


@jitable
def hide_outside(row, padded, start, stop, by):
    """`by` before column start and from stop on."""
    width = places(row)
    start, stop = min(max(start, 0), padded), min(max(stop, 0), padded)
    for i in range(0, start // width * width, width):
        store(row, i, splat(row, by))
    for i in range(start // width * width, start):
        row[i] = by
    whole = min(padded, (stop + width - 1) // width * width)
    for i in range(stop, whole):
        row[i] = by
    for i in range(whole, padded, width):
        store(row, i, splat(row, by))


@jitable
def hide_masked(row, mask, step, stop, by):
    """`by` where mask[j * step] is 0, for the columns before `stop`."""
    width = places(row)
    if step == 0:
        if mask[0] == 0:
            for j in range(stop):
                row[j] = by
        return
    whole = stop // width * width
    for j in range(0, whole, width):
        v = load(row, j)
        store(row, j, select(nonzero(mask, j, v), v, by))
    for j in range(whole, stop):
        if mask[j] == 0:
            row[j] = by
