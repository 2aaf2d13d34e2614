"""The functions of core that a backend's kernels may import, under `SHARED_KERNELS_VERSION`; the rest of core is private.

Numerics of the accumulation dtype, the rules of attention's scores (`rules`, `Region`), packed sequences, and the bits of live
tiles. `diffmax.plugin` has the calls and bundles that kernels receive, `diffmax.reference` the definition of their results.
"""

from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.packing import Packing, packings
from diffmax.operators.attention.scores import Pages, Region, visible_span
from diffmax.operators.attention.tiles import WORD, live_shape, packed_bits, tiles_with, unpacked_bits
from diffmax.operators.common.numerics import (
    FLOAT_DTYPES,
    MIN_E,
    accumulation_dtype,
    alpha_weight,
    clamp_e,
    integer_exponent,
    newton_steps,
)
from diffmax.reference.attention import padded_call, padded_saved, times, unpadded

__all__ = [
    "FLOAT_DTYPES",
    "MIN_E",
    "WORD",
    "Packing",
    "Pages",
    "Region",
    "accumulation_dtype",
    "alpha_weight",
    "clamp_e",
    "integer_exponent",
    "live_shape",
    "newton_steps",
    "packed_bits",
    "packings",
    "padded_call",
    "padded_saved",
    "rules",
    "tiles_with",
    "times",
    "unpacked_bits",
    "unpadded",
    "visible_span",
]
