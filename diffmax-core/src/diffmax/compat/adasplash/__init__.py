"""AdaSplash compatibility: its names and signatures on diffmax. Use `from diffmax.compat import adasplash` in existing code.

alpha is entmax's alpha' = 2 - alpha, in (1, 2]. AdaSplash's limits do not apply: any length, any head dimension, fewer queries
than keys, grouped heads and every alpha in every function; alpha may also be a tensor, one number per head, with a gradient.
`niter`, `n_iter`, `use_histogram` and `fast_math` have no effect: thresholds are always solved to the precision of the dtype.
The submodules of AdaSplash 0.1 and 0.2 can be imported too.
"""

# The submodules come first: where a function has a submodule's name, the package's attribute is the function.
from diffmax.compat.adasplash import (
    adasplash_block_mask,  # noqa: F401
    attention,  # noqa: F401
)
from diffmax.compat.adasplash import adasplash_no_block_mask as _no_block_mask  # noqa: F401
from diffmax.compat.adasplash import adasplash_v2 as _v2  # noqa: F401
from diffmax.compat.adasplash import triton_entmax as _triton_entmax  # noqa: F401
from diffmax.compat.adasplash import triton_entmax_v2 as _triton_entmax_v2  # noqa: F401

from diffmax.compat.adasplash._functions import (  # isort: skip
    adasplash,
    adasplash2,
    adasplash_no_block_mask,
    adasplash_v1,
    adasplash_v2,
    triton_entmax,
    triton_entmax15,
    triton_entmax_v1,
    triton_entmax_v2,
    triton_sparsemax,
)
from diffmax.compat.adasplash._lazy import LazyAttention, lazy_attention_triton  # isort: skip

__all__ = [
    "LazyAttention",
    "adasplash",
    "adasplash2",
    "adasplash_no_block_mask",
    "adasplash_v1",
    "adasplash_v2",
    "lazy_attention_triton",
    "triton_entmax",
    "triton_entmax15",
    "triton_entmax_v1",
    "triton_entmax_v2",
    "triton_sparsemax",
]
