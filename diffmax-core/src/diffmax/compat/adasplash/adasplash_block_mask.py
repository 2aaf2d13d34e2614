"""AdaSplash's module of this name."""

from diffmax.compat.adasplash._functions import adasplash_v1 as sparse_attn

__all__ = ["sparse_attn"]
