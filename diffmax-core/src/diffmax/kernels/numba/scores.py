"""The rules of attention's scores (`diffmax.operators.attention.scores`), compiled: what acts on a row of scaled products."""

import math

from diffmax.kernels.numba.functions import exp_m1
from diffmax.kernels.numba.simd import is_nan, jitable, lanes, load, nonzero, places, select, splat, store


@jitable
def tanh(x):
    """Hyperbolic tangent; NaN of NaN."""
    t = exp_m1(select(x > 0.0, x, 0.0 - x) * -2.0)
    size = (0.0 - t) / (t + 2.0)
    return select(is_nan(x), x, select(x < 0.0, 0.0 - size, size))


@jitable
def cap(row, padded, softcap):
    """c tanh(score / c)."""
    for i in range(0, padded, places(row)):
        store(row, i, tanh(load(row, i) / softcap) * softcap)


@jitable
def slope_of_cap(row, slope, padded, softcap):
    """The derivative of `cap`, from its result."""
    for i in range(0, padded, places(row)):
        share = load(row, i) / softcap
        store(slope, i, 1.0 - share * share)


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
def hide_outside(row, padded, start, stop):
    """-inf before column start and from stop on."""
    width = places(row)
    start, stop = min(max(start, 0), padded), min(max(stop, 0), padded)
    for i in range(0, start // width * width, width):
        store(row, i, splat(row, -math.inf))
    for i in range(start // width * width, start):
        row[i] = -math.inf
    whole = min(padded, (stop + width - 1) // width * width)
    for i in range(stop, whole):
        row[i] = -math.inf
    for i in range(whole, padded, width):
        store(row, i, splat(row, -math.inf))


@jitable
def hide_masked(row, mask, step, stop):
    """-inf where mask[j * step] is 0, for the columns before `stop`."""
    width = places(row)
    if step == 0:
        if mask[0] == 0:
            for j in range(stop):
                row[j] = -math.inf
        return
    whole = stop // width * width
    for j in range(0, whole, width):
        v = load(row, j)
        store(row, j, select(nonzero(mask, j, v), v, -math.inf))
    for j in range(whole, stop):
        if mask[j] == 0:
            row[j] = -math.inf
