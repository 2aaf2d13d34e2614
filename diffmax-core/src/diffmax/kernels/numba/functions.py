"""Elementary functions of vectors: logarithm, exponential and power, as polynomials on the bits of the floats."""

import math

import numpy as np
from numba.core import types

from diffmax.kernels.numba.parts import jitable, part
from diffmax.kernels.numba.simd import (
    about_inverse,
    array_at,
    digit_bits,
    digit_of,
    horner,
    inverse_power,
    larger,
    load,
    nearest_integer,
    round_shifted,
    select,
    split_exponent,
    store,
    times_power,
)

LOG2_E = 1 / math.log(2)
LN_2 = math.log(2)
TINY = 2.0**-60
# A table of powers (`tables`): places for each of two digits of an exponent, the coefficients of a polynomial, and 2^(-64 k).
DIGITS, DEGREE = 16, 10
FURTHER = 2 * DIGITS + DEGREE + 1
TABLE = FURTHER + 1
# Two digits of three bits tell the exponents from here to 1 apart; what is smaller is multiplied by the last place.
NEAR = 2.0**-63
OF_SLOPES = 8  # the degree that serves for k < 1
WHOLE = 10  # the largest k that `integer_power` knows; a larger number in its place is the address of a table
NONE = -(2.0**40)  # where a logarithm is that of 0

# Minimax polynomials on [sqrt(1/2) - 1, sqrt(2) - 1] and [-1/2, 1/2], highest power first, fitted by Remez's algorithm;
# tests/test_numba.py measures their errors.
LN_SINGLE = (
    0.0892738476395607,
    -0.1434476375579834,
    0.14871077239513397,
    -0.1656622588634491,
    0.19966071844100952,
    -0.25001731514930725,
    0.3333383798599243,
)  # (ln(1+f) - f + f^2/2) / f^3
LN_DOUBLE = (
    0.13087952782511061,
    0.13268637477942022,
    0.1538624515244538,
    0.18181795531586203,
    0.2222222239282366,
    0.28571428570798213,
    0.40000000000000885,
    0.6666666666666666,
)  # (ln(1+f) - 2s) / s^3 in s^2, where s = f / (2 + f)
EXP2_SINGLE = (
    0.00015476277621928602,
    0.0013400234747678041,
    0.009618003852665424,
    0.055503278970718384,
    0.24022650718688965,
    0.6931471824645996,
)  # (2^f - 1) / f
EXP2_DOUBLE = (
    2.574172811494457e-11,
    4.456665824660387e-10,
    7.054888313927745e-09,
    1.0178051262926064e-07,
    1.3215486832869844e-06,
    1.5252733856102098e-05,
    0.00015403530393341358,
    0.001333355814639059,
    0.009618129107628494,
    0.0555041086648217,
    0.24022650695910072,
    0.6931471805599453,
)
PHI_SINGLE = tuple(1 / math.factorial(j) for j in range(12, 1, -1))
PHI_DOUBLE = tuple(1 / math.factorial(j) for j in range(19, 1, -1))
RECIPROCAL = (0.8612282276153564, -1.1224395036697388, 1.0195624828338623, -0.9969961643218994, 0.9997742176055908)  # 1/(1+f)


def ln_1p(f):
    """ln(1 + f) for f between sqrt(1/2) - 1 and sqrt(2) - 1."""


@part(ln_1p)
def _ln_1p(f):
    if f.element == types.float32:
        return lambda f: f + f * f * (f * horner(f, LN_SINGLE) - 0.5)

    def double(f):
        s = f / (f + 2.0)
        square = s * s
        return 2.0 * s + s * square * horner(square, LN_DOUBLE)

    return double


def exp2_m1(f):
    """2^f - 1 for f between -1/2 and 1/2."""


@part(exp2_m1)
def _exp2_m1(f):
    if f.element == types.float32:
        return lambda f: f * horner(f, EXP2_SINGLE)
    return lambda f: f * horner(f, EXP2_DOUBLE)


def lowest_exponent(y):
    """The least y with 2^y a normal number."""


@part(lowest_exponent)
def _lowest_exponent(y):
    lowest = -126.0 if y.element == types.float32 else -1022.0
    return lambda y: lowest


def smallest_normal(v):
    """The least positive number that is not subnormal."""


@part(smallest_normal)
def _smallest_normal(v):
    least = float(np.finfo(np.float32 if v.element == types.float32 else np.float64).tiny)
    return lambda v: least


@jitable
def exp2(y):
    """2^y for y <= 0.5; below the normal numbers the least of them."""
    y = larger(y, lowest_exponent(y))
    i, shifted = round_shifted(y)
    return times_power(exp2_m1(y - i) + 1.0, shifted)


@jitable
def exp_m1(x):
    """e^x - 1 for x <= 0, with all digits near 0."""
    x = larger(x, lowest_exponent(x) * LN_2)
    i, scale = nearest_integer(x * LOG2_E)
    return (scale - 1.0) + scale * exp2_m1(x * LOG2_E - i)  # fused, so x log2(e) is not rounded


@jitable
def ln(a):
    """ln a for a > 0."""
    j, scale = split_exponent(a)
    return j * LN_2 + ln_1p(a * scale - 1.0)


