"""AdaSplash's module of this name."""

from diffmax.compat.adasplash._functions import entmax_attention

__all__ = ["entmax_attention"]
