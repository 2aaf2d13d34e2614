"""The checks of the row operator, their kit for backends, and rows that break careless kernels."""

from diffmax.testing.rows.nasty import NASTY_ROWS

__all__ = ["NASTY_ROWS"]
