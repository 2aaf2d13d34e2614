"""normmax, computed with the row operator, and its loss (docs/theory.md, section 14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmax.machine.dispatch import selected
from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import accumulation_dtype


def normmax_rows(X: Tensor, order: float | Tensor, dim: int, n_iter: int) -> Tensor:
    """The weights of Eq. 23 for scores X."""
    if X.ndim == 0:
        return normmax_rows(X.reshape(1), order, 0, n_iter).reshape(())
    p: Tensor = _Normmax.apply(X.to(accumulation_dtype(X.dtype)), order, dim, n_iter)
    return p.to(X.dtype)


def normmax_losses(X: Tensor, index: Tensor, order: float | Tensor, dim: int, n_iter: int) -> Tensor:
    """The loss of every row (Eq. 24), in X's shape with `dim` reduced to 1; rows with a negative index have loss 0."""
    losses: Tensor = _NormmaxLoss.apply(X, index, order, dim, n_iter)
    return losses


class _Normmax(torch.autograd.Function):
    """p is the slope s of a diffmax row, divided by its sum. Backward consists of differentiable operators of p."""

    @staticmethod
    @alone_in_child
    def forward(ctx: Any, x: Tensor, order: float | Tensor, dim: int, n_iter: int) -> Tensor:
        r, m, _ = _operator(x, order, dim, n_iter)
        u = torch.where(r == 0, 0.0, r.pow(1 / order))
        total = u.sum(dim, keepdim=True)
        p = (u / torch.where(total == 0, 1.0, total)).masked_fill(m.isnan(), torch.nan)
        ctx.save_for_backward(p, order if isinstance(order, Tensor) else None)
        ctx.order, ctx.dim = order, dim
        return p

    @staticmethod
    @alone_in_child
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, order = ctx.saved_tensors
        order = ctx.order if order is None else order
        live = p != 0  # NaN counts as live and so reaches the gradient
        largest = p.detach().amax(ctx.dim, keepdim=True) if p.numel() else p.detach().sum(ctx.dim, keepdim=True)
        scaled = torch.where(live, p / torch.where(largest == 0, 1.0, largest), 1.0)  # p^1000 would be 0
        total = torch.where(live, scaled.pow(order), 0.0).sum(ctx.dim, keepdim=True)
        norm = torch.where(total == 0, 1.0, total).pow(1 / order)
        centred = grad - (p * grad).sum(ctx.dim, keepdim=True)
        # with u = p / ||p||, du/dx = u^(2 - order) / (order - 1)
        v = torch.where(live, (scaled / norm).pow(2 - order), 0.0) * centred * norm * largest / (order - 1)
        return v - p * v.sum(ctx.dim, keepdim=True), None, None, None


class _NormmaxLoss(torch.autograd.Function):
    """Eq. 24, whose gradient is p - y."""

    @staticmethod
    @alone_in_child
    def forward(ctx: Any, x: Tensor, index: Tensor, order: float | Tensor, dim: int, n_iter: int) -> Tensor:
        acc = accumulation_dtype(x.dtype)
        _, m, delta = _operator(x.to(acc), order, dim, n_iter)
        ctx.save_for_backward(x, index, order if isinstance(order, Tensor) else None)
        ctx.order, ctx.dim, ctx.n_iter = order, dim, n_iter
        top = x.to(acc).amax(dim, keepdim=True)
        losses = (top - x.gather(dim, index.clamp_min(0)).to(acc)) + delta + torch.where(m.isnan(), torch.nan, 0.0)
        return losses.masked_fill((index < 0) | (top == -torch.inf), 0.0)

    @staticmethod
    @alone_in_child
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, index, order = ctx.saved_tensors
        p = normmax_rows(x.to(grad.dtype), ctx.order if order is None else order, ctx.dim, ctx.n_iter)
        y = torch.zeros_like(p).scatter(ctx.dim, index.clamp_min(0), 1.0)
        silent = (index < 0) | (x == -torch.inf).all(ctx.dim, keepdim=True)
        return (grad * (p - y)).masked_fill(silent, 0.0).to(x.dtype), None, None, None, None


def _operator(x: Tensor, order: float | Tensor, dim: int, n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The diffmax row of Eq. 22 with its m and delta: m is NaN for a row that holds NaN or +inf.

    The scores are shifted before they are scaled; otherwise the rounding error would be proportional to the shift.
    """
    m = x.detach().amax(dim, keepdim=True) if x.shape[dim] else x.detach().sum(dim, keepdim=True)
    e = (order - 1) / order
    shifted = (x.detach() - torch.where(m == -torch.inf, 0.0, m)) / e
    e_float, e_tensor = (0.0, e.to(x.dtype)) if isinstance(e, Tensor) else (e, None)
    r, _, delta = torch.ops.diffmax.bisect(shifted, e_float, e_tensor, dim, n_iter, True, selected())
    return r, torch.where(m == torch.inf, torch.nan, m), delta
