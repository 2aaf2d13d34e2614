"""Stands in for AdaSplash's module `attention`."""

from diffmax.compat.adasplash._functions import entmax_attention

__all__ = ["entmax_attention"]
