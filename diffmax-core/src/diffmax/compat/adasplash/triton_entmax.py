"""Stands in for AdaSplash's module `triton_entmax`."""

from diffmax.compat.adasplash._functions import triton_entmax_v1 as triton_entmax

__all__ = ["triton_entmax"]
