"""Stands in for retention's module `_utils`."""

from diffmax.compat.power_attention._functions import compute_expanded_dim

__all__ = ["compute_expanded_dim"]
