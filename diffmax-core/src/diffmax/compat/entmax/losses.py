"""entmax.losses: the losses whose gradient is p - y, and their modules."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.compat.entmax._normmax import normmax_losses
from diffmax.compat.entmax._parameters import check_k, check_values, order_minus_one
from diffmax.compat.entmax.root_finding import norm_order
from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_scores
from diffmax.operators.common.numerics import MIN_E
from diffmax.operators.common.resettable import Resettable
from diffmax.operators.loss.api import fenchel_young, reduce_losses
from diffmax.operators.loss.checks import check_ignore_index, check_reduction, check_target

__all__ = [
    "Entmax15Loss",
    "EntmaxBisectLoss",
    "NormmaxBisectLoss",
    "SparsemaxBisectLoss",
    "SparsemaxLoss",
    "entmax15_loss",
    "entmax_bisect_loss",
    "normmax_bisect_loss",
    "sparsemax_bisect_loss",
    "sparsemax_loss",
]

IGNORE_INDEX = -100
REDUCTIONS = ("elementwise_mean", "mean", "sum", "none")


def sparsemax_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """The sparsemax loss of every row: `diffmax_loss` in the limit alpha -> 0, with reduction="none".

    Args:
        X: Scores, (C,), (N, C) or (N, C, d1, ...), float16, bfloat16, float32 or float64. A class with score -inf is masked.
        target: Class indices of X's shape without the class dimension; rows with -100 are ignored. Or probabilities of X's
            shape.
        k: entmax's size of a partial sort. Checked, but without effect, because nothing is sorted.
    Returns:
        One loss per row, in X's dtype.
    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, k or a target is out of range.
    Source: docs/theory.md, section 12; the signature is entmax's (MIT). Written for diffmax.
    Example:
        >>> import torch
        >>> sparsemax_loss(torch.tensor([[0.5, 0.25, -1.0]]), torch.tensor([1]))
        tensor([0.3906])
    """
    check_k("sparsemax_loss", k)
    return _losses("sparsemax_loss", X, target, 2, 50, IGNORE_INDEX, "none")


def sparsemax_bisect_loss(X: Tensor, target: Tensor, n_iter: int = 50) -> Tensor:
    """`sparsemax_loss` with a number of steps, as for `diffmax.diffmax_bisect`.

    Example:
        >>> import torch
        >>> sparsemax_bisect_loss(torch.tensor([[0.5, 0.25, -1.0]]), torch.tensor([1]))
        tensor([0.3906])
    """
    return _losses("sparsemax_bisect_loss", X, target, 2, n_iter, IGNORE_INDEX, "none")


def entmax15_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """The 1.5-entmax loss of every row: `diffmax_loss` at alpha = 1/2. Arguments and errors as for `sparsemax_loss`.

    Example:
        >>> import torch
        >>> entmax15_loss(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor([0.0617])
    """
    check_k("entmax15_loss", k)
    return _losses("entmax15_loss", X, target, 1.5, 50, IGNORE_INDEX, "none")


def entmax_bisect_loss(X: Tensor, target: Tensor, alpha: float | Tensor = 1.5, n_iter: int = 50) -> Tensor:
    """The alpha'-entmax loss of every row: `diffmax_loss` at alpha = 2 - alpha', with cross-entropy at alpha' = 1.

    Args:
        X, target: As for `sparsemax_loss`.
        alpha: entmax's alpha', in [1, 2]: a number, or a tensor that broadcasts against X with the class dimension reduced to
            1. It may require a gradient. Above 2 entmax has a loss, but this function does not; `entmax_bisect` has the map.
        n_iter: As for `diffmax.diffmax_bisect`.
    Returns:
        One loss per row, in X's dtype.
    Raises:
        TypeError, ValueError: As for `sparsemax_loss`, and for an alpha outside [1, 2] or of a shape that does not fit.
    Example:
        >>> import torch
        >>> entmax_bisect_loss(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0]), alpha=1.5)
        tensor([0.0617])
    """
    return _losses("entmax_bisect_loss", X, target, alpha, n_iter, IGNORE_INDEX, "none")


def normmax_bisect_loss(X: Tensor, target: Tensor, alpha: float | Tensor = 2, n_iter: int = 50) -> Tensor:
    """The normmax loss of every row (Eq. 24), whose gradient is normmax_bisect(X, alpha) - y.

    Args:
        X: As for `sparsemax_loss`.
        target: Class indices of X's shape without the class dimension; rows with -100 are ignored.
        alpha: Order of the norm, as for `normmax_bisect`.
        n_iter: As for `diffmax.diffmax_bisect`.
    Returns:
        One loss per row, in X's dtype.
    Raises:
        TypeError, ValueError: As for `sparsemax_loss` and `normmax_bisect`, and for a target of probabilities.
    Example:
        >>> import torch
        >>> normmax_bisect_loss(torch.tensor([[1.0, 0.75, 0.0]]), torch.tensor([1]))
        tensor([0.4290])
    """
    return _normmax_losses("normmax_bisect_loss", X, target, alpha, n_iter, IGNORE_INDEX, "none")


class _Loss(Resettable):
    """Base of the loss modules: the ignored index and the reduction. "elementwise_mean" is "mean"."""

    def __init__(self, ignore_index: int = IGNORE_INDEX, reduction: str = "elementwise_mean") -> None:
        super().__init__()
        check_reduction(type(self).__name__, reduction, REDUCTIONS)
        check_ignore_index(type(self).__name__, ignore_index)
        self.ignore_index, self.reduction = int(ignore_index), reduction

    def _loss(self, X: Tensor, target: Tensor, alpha: float | Tensor, n_iter: int) -> Tensor:
        return _losses(type(self).__name__, X, target, alpha, n_iter, self.ignore_index, self.reduction)


class SparsemaxLoss(_Loss):
    """`sparsemax_loss` as a module; `reduction` is "mean" (or "elementwise_mean"), "sum" or "none".

    Example:
        >>> import torch
        >>> SparsemaxLoss(reduction="sum")(torch.tensor([[0.5, 0.25, -1.0]]), torch.tensor([1]))
        tensor(0.3906)
    """

    def __init__(self, k: int | None = None, ignore_index: int = IGNORE_INDEX, reduction: str = "elementwise_mean") -> None:
        super().__init__(ignore_index, reduction)
        check_k("SparsemaxLoss", k)
        self.k = k

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores X."""
        return self._loss(X, target, 2, 50)


