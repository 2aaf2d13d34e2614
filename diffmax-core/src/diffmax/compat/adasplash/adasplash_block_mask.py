"""Stands in for AdaSplash's module `adasplash_block_mask`."""

from diffmax.compat.adasplash._functions import adasplash_v1 as sparse_attn

__all__ = ["sparse_attn"]
