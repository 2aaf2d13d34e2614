"""The Fenchel-Young loss of diffmax, with the signature of `torch.nn.functional.cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.machine.dispatch import selected
from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import OR_FUNCTION, as_int, check_scores, check_settings, one_minus_alpha
from diffmax.operators.common.resettable import Resettable
from diffmax.operators.loss import operator as loss_operator
from diffmax.operators.loss.checks import check_reduction, check_target, check_weight
from diffmax.operators.rows.api import Alpha

__all__ = ["DiffmaxLoss", "diffmax_loss"]


@alone_in_child
def diffmax_loss(
    X: Tensor,
    target: Tensor,
    alpha: Alpha = 0.9,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    n_iter: int = 50,
    backend: str | None = None,
) -> Tensor:
    """The Fenchel-Young loss of `diffmax_bisect`: what cross-entropy is to softmax.

    L(x, y) = Omega(y) - Omega(p) + <p - y, x>,  p = diffmax_bisect(x, alpha),  Omega of Eq. 12   (Eq. 15)

    Its gradient for x is p - y. It is convex in x, never negative, and 0 exactly where p = y: for a class index, when its score
    exceeds all others by 1 / (1 - alpha) or more. The limit alpha -> 1 is cross-entropy (for soft targets minus the entropy of
    y, a constant), alpha -> 0 is the sparsemax loss.

    Args:
        X: Scores, (C,), (N, C) or (N, C, d1, ...), any strides. float16, bfloat16, float32 or float64. A class with score
            -inf is masked.
        target: Class indices of X's shape without the class dimension; or probabilities of X's shape, whose classes sum to 1.
        alpha: As for `diffmax_bisect`; a tensor broadcasts against X with the class dimension reduced to 1. For class indices
            its gradient is never negative: a lower alpha always has a lower loss, so this loss alone drives a learned alpha
            to 0.
        weight: One weight per class, (C,). For class indices, the loss of a row is multiplied by the weight of its class. For
            probabilities y, it is <w, y> times the loss for the target w*y / <w, y>, which has the same gradient as weighting
            the part of each class.
        ignore_index: Rows with this target have loss 0 and gradient 0, and are excluded from the mean.
        reduction: "mean", "sum" or "none". The mean is weighted for class indices as in `cross_entropy`.
        n_iter, backend: As for `diffmax_bisect`.
    Returns:
        A scalar, or one loss per row for "none", in X's dtype (under autocast, in float32). A row that is all -inf has loss 0
        and gradient 0; a row whose target is masked has loss inf; a row that holds NaN or +inf has loss NaN. The mean of no
        rows is NaN, as in `cross_entropy`.
    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, alpha, `reduction` or a target is out of range. On an accelerator, and under torch.compile,
            targets are not read: there the device reports an index that is out of range.
        NoBackendError: The named backend cannot run the call.
    Numerics: Computes in float32, for float64 in float64, as sums of nonnegative terms. Deterministic on CPU.
    Memory: Works on blocks of rows, of about 2**20 scores on CPU and 2**25 elsewhere. If X fits one block, its weights are
        saved for backward. Otherwise only X is saved, and backward recomputes the weights: besides X and its gradient, a
        call needs memory for one block. Double backward keeps dense weights.
    Source: docs/theory.md, section 12. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [5.0, 2.0, 1.0, 0.0]])
        >>> diffmax.diffmax_loss(scores, torch.tensor([0, 0]), alpha=0.5, reduction="none")
        tensor([0.0617, 0.0000])
    """
    name = "diffmax_loss"
    check_reduction(name, reduction)
    if is_captured(X, target, alpha, weight):
        given = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "n_iter": n_iter, "backend": backend}
        return captured(diffmax_loss, X, target, alpha, **given)  # type: ignore[no-any-return]
    if isinstance(X, Tensor) and X.ndim == 0:
        raise ValueError(f"{name}: X must have a dimension of classes, shape (C,), (N, C) or (N, C, ...), got shape ()")
    if type(X).__name__ == "DTensor":  # compared by name, because the import takes half a second
        from diffmax.operators.loss.of_shards import loss_of_dtensor

        if found := loss_of_dtensor(X, target, alpha, weight, ignore_index, n_iter):
            return reduce_losses(*found, reduction, X)
    dim = 0 if isinstance(X, Tensor) and X.ndim == 1 else 1
    dim = check_scores(name, X, dim, n_iter)
    check_target(name, X, target, dim, ignore_index)
    check_weight(name, X, weight, dim)
    e, e_tensor = one_minus_alpha(name, X, alpha() if callable(alpha) else alpha, dim, OR_FUNCTION)
    return fenchel_young(X, target, e, e_tensor, dim, weight, ignore_index, reduction, n_iter, backend)


def fenchel_young(
    X: Tensor,
    target: Tensor,
    e: float,
    e_tensor: Tensor | None,
    dim: int,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    n_iter: int,
    backend: str | None = None,
) -> Tensor:
    """`diffmax_loss` after its checks; e = 1 - alpha is a float or a tensor of the accumulation dtype."""
    if X.ndim == 1:
        X, target, dim = X.unsqueeze(0), target.unsqueeze(0), 1
        losses = fenchel_young(X, target, e, e_tensor, dim, weight, ignore_index, reduction, n_iter, backend)
        return losses.squeeze(0) if reduction == "none" else losses
    name, n_iter = selected(backend), as_int(n_iter)
    if target.is_floating_point():
        target, mass = (target, None) if weight is None else _reweighted(target, weight, dim)
        losses = loss_operator.loss(X, target, e, e_tensor, dim, n_iter, name).squeeze(dim)
        return reduce_losses(losses if mass is None else losses * mass, None, reduction, X)
    counts = target != ignore_index
    # -1 marks an ignored row; every other negative index becomes C, which is an error
    index = torch.where(counts, torch.where(target < 0, X.shape[dim], target), -1)
    losses = loss_operator.loss(X, index.unsqueeze(dim), e, e_tensor, dim, n_iter, name).squeeze(dim)
    share = counts.to(losses.dtype) if weight is None else weight.to(losses.dtype)[index.clamp_min(0)] * counts
    return reduce_losses(losses if weight is None else losses * share, share, reduction, X)


def reduce_losses(losses: Tensor, share: Tensor | None, reduction: str, X: Tensor) -> Tensor:
    """The sum or mean of `losses` in X's dtype; `share` is the weight of each row in the mean, None: 1."""
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean":
        losses = losses.mean() if share is None else losses.sum() / share.sum()
    autocast = X.device.type != "meta" and torch.is_autocast_enabled(
        X.device.type
    )  # "meta" has no autocast, and the query raises
    return losses if autocast else losses.to(X.dtype)


