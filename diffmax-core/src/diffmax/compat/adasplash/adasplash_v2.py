"""Stands in for AdaSplash's module `adasplash_v2`."""

from diffmax.compat.adasplash._functions import adasplash_v2 as sparse_attn

__all__ = ["sparse_attn"]
