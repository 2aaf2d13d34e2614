"""The public functions on rows of scores; `diffmax.operators.rows.api` has them."""

from diffmax.operators.rows.api import Alpha, diffmax_bisect, normalize

__all__ = ["Alpha", "diffmax_bisect", "normalize"]
