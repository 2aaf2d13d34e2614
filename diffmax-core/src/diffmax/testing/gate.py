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
    ulp = torch.finfo(same_dtype.dtype).eps * max(1.0, float(exact.abs().nan_to_num().max()) if exact.numel() else 0.0)
    return 2 * float((same_dtype.double() - exact).abs().nan_to_num().max() if exact.numel() else 0.0) + 2 * ulp
