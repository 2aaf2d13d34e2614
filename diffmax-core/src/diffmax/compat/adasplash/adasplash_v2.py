"""AdaSplash's module of this name."""

from diffmax.compat.adasplash._functions import adasplash_v2 as sparse_attn

__all__ = ["sparse_attn"]
