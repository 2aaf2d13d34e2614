"""Stands in for AdaSplash's module `adasplash_no_block_mask`."""

from diffmax.compat.adasplash._functions import adasplash_no_block_mask as sparse_attn

__all__ = ["sparse_attn"]
