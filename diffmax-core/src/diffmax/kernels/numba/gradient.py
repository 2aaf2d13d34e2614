"""What a row's gradient is made of: the slopes s = p^alpha and the weights of alpha (Eq. 6), from p or from the scores."""

import numpy as np
from numba.core import types

from diffmax.kernels.numba.functions import (
    LN_2,
    LOG2_E,
    RECIPROCAL,
    TABLE,
    TINY,
    WHOLE,
    coefficients,
    exp2_m1,
    exponent_of,
    has_table,
    integer_power,
    inverse,
    ln_1p,
    of_slopes,
    phi_series,
    power_near,
    power_of_exponent,
    power_of_two,
    refined,
    smallest_normal,
)
from diffmax.kernels.numba.parts import jitable, part
from diffmax.kernels.numba.simd import (
    array_at,
    bits,
    get,
    horner,
    inverse_power,
    larger,
    load,
    mantissa,
    nearest_integer,
    places,
    put,
    select,
    smaller,
    splat,
    split_exponent,
    square_root,
    store,
    times_power,
    total,
)
from diffmax.kernels.numba.solver import SUMMED


@jitable
def slopes_from_weights(weights, e):
    """s = p^alpha, and ln p as j and log_f with ln p = j ln 2 + log_f; where p is 0, s is 0 and ln p finite."""
    normal = larger(weights, smallest_normal(weights))
    j, scale = split_exponent(normal)
    log_f = ln_1p(normal * scale - 1.0)
    return select(weights > 0.0, power_of_two(j, log_f, 1.0 - e), 0.0), j, log_f


@jitable
def slopes_from_scores(w, e, k):
    """s, p, and ln p as `slopes_from_weights`, from w = z - delta, for weights that p's own dtype has flushed to zero."""
    inside = larger(w, -1.0)
    j, scale = split_exponent(larger(inside + 1.0, TINY))
    j, log_f = j * k, ln_1p(inside * scale + (scale - 1.0)) * k
    live = w > -1.0
    return (
        select(live, power_of_two(j, log_f, 1.0 - e), 0.0),
        select(live, power_of_two(j, log_f, e * 0.0 + 1.0), 0.0),
        j,
        log_f,
    )


def _power_again(w, e, k):
    """The first two results of `slopes_from_scores`; in float32 by one power, as s = p / [z - t]."""


@part(_power_again)
def _of_dtype(w, e, k):
    if w.element == types.float64:
        return lambda w, e, k: slopes_from_scores(w, e, k)[:2]

    def single(w, e, k):
        inside = larger(w, -1.0)
        u = larger(inside + 1.0, TINY)
        j, scale = split_exponent(u)
        f = inside * scale + (scale - 1.0)
        weights = select(w > -1.0, power_of_two(j * k, ln_1p(f) * k, e * 0.0 + 1.0), 0.0)
        return weights * refined(scale * horner(f, RECIPROCAL), u), weights

    return single


def _powers_by_table(w, at):
    """As `_power_again`, where the table of k begins at the address."""


@part(_powers_by_table)
def _of_table(w, at):
    if not has_table(w.element):
        return lambda w, at: (w, w)

    def by_table(w, at):
        table = array_at(at, TABLE, np.float32)
        inside = larger(w, -1.0)
        u = larger(inside + 1.0, TINY)
        scale = inverse_power(u)
        f = inside * scale + (scale - 1.0)
        weights = select(w > -1.0, horner(f, coefficients(table)) * power_near(table, u), 0.0)
        return weights * inverse(u), weights

    return by_table


@jitable
def slopes_and_weights(w, e, k, integer):
    """s and p from w = z - delta; `integer` is k if that is a whole number, or where its table begins."""
    if integer == 0:
        return _power_again(w, e, k)
    if integer > WHOLE:
        return _powers_by_table(w, integer)
    inside = larger(w, -1.0)
    u = inside + 1.0
    slopes = integer_power(u, integer) * u
    return slopes, slopes * (u + (inside - (u - 1.0)) * k)


@jitable
def alpha_weight(p, j, log_f, e):
    """w = p phi(ln p) (Eq. 6): a series where v = -e ln p is small, so that no digit is lost as alpha -> 1."""
    log_p = j * LN_2 + log_f
    v = 0.0 - log_p * e
    i, scale = nearest_integer(0.0 - v * LOG2_E)
    exp_v = (1.0 + exp2_m1((i - j * e) - log_f * (e * LOG2_E))) / scale
    far = (exp_v - 1.0 - v) / (e * e)
    return p * select(v < 1.0, log_p * log_p * phi_series(smaller(v, 1.0)), far)


@jitable
def square_roots(p, g, s, start, stop):
    """Write s for alpha = 1/2 and the vectors from start to stop; returns the sums of s and s g, lane by lane."""
    width = places(s)
    sums = products = splat(s, 0.0)
    for i in range(start, stop, width):
        slopes = square_root(load(p, i))
        sums, products = sums + slopes, products + slopes * load(g, i)
        store(s, i, slopes)
    return sums, products


@jitable
def few_slopes(p, g, s, start, stop, e):
    """As `square_roots`, of any alpha, for a few vectors."""
    sums = products = splat(s, 0.0)
    for i in range(start, stop, places(s)):
        slopes = slopes_from_weights(load(p, i), e)[0]
        sums, products = sums + slopes, products + slopes * load(g, i)
        store(s, i, slopes)
    return sums, products


