"""Tables by which the kernels take a power u^k, with u = 2^j (1 + f), as 2^(j k) looked up times a polynomial of f.

The polynomial depends on k, so a table is made for each. See `functions.powers_by_table`.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffmax.kernels.numba.functions import DEGREE, DIGITS, FURTHER, TABLE
from diffmax.kernels.numba.simd import digit_bits

PowerTable: TypeAlias = "npt.NDArray[np.float32]"

# Up to this k the polynomial is right to 1e-8 of its value, between 1 and 2^k.
LARGEST = 10.0
_BIAS = 127  # of float32's exponents


@functools.lru_cache(maxsize=1024)
def table_of(k: float, degree: int = DEGREE) -> PowerTable | None:
    """The table of a k, or None where there are no tables: on this processor, or for so large a k."""
    bits = digit_bits()  # type: ignore[no-untyped-call]
    return None if bits == 0 or k > LARGEST else table_for(bits, k, degree)


def table_for(bits: int, k: float, degree: int) -> PowerTable:
    """The table of a k for a processor that looks up digits of so many bits; the polynomial's degree is `DEGREE` at most."""
    places = np.arange(DIGITS) % (1 << bits)
    low, high = _BIAS % (1 << bits), (_BIAS >> bits) % (1 << bits)
    table = np.empty(TABLE, np.float32)
    with np.errstate(under="ignore"):  # whoever has underflows raised wants it of their own numbers
        table[:DIGITS] = 2.0 ** (k * (places - low))
        table[DIGITS : 2 * DIGITS] = 2.0 ** (k * (1 << bits) * np.minimum(places - high, 0))
        table[FURTHER] = 2.0 ** (-64 * k)
    nodes = 0.5 + 0.5 * np.cos(np.pi * (2 * np.arange(degree + 1) + 1) / (2 * degree + 2))  # Chebyshev's, for f from 0 to 1
    polynomial = np.linalg.solve(np.vander(nodes), (1.0 + nodes) ** k)
    table[2 * DIGITS : FURTHER] = np.concatenate((np.zeros(DEGREE - degree), polynomial))
    return table
