"""AdaSplash's module of this name."""

from diffmax.compat.adasplash._functions import triton_entmax_v1 as triton_entmax

__all__ = ["triton_entmax"]