@jitable
def slope_sums(p, g, s, other, live, start, stop, e):
    """As `square_roots`, of any alpha, in loops as those of `functions.powers`, over the vectors that hold a weight.

    `other` has room for a vector of each of them, `live` for a number.
    """
    width, count, zero = places(s), 0, splat(s, 0.0)
    for i in range(start, stop, width):
        store(s, i, zero)
        live[count] = i
        count += 1 if bits(load(p, i) > 0.0) != 0 else 0
    for n in range(count):
        weights = load(p, live[n])
        normal = larger(weights, smallest_normal(weights))
        j, scale = split_exponent(normal)
        store(s, live[n], normal * scale - 1.0)
        store(other, n * width, j)
    for n in range(count):
        store(s, live[n], ln_1p(load(s, live[n])))
    for n in range(count):
        fraction, integer = exponent_of(load(other, n * width), load(s, live[n]), 1.0 - e)
        store(s, live[n], fraction)
        store(other, n * width, integer)
    sums = products = zero
    for n in range(count):
        i = live[n]
        slopes = select(load(p, i) > 0.0, times_power(exp2_m1(load(s, i)) + 1.0, load(other, n * width)), 0.0)
        sums, products = sums + slopes, products + slopes * load(g, i)
        store(s, i, slopes)
    return sums, products


def slope_sums_by_table(p, g, s, other, live, start, stop, at):
    """As `slope_sums`, where the table of alpha (`tables`) begins at the address."""


@part(slope_sums_by_table)
def _slope_sums_by_table(p, g, s, other, live, start, stop, at):
    if not has_table(s.dtype):
        return lambda p, g, s, other, live, start, stop, at: (splat(s, 0.0), splat(s, 0.0))

    def by_table(p, g, s, other, live, start, stop, at):
        width, count, zero = places(s), 0, splat(s, 0.0)
        for i in range(start, stop, width):
            store(s, i, zero)
            live[count] = i
            count += 1 if bits(load(p, i) > 0.0) != 0 else 0
        table = array_at(at, TABLE, np.float32)
        polynomial = of_slopes(table)
        for n in range(count):
            weights = load(p, live[n])
            normal = larger(weights, smallest_normal(weights))
            store(s, live[n], mantissa(normal) - 1.0)
            store(other, n * width, select(weights > 0.0, power_of_exponent(table, normal), 0.0))
        sums = products = zero
        for n in range(count):
            i = live[n]
            slopes = horner(load(s, i), polynomial) * load(other, n * width)
            sums, products = sums + slopes, products + slopes * load(g, i)
            store(s, i, slopes)
        return sums, products

    return by_table


@jitable
def slope_and_alpha_sums(p, g, s, w, start, stop, e):
    """As `slope_sums`, and writes w of Eq. 6."""
    width = places(s)
    zero = splat(s, 0.0)
    sums, products = zero, zero
    for i in range(start, stop, width):
        weights = load(p, i)
        slopes = of_alpha = zero
        if bits(weights > 0.0) != 0:
            slopes, j, log_f = slopes_from_weights(weights, e)
            of_alpha = alpha_weight(weights, j, log_f, e)
            sums, products = sums + slopes, products + slopes * load(g, i)
        store(s, i, slopes)
        store(w, i, of_alpha)
    return sums, products


@jitable
def score_sums(x, g, s, w, start, stop, e, top, delta):
    """As `slope_and_alpha_sums`, from the scores: for weights that p's own dtype has flushed to zero."""
    width = places(s)
    sums = products = splat(s, 0.0)
    k = 1.0 / e
    for i in range(start, stop, width):
        slopes, weights, j, log_f = slopes_from_scores((load(x, i) - top) * e - delta, e, k)
        sums, products = sums + slopes, products + slopes * load(g, i)
        store(s, i, slopes)
        store(w, i, alpha_weight(weights, j, log_f, e))
    return sums, products


@jitable
def weights_again(x, p, s, start, stop, e, top, delta, integer, wants_alpha):
    """Write p and s for the vectors of scores from start to stop, and w of Eq. 6 over the scores if that is wanted."""
    width = places(x)
    k, zero = 1.0 / e, e * 0.0
    for i in range(start, stop, width):
        w = (load(x, i) - top) * e - delta
        slopes = weights = of_alpha = zero
        if bits(w > -1.0) != 0:
            if wants_alpha:
                slopes, weights, j, log_f = slopes_from_scores(w, e, k)
                of_alpha = select(w > -1.0, alpha_weight(weights, j, log_f, e), 0.0)
            else:
                slopes, weights = slopes_and_weights(w, e, k, integer)
        store(p, i, weights)
        store(s, i, slopes)
        if wants_alpha:
            store(x, i, of_alpha)


@jitable
def centred(s, g, grad_x, n, mean):
    """grad_x = s (g - mean)."""
    width = places(s)
    whole = n // width * width
    for i in range(0, whole, width):
        store(grad_x, i, load(s, i) * (load(g, i) - mean))
    for i in range(whole, n):
        put(grad_x, i, s[i] * (get(g, i) - mean))


@jitable
def centred_sum(w, g, n, mean, rounded):
    """The sum of w (g - mean), where `rounded` is the mean in the computing dtype."""
    width = places(w)
    whole = n // width * width
    result, weight = 0.0, 0.0
    for block in range(0, whole, SUMMED):
        part = parts = splat(w, 0.0)
        for i in range(block, min(block + SUMMED, whole), width):
            v = load(w, i)
            part, parts = part + v * (load(g, i) - rounded), parts + v
        result, weight = result + total(part), weight + total(parts)
    for i in range(whole, n):
        result, weight = result + w[i] * (get(g, i) - rounded), weight + w[i]
    return result - (mean - rounded) * weight