@jitable
def powers(z, p, other, start, stop, step, delta, k, k_log2):
    """p = [1 + w]^k, 0 for w <= -1, where w = z - delta, for the vectors of z at start, start + step, ...

    Three loops, `other` between them: a processor sees the next vectors while it waits for a step of this one, if the way of a
    vector through a loop is short.
    """
    for i in range(start, stop, step):
        w = load(z, i) - delta
        inside = larger(w, -1.0)
        j, scale = split_exponent(larger(inside + 1.0, TINY))
        store(p, i, inside * scale + (scale - 1.0))
        store(other, i, select(w > -1.0, k * j, NONE))
    for i in range(start, stop, step):
        store(p, i, k_log2 * ln_1p(load(p, i)) + load(other, i))
    for i in range(start, stop, step):
        y = load(p, i)
        store(p, i, select(y > NONE / 2.0, exp2(y), 0.0))


_low_digit, _high_digit = digit_of(0), digit_of(1)


def powers_by_table(z, p, other, start, stop, step, delta, at):
    """As `powers`, of a k whose table (`tables`) begins at the address."""


@part(powers_by_table)
def _powers_by_table(z, p, other, start, stop, step, delta, at):
    if not has_table(z.dtype):
        return lambda z, p, other, start, stop, step, delta, at: None

    def by_table(z, p, other, start, stop, step, delta, at):
        table = array_at(at, TABLE, np.float32)
        polynomial = coefficients(table)
        for i in range(start, stop, step):
            w = load(z, i) - delta
            inside = larger(w, -1.0)
            u = larger(inside + 1.0, TINY)
            scale = inverse_power(u)
            store(p, i, inside * scale + (scale - 1.0))
            store(other, i, select(w > -1.0, power_near(table, u), 0.0))
        for i in range(start, stop, step):
            store(p, i, horner(load(p, i), polynomial) * load(other, i))

    return by_table


def has_table(dtype):
    """Whether powers are computed by tables, in a dtype (torch's, NumPy's or Numba's)."""
    return digit_bits() > 0 and str(dtype).removeprefix("torch.") == "float32"


@jitable
def power_near(table, u):
    """2^(j k) for the exponents j of u, from `NEAR` to 1, from the table of a k."""
    return _low_digit(load(table, 0), u) * _high_digit(load(table, DIGITS), u)


def power_of_exponent(table, u):
    """`power_near` for any normal u up to 1."""


@part(power_of_exponent)
def _power_of_exponent(table, u):
    if digit_bits() == 4:
        return lambda table, u: power_near(table, u)

    def with_further(table, u):
        about = power_near(table, u)
        return select(u < NEAR, about * table[FURTHER], about)

    return with_further


@jitable
def coefficients(table):
    """Those of a table's polynomial, the highest power first."""
    return table[2 * DIGITS], table[2 * DIGITS + 1], *of_slopes(table)


@jitable
def of_slopes(table):
    """`coefficients` without those that are 0 in the table of a k < 1."""
    at = FURTHER - OF_SLOPES - 1
    return (
        *(table[at], table[at + 1], table[at + 2], table[at + 3], table[at + 4]),
        *(table[at + 5], table[at + 6], table[at + 7], table[at + 8]),
    )


@jitable
def power_of_two(j, log_f, factor):
    """2^(factor (j + log_f / ln 2)) for a result below 1."""
    fraction, shifted = exponent_of(j, log_f, factor)
    return times_power(exp2_m1(fraction) + 1.0, shifted)


@jitable
def exponent_of(j, log_f, factor):
    """The exponent of `power_of_two`: its fraction, and its integer as `times_power` takes it. Only the fraction is rounded."""
    by_log = factor * LOG2_E
    rounded = log_f * by_log + j * factor
    i, shifted = round_shifted(larger(rounded, lowest_exponent(log_f)))
    return larger(log_f * by_log + (j * factor - i), -0.5), shifted


@jitable
def integer_power(u, k):
    """u^(k - 2) for k = 2, 3, 4, 5 or 10."""
    if k == 2:
        return select(u > 0.0, u * 0.0 + 1.0, 0.0)
    if k == 3:
        return u
    square = u * u
    if k == 4:
        return square
    if k == 5:
        return square * u
    fourth = square * square
    return fourth * fourth


def refined(about, u):
    """1 / u by Newton's method from something within 0.03 % of it."""


@part(refined)
def _refined(about, u):
    if u.element == types.float32:
        return lambda about, u: about * (2.0 - about * u)

    def double(about, u):
        about = about * (2.0 - about * u)
        return about * (2.0 - about * u)

    return double


def inverse(u):
    """1 / u of normal numbers, within 3e-7 in float32."""


@part(inverse)
def _inverse(u):
    if u.element == types.float64 or digit_bits() == 0:
        return lambda u: 1.0 / u

    def by_newton(u):
        about = about_inverse(u)
        return about * (2.0 - about * u)

    return by_newton


def phi_series(v):
    """(exp(v) - 1 - v) / v^2 for 0 <= v <= 1."""


@part(phi_series)
def _phi_series(v):
    if v.element == types.float32:
        return lambda v: horner(v, PHI_SINGLE)
    return lambda v: horner(v, PHI_DOUBLE)
