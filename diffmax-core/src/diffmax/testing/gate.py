"""How far a kernel may be from the truth: measured on the plain-PyTorch reference, not chosen by hand."""

import torch
from torch import Tensor


def allowed_error(exact: Tensor, same_dtype: Tensor) -> float:
    """Twice the reference's own error in that dtype, and 2 ulp.

    Args:
        exact: The result in float64.
        same_dtype: What `diffmax.reference` returns for the input in the dtype under test.
    Returns:
        The largest error that a kernel may have on that input.
    """
    return 2 * _error(exact, same_dtype) + 2 * _ulp(exact, same_dtype.dtype)


def allowed_error_in_float64(exact: Tensor, in_float32: Tensor) -> float:
    """How far two float64 computations may be apart: each by as many ulp as the reference errs by in float32.

    Args:
        exact: The result in float64, with an error of its own.
        in_float32: What the reference returns for the same input in float32.
    """
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 2 * (2 * ratio * _error(exact, in_float32) + 2 * _ulp(exact, torch.float64))


def _error(exact: Tensor, other: Tensor) -> float:
    return float((other.double() - exact).detach().abs().nan_to_num().max()) if exact.numel() else 0.0


def _ulp(exact: Tensor, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * max(1.0, float(exact.detach().abs().nan_to_num().max()) if exact.numel() else 0.0)