def _reweighted(target: Tensor, weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """w*y / <w, y> and <w, y>, where the classes of y are along `dim`."""
    dtype = torch.promote_types(target.dtype, torch.float32)
    per_class = weight.to(dtype).view([-1 if axis == dim else 1 for axis in range(target.ndim)])
    weighted = target.to(dtype) * per_class
    mass = weighted.sum(dim, keepdim=True)
    return weighted / torch.where(mass == 0, 1.0, mass), mass.squeeze(dim)


class DiffmaxLoss(Resettable):
    """`diffmax_loss` as a module: a drop-in for `torch.nn.CrossEntropyLoss`.

    Args:
        alpha: As for `diffmax_loss`. A tensor becomes a buffer, an nn.Parameter a parameter of the module.
        weight, ignore_index, reduction, n_iter: As for `diffmax_loss`; the weight becomes a buffer.
    Raises:
        ValueError: `reduction` is not "mean", "sum" or "none".
    Example:
        >>> import torch
        >>> loss = DiffmaxLoss(alpha=0.5, ignore_index=0)
        >>> loss(torch.randn(4, 10), torch.tensor([1, 2, 0, 3])).shape
        torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        alpha: Alpha = 0.9,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        n_iter: int = 50,
    ) -> None:
        super().__init__()
        check_reduction("DiffmaxLoss", reduction)
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"DiffmaxLoss: weight must be a tensor (C,) or None, got {type(weight).__name__}")
        check_settings("DiffmaxLoss", alpha, -1, n_iter)
        self.ignore_index, self.reduction, self.n_iter = ignore_index, reduction, n_iter
        self._store("weight", weight)
        self._store("alpha", alpha)

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores X; see `diffmax_loss`."""
        if is_captured(X, target):
            return captured(self, X, target)  # type: ignore[no-any-return]
        return diffmax_loss(
            X,
            target,
            self.alpha,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            n_iter=self.n_iter,
        )

    def extra_repr(self) -> str:
        """The settings that repr shows."""
        return f"alpha={self.alpha}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, n_iter={self.n_iter}"