class SparsemaxBisectLoss(_Loss):
    """`sparsemax_bisect_loss` as a module, with the reductions of `SparsemaxLoss`.

    Example:
        >>> import torch
        >>> SparsemaxBisectLoss()(torch.tensor([[0.5, 0.25, -1.0]]), torch.tensor([1]))
        tensor(0.3906)
    """

    def __init__(self, n_iter: int = 50, ignore_index: int = IGNORE_INDEX, reduction: str = "elementwise_mean") -> None:
        super().__init__(ignore_index, reduction)
        self.n_iter = n_iter

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores X."""
        return self._loss(X, target, 2, self.n_iter)


class Entmax15Loss(_Loss):
    """`entmax15_loss` as a module, with the reductions of `SparsemaxLoss`.

    Example:
        >>> import torch
        >>> Entmax15Loss()(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(0.0617)
    """

    def __init__(self, k: int | None = 100, ignore_index: int = IGNORE_INDEX, reduction: str = "elementwise_mean") -> None:
        super().__init__(ignore_index, reduction)
        check_k("Entmax15Loss", k)
        self.k = k

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores X."""
        return self._loss(X, target, 1.5, 50)


class EntmaxBisectLoss(_Loss):
    """`entmax_bisect_loss` as a module, with the reductions of `SparsemaxLoss`.

    Example:
        >>> import torch
        >>> EntmaxBisectLoss(alpha=1.5)(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(0.0617)
    """

    alpha: float | Tensor

    def __init__(
        self,
        alpha: float | Tensor = 1.5,
        n_iter: int = 50,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "elementwise_mean",
    ) -> None:
        super().__init__(ignore_index, reduction)
        self.n_iter = n_iter
        self._store("alpha", alpha, persistent=False)

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores X."""
        return self._loss(X, target, self.alpha, self.n_iter)


class NormmaxBisectLoss(_Loss):
    """`normmax_bisect_loss` as a module, with the reductions of `SparsemaxLoss`.

    Example:
        >>> import torch
        >>> NormmaxBisectLoss()(torch.tensor([[1.0, 0.75, 0.0]]), torch.tensor([1]))
        tensor(0.4290)
    """

    alpha: float | Tensor

    def __init__(
        self,
        alpha: float | Tensor = 2,
        n_iter: int = 50,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "elementwise_mean",
    ) -> None:
        super().__init__(ignore_index, reduction)
        self.n_iter = n_iter
        self._store("alpha", alpha, persistent=False)

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of scores X."""
        name = "NormmaxBisectLoss"
        return _normmax_losses(name, X, target, self.alpha, self.n_iter, self.ignore_index, self.reduction)


@alone_in_child
def _losses(
    name: str, X: Tensor, target: Tensor, alpha: float | Tensor, n_iter: int, ignore_index: int, reduction: str
) -> Tensor:
    if is_captured(X, target, alpha):
        return captured(_losses, name, X, target, alpha, n_iter, ignore_index, reduction)  # type: ignore[no-any-return]
    dim = _check(name, X, target, n_iter, ignore_index)
    e, e_tensor = order_minus_one(name, X, alpha, dim)
    given = alpha if isinstance(alpha, Tensor) else float(alpha)
    check_values(name, given, lambda t: (t >= 1) & (t <= 2), "alpha must lie in [1, 2]", "entmax_bisect takes alpha above 2")
    e = e if e_tensor is not None else max(e, MIN_E)
    return fenchel_young(X, target, e, e_tensor, dim, None, ignore_index, _torch_name(reduction), n_iter)


@alone_in_child
def _normmax_losses(
    name: str, X: Tensor, target: Tensor, alpha: float | Tensor, n_iter: int, ignore_index: int, reduction: str
) -> Tensor:
    if is_captured(X, target, alpha):
        return captured(_normmax_losses, name, X, target, alpha, n_iter, ignore_index, reduction)  # type: ignore[no-any-return]
    dim = _check(name, X, target, n_iter, ignore_index)
    if target.is_floating_point():
        raise TypeError(f"{name}: target must hold class indices as int64, got {str(target.dtype).removeprefix('torch.')}")
    order = norm_order(name, X, alpha, dim)
    counts = target != ignore_index
    index = torch.where(counts, target, -1)
    losses = normmax_losses(X, index.unsqueeze(dim), order, dim, n_iter).squeeze(dim)
    return reduce_losses(losses, counts.to(losses.dtype), _torch_name(reduction), X)


def _check(name: str, X: Tensor, target: Tensor, n_iter: int, ignore_index: int) -> int:
    dim = check_scores(name, X, 0 if isinstance(X, Tensor) and X.ndim == 1 else 1, n_iter)
    check_target(name, X, target, dim, ignore_index)
    return dim


def _torch_name(reduction: str) -> str:
    return "mean" if reduction == "elementwise_mean" else reduction
