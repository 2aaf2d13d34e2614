"""Stands in for AdaSplash's module `triton_entmax_v2`."""

from diffmax.compat.adasplash._functions import triton_entmax, triton_entmax15, triton_sparsemax

__all__ = ["triton_entmax", "triton_entmax15", "triton_sparsemax"]
