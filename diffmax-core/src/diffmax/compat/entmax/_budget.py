"""Budget-sparsemax: bisection of an interval of length 1, then one exact step (docs/theory.md, section 15)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import accumulation_dtype


def budget_rows(X: Tensor, budget: float | Tensor, dim: int, n_iter: int) -> Tensor:
    """The weights of Eq. 25 for scores X."""
    if X.ndim == 0:
        return budget_rows(X.reshape(1), budget, 0, n_iter).reshape(())
    acc = accumulation_dtype(X.dtype)
    total = budget.to(acc) if isinstance(budget, Tensor) else torch.full((), budget, dtype=acc, device=X.device)
    p: Tensor = _Budget.apply(X.to(acc), total, dim, n_iter)
    return p.to(X.dtype)


class _Budget(torch.autograd.Function):
    """Eq. 25. Its gradients depend only on which entries lie strictly between 0 and 1."""

    @staticmethod
    @alone_in_child
    def forward(ctx: Any, x: Tensor, budget: Tensor, dim: int, n_iter: int) -> Tensor:
        p = _solve(x, budget, dim, n_iter)
        ctx.save_for_backward((p > 0) & (p < 1), p.isnan())
        ctx.dim, ctx.shape = dim, budget.shape
        return p

    @staticmethod
    @alone_in_child
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        free, invalid = ctx.saved_tensors
        count = free.sum(ctx.dim, keepdim=True).clamp_min(1)
        mean = torch.where(free, grad, 0.0).sum(ctx.dim, keepdim=True) / count
        grad_x = torch.where(free, grad - mean, 0.0).masked_fill(invalid, torch.nan)
        return grad_x, mean.sum_to_size(ctx.shape) if ctx.needs_input_grad[1] else None, None, None


def _solve(x: Tensor, budget: Tensor, dim: int, n_iter: int) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    pivot = _pivot(x, budget, dim)
    z = x - torch.where(pivot == -torch.inf, 0.0, pivot)
    low, high = torch.full_like(pivot, -1.0), torch.zeros_like(pivot)
    for _ in range(n_iter):
        middle = (low + high) / 2
        reached = (z - middle).clamp(0, 1).sum(dim, keepdim=True) >= budget
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    # the free entries are known now, and the sum is linear in tau
    free = (z > low) & (z < low + 1)
    count = free.sum(dim, keepdim=True)
    full = (z >= low + 1).sum(dim, keepdim=True)
    exact = (torch.where(free, z, 0.0).sum(dim, keepdim=True) + full - budget) / count.clamp_min(1)
    p = (z - torch.where(count > 0, exact, low)).clamp(0, 1)
    invalid = x.isnan() | (x == torch.inf)
    return p.masked_fill(invalid.any(dim, keepdim=True), torch.nan)


def _pivot(x: Tensor, budget: Tensor, dim: int) -> Tensor:
    """The k-th largest score, k = budget rounded up, but at least 1 and at most the number of visible entries."""
    visible = (x > -torch.inf).sum(dim, keepdim=True)
    k = budget.ceil().long().clamp_min(1).minimum(visible).clamp_min(1)
    return x.sort(dim, descending=True).values.gather(dim, (k - 1).expand_as(visible))
