"""Tables by which the kernels take a power u^k, with u = 2^j (1 + f), as 2^(j k) looked up times a polynomial of f.

The polynomial depends on k, so a table is made for each. See `functions.powers_by_table`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffmax.kernels.numba.functions import DEGREE, DIGITS, FURTHER, TABLE
from diffmax.kernels.numba.simd import digit_bits

PowerTable: TypeAlias = "npt.NDArray[np.float32]"
Numbers: TypeAlias = "npt.NDArray[np.float64]"

# Up to this k the polynomial is right to 1e-8 of its value, between 1 and 2^k.
LARGEST = 10.0
_BIAS = 127  # of float32's exponents


@functools.lru_cache(maxsize=1024)
def table_of(k: float, degree: int = DEGREE) -> PowerTable | None:
    """The table of a k, or None where there are no tables: on this processor, or for so large a k."""
    bits = digit_bits()  # type: ignore[no-untyped-call]
    return None if bits == 0 or k > LARGEST else tables_for(bits, (k,), degree)[0]


def tables_for(bits: int, k: Sequence[float], degree: int) -> PowerTable:
    """A table for each k, of a processor that looks up digits of so many bits; the polynomial's degree is `DEGREE` at most."""
    exponents, bases, polynomial_from = _grid(bits, degree)
    column = np.array(k, np.float64)[:, None]
    tables = np.zeros((len(k), TABLE), np.float32)
    with np.errstate(under="ignore"):  # whoever has underflows raised wants it of their own numbers
        powers = np.exp2(column * exponents)
        tables[:, : 2 * DIGITS], tables[:, FURTHER] = powers[:, :-1], powers[:, -1]
    tables[:, FURTHER - degree - 1 : FURTHER] = ((bases**column)[:, None] * polynomial_from).sum(2)
    return tables


@functools.cache
def _grid(bits: int, degree: int) -> tuple[Numbers, Numbers, Numbers]:
    """What all k share: the exponents that are looked up; 1 + f at Chebyshev's nodes, for f from 0 to 1; and by what the powers
    there are multiplied to be the polynomial's coefficients, the highest power first.
    """
    places = np.arange(DIGITS) % (1 << bits)
    low, high = _BIAS % (1 << bits), (_BIAS >> bits) % (1 << bits)
    exponents = np.concatenate((places - low, (1 << bits) * np.minimum(places - high, 0), [-64]))
    nodes = 0.5 + 0.5 * np.cos(np.pi * (2 * np.arange(degree + 1) + 1) / (2 * degree + 2))
    return exponents, 1.0 + nodes, np.linalg.inv(np.vander(nodes))
