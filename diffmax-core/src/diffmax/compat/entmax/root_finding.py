"""entmax.root_finding: the maps that entmax solves by bisection, and their modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmax.compat.entmax._budget import budget_rows
from diffmax.compat.entmax._normmax import normmax_rows
from diffmax.compat.entmax._outside import outside
from diffmax.compat.entmax._parameters import check_values, number_or_rows, order_minus_one, wrong_value
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import _readable, check_scores
from diffmax.operators.common.numerics import MIN_E
from diffmax.operators.common.resettable import Resettable
from diffmax.operators.rows.api import normalize

__all__ = [
    "BudgetBisect",
    "EntmaxBisect",
    "NormmaxBisect",
    "SparsemaxBisect",
    "budget_bisect",
    "entmax_bisect",
    "normmax_bisect",
    "sparsemax_bisect",
]


def entmax_bisect(
    X: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, n_iter: int = 50, ensure_sum_one: bool = True
) -> Tensor:
    """alpha'-entmax, which is `diffmax_bisect` at alpha = 2 - alpha' for alpha' in [1, 2]; entmax's alpha' is `alpha` here.

    The ends are exact: 1 is softmax, 2 is sparsemax. In (0, 1) and above 2, the weights are computed by bisection of Eq. 21, in
    float64 (in float32 on devices without float64).

    Args:
        X: Scores, any shape and strides, float16, bfloat16, float32 or float64. -inf marks a masked entry.
        alpha: A positive number, or a tensor that broadcasts against X with `dim` reduced to 1, such as (H, 1, 1) for one per
            head of scores (B, H, L, L). It may require a gradient.
        dim: Axis that sums to one.
        n_iter: The result is at least as accurate as after this many bisection steps.
        ensure_sum_one: Whether to divide by the sum at the end.
    Returns:
        Tensor of X's shape, dtype and device. A row that is all -inf is all 0, with gradient 0; a row that holds NaN or +inf is
        all NaN.
    Raises:
        TypeError: X is no tensor of those dtypes, or an argument has the wrong type.
        ValueError: alpha, `dim` or n_iter is out of range, or alpha's shape does not fit. On an accelerator, and under
            torch.compile, a tensor alpha is not read: there, rows whose alpha lies outside [1, 2] are NaN.
    Source: docs/theory.md, sections 3 and 13; the signature is entmax's (MIT). Written for diffmax.
    Example:
        >>> import torch
        >>> entmax_bisect(torch.tensor([3.0, 2.0, 1.0, 0.0]), alpha=1.5)
        tensor([0.8307, 0.1693, 0.0000, 0.0000])
        >>> entmax_bisect(torch.tensor([3.0, 2.0, 1.0, 0.0]), alpha=3.0)
        tensor([1., 0., 0., 0.])
    """
    if is_captured(X, alpha):
        return captured(entmax_bisect, X, alpha, dim, n_iter, ensure_sum_one)  # type: ignore[no-any-return]
    dim = check_scores("entmax_bisect", X, dim, n_iter)
    e, e_tensor = order_minus_one("entmax_bisect", X, alpha, dim)
    if e_tensor is None:
        if 0 <= e <= 1:
            return normalize(X, max(e, MIN_E), None, dim, n_iter, ensure_sum_one)
        return outside(X, torch.full((1,) * X.ndim, e, dtype=torch.float64, device="cpu"), dim, n_iter, ensure_sum_one)
    within = (e_tensor >= 0) & (e_tensor <= 1)
    if not _readable(e_tensor) or bool(within.all()):
        return normalize(X, 0.0, e_tensor, dim, n_iter, ensure_sum_one)
    inner = normalize(X, 0.0, torch.where(within, e_tensor, 0.5), dim, n_iter, ensure_sum_one)
    return torch.where(within, inner, outside(X, torch.where(within, 2.0, e_tensor), dim, n_iter, ensure_sum_one))


def sparsemax_bisect(X: Tensor, dim: int = -1, n_iter: int | None = 50, ensure_sum_one: bool = True) -> Tensor:
    """`sparsemax` with a number of steps, as for `entmax_bisect`; None is 50. entmax 1.3 ignores both last arguments.

    Example:
        >>> import torch
        >>> sparsemax_bisect(torch.tensor([0.5, 0.25, -1.0]))
        tensor([0.6250, 0.3750, 0.0000])
    """
    n_iter = 50 if n_iter is None else n_iter
    if is_captured(X):
        return captured(sparsemax_bisect, X, dim, n_iter, ensure_sum_one)  # type: ignore[no-any-return]
    return normalize(X, 1.0, None, check_scores("sparsemax_bisect", X, dim, n_iter), n_iter, ensure_sum_one)


def normmax_bisect(X: Tensor, alpha: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> Tensor:
    """alpha-normmax: the p on the simplex that maximises <x, p> - ||p||_alpha (Eq. 23), computed with the row operator.

    Args:
        X, dim, n_iter: As for `entmax_bisect`.
        alpha: Order of the norm, above 1: a number, or a tensor that broadcasts against X with `dim` reduced to 1. As in entmax
            there is no gradient for it.
    Returns:
        Tensor of X's shape, dtype and device, with the edges of `entmax_bisect`.
    Raises:
        TypeError: X is no tensor of those dtypes, or an argument has the wrong type.
        ValueError: alpha, `dim` or n_iter is out of range, alpha's shape does not fit, or it requires a gradient.
    Source: docs/theory.md, section 14; the signature is entmax's (MIT). Written for diffmax.
    Example:
        >>> import torch
        >>> normmax_bisect(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        tensor([0.0000, 0.0239, 0.1746, 0.3254, 0.4761])
    """
    if is_captured(X, alpha):
        return captured(normmax_bisect, X, alpha, dim, n_iter)  # type: ignore[no-any-return]
    dim = check_scores("normmax_bisect", X, dim, n_iter)
    return normmax_rows(X, norm_order("normmax_bisect", X, alpha, dim), dim, n_iter)


def norm_order(name: str, X: Tensor, alpha: float | Tensor, dim: int) -> float | Tensor:
    """Check the order of normmax's norm."""
    order = number_or_rows(name, "alpha", X, alpha, dim)
    check_values(name, order, lambda t: (t > 1) & (t < math.inf), "alpha must be greater than 1", "2 is the Euclidean norm")
    if isinstance(order, Tensor) and order.requires_grad:
        raise ValueError(f"{name}: alpha must not require a gradient, there is none for it\npass alpha.detach()")
    return order


def budget_bisect(X: Tensor, budget: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> Tensor:
    """Budget-sparsemax: the p with 0 <= p <= 1 and sum `budget` that is nearest to x (Eq. 25).

    Args:
        X, dim, n_iter: As for `entmax_bisect`.
        budget: Between 0 and the number of entries of a row: a number, or a tensor that broadcasts against X with `dim` reduced
            to 1. It may require a gradient.
    Returns:
        Tensor of X's shape, dtype and device. If a row has fewer visible entries than the budget, each has weight 1. A row that
        holds NaN or +inf is all NaN.
    Raises:
        TypeError: X is no tensor of those dtypes, or an argument has the wrong type.
        ValueError: budget, `dim` or n_iter is out of range, or budget's shape does not fit. A budget on an accelerator is not
            read: outside its range it acts like the nearest end.
    Source: docs/theory.md, section 15; the signature is entmax's (MIT). Written for diffmax.
    Example:
        >>> import torch
        >>> budget_bisect(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), budget=2)
        tensor([0.0000, 0.1250, 0.3750, 0.6250, 0.8750])
    """
    if is_captured(X, budget):
        return captured(budget_bisect, X, budget, dim, n_iter)  # type: ignore[no-any-return]
    dim = check_scores("budget_bisect", X, dim, n_iter)
    total = number_or_rows("budget_bisect", "budget", X, budget, dim)
    n = X.shape[dim] if X.ndim else 1
    wrong = wrong_value(total, lambda t: (t >= 0) & (t <= n))
    if wrong is not None:
        raise ValueError(f"budget_bisect: budget must lie in [0, {n}], got {wrong:g}\na row has {n} entries")
    return budget_rows(X, total, dim, n_iter)


class SparsemaxBisect(nn.Module):
    """`sparsemax_bisect` as a module.

    Example:
        >>> import torch
        >>> SparsemaxBisect()(torch.tensor([0.5, 0.25, -1.0]))
        tensor([0.6250, 0.3750, 0.0000])
    """

    def __init__(self, dim: int = -1, n_iter: int | None = None) -> None:
        super().__init__()
        self.dim, self.n_iter = dim, n_iter

    def forward(self, X: Tensor) -> Tensor:
        """Weights for scores X."""
        return sparsemax_bisect(X, self.dim, self.n_iter)


class EntmaxBisect(Resettable):
    """`entmax_bisect` as a module. An nn.Parameter alpha is learned; a tensor alpha becomes a buffer.

    Example:
        >>> import torch
        >>> attend = EntmaxBisect(torch.nn.Parameter(torch.full((4, 1, 1), 1.5)))
        >>> attend(torch.randn(2, 4, 5, 5)).sum().backward()
        >>> attend.alpha.grad.shape
        torch.Size([4, 1, 1])
    """

    alpha: float | Tensor

    def __init__(self, alpha: float | Tensor = 1.5, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__()
        self.dim, self.n_iter = dim, n_iter
        self._store("alpha", alpha, persistent=False)  # entmax's checkpoints do not contain it

    def forward(self, X: Tensor) -> Tensor:
        """Weights for scores X."""
        return entmax_bisect(X, self.alpha, self.dim, self.n_iter)


class NormmaxBisect(Resettable):
    """`normmax_bisect` as a module.

    Example:
        >>> import torch
        >>> NormmaxBisect()(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        tensor([0.0000, 0.0239, 0.1746, 0.3254, 0.4761])
    """

    alpha: float | Tensor

    def __init__(self, alpha: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__()
        self.dim, self.n_iter = dim, n_iter
        self._store("alpha", alpha, persistent=False)  # entmax's checkpoints do not contain it

    def forward(self, X: Tensor) -> Tensor:
        """Weights for scores X."""
        return normmax_bisect(X, self.alpha, self.dim, self.n_iter)


class BudgetBisect(Resettable):
    """`budget_bisect` as a module.

    Example:
        >>> import torch
        >>> BudgetBisect(budget=2)(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        tensor([0.0000, 0.1250, 0.3750, 0.6250, 0.8750])
    """

    budget: float | Tensor

    def __init__(self, budget: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__()
        self.dim, self.n_iter = dim, n_iter
        self._store("budget", budget, persistent=False)  # entmax's checkpoints do not contain it

    def forward(self, X: Tensor) -> Tensor:
        """Weights for scores X."""
        return budget_bisect(X, self.budget, self.dim, self.n_iter)
