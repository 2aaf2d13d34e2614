"""How far a timed result may be from the truth: twice what the plain reference errs in the same dtype, and 2 ulp.

The conformance kits draw that yardstick anew for each small case. Here results are large, so that their largest error is one of
many, and small where rows are long: an ulp is one of the result's own size, not of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest(exact: Tensor, same_dtype: Tensor) -> float:
    """For the largest error of a result."""
    error = float((same_dtype.double() - exact).abs().max())
    return 2 * error + 2 * torch.finfo(same_dtype.dtype).eps * float(exact.abs().max())


def average(exact: Tensor, same_dtype: Tensor, dtype: torch.dtype) -> float:
    """For the mean error: at the edge of the support the largest is a matter of luck, for the reference too."""
    error = float((same_dtype.double() - exact).abs().mean())
    return 4 * error + 6 * torch.finfo(dtype).eps * float(exact.abs().mean())
