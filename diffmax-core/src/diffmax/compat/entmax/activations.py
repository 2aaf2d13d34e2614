"""entmax.activations: sparsemax and 1.5-entmax, and their modules."""

from __future__ import annotations

from torch import Tensor, nn

from diffmax.compat.entmax._parameters import check_k
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_scores
from diffmax.operators.rows.api import normalize

__all__ = ["Entmax15", "Sparsemax", "entmax15", "sparsemax"]


def sparsemax(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """The Euclidean projection of X's rows on the simplex: alpha' = 2, the limit alpha -> 0 of `diffmax_bisect`.

    Args:
        X: Scores, any shape and strides, float16, bfloat16, float32 or float64. -inf marks a masked entry.
        dim: Axis that sums to one.
        k: entmax's size of a partial sort. Checked, but without effect, because nothing is sorted.
    Returns:
        Tensor of X's shape, dtype and device. A row that is all -inf is all 0, with gradient 0.
    Raises:
        TypeError: X is not a tensor of a supported dtype, or an argument has the wrong type.
        ValueError: `dim` or k is out of range.
    Source: docs/theory.md, section 3; the signature is entmax's (MIT). Written for diffmax.
    Example:
        >>> import torch
        >>> sparsemax(torch.tensor([0.5, 0.25, -1.0]))
        tensor([0.6250, 0.3750, 0.0000])
    """
    if is_captured(X):
        return captured(sparsemax, X, dim, k)  # type: ignore[no-any-return]
    check_k("sparsemax", k)
    return normalize(X, 1.0, None, check_scores("sparsemax", X, dim, 1), 50, True)


def entmax15(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """1.5-entmax, which is `diffmax_bisect` at alpha = 1/2. Arguments, result and errors as for `sparsemax`.

    Example:
        >>> import torch
        >>> entmax15(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        tensor([0.8307, 0.1693, 0.0000, 0.0000])
    """
    if is_captured(X):
        return captured(entmax15, X, dim, k)  # type: ignore[no-any-return]
    check_k("entmax15", k)
    return normalize(X, 0.5, None, check_scores("entmax15", X, dim, 1), 50, True)


class Sparsemax(nn.Module):
    """`sparsemax` as a module.

    Example:
        >>> import torch
        >>> Sparsemax(dim=0)(torch.tensor([0.5, 0.25, -1.0]))
        tensor([0.6250, 0.3750, 0.0000])
    """

    def __init__(self, dim: int = -1, k: int | None = None) -> None:
        super().__init__()
        self.dim, self.k = dim, k

    def forward(self, X: Tensor) -> Tensor:
        """Weights for scores X."""
        return sparsemax(X, self.dim, self.k)


class Entmax15(nn.Module):
    """`entmax15` as a module.

    Example:
        >>> import torch
        >>> Entmax15()(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        tensor([0.8307, 0.1693, 0.0000, 0.0000])
    """

    def __init__(self, dim: int = -1, k: int | None = None) -> None:
        super().__init__()
        self.dim, self.k = dim, k

    def forward(self, X: Tensor) -> Tensor:
        """Weights for scores X."""
        return entmax15(X, self.dim, self.k)
