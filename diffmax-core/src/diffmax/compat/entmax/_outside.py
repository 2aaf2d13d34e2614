"""entmax beyond diffmax's range: alpha' in (0, 1) and above 2, by bisection (docs/theory.md, section 13)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import alpha_weight


@alone_in_child
def outside(X: Tensor, e: Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> Tensor:
    """Weights for e = alpha' - 1 < 0 or > 1, a tensor that broadcasts against X with `dim` reduced to 1."""
    if X.ndim == 0:
        return outside(X.reshape(1), e.reshape(1), 0, n_iter, ensure_sum_one).reshape(())
    acc = solving_dtype(X)
    p: Tensor = _Outside.apply(X.to(acc), e.to(device=X.device, dtype=acc), dim, n_iter, ensure_sum_one)
    return p.to(X.dtype)


def solving_dtype(X: Tensor) -> torch.dtype:
    """float64 if the device supports it: at the edge of the support [u]^(1/e) with e > 1 has far fewer digits than u."""
    return torch.float64 if X.device.type in ("cpu", "cuda") else torch.float32


class _Outside(torch.autograd.Function):
    """Eq. 21 with the gradients of Eq. 3 and 4, which hold for every e. Backward consists of differentiable operators of p."""

    @staticmethod
    @alone_in_child
    def forward(ctx: Any, x: Tensor, e: Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> Tensor:
        p = _solve(x, e, dim, n_iter, ensure_sum_one)
        ctx.save_for_backward(p, e)
        ctx.dim = dim
        return p

    @staticmethod
    @alone_in_child
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, e = ctx.saved_tensors
        live = p != 0  # NaN counts as live and so reaches the gradient
        log_p = torch.where(live, p, 1.0).log()
        s = torch.where(live, ((1 - e) * log_p).exp(), 0.0)
        total = s.sum(ctx.dim, keepdim=True)
        centred = grad - (s * grad).sum(ctx.dim, keepdim=True) / torch.where(total == 0, 1.0, total)
        grad_e = None
        if ctx.needs_input_grad[1]:
            grad_e = -(_weight(p, log_p, e) * centred).sum(ctx.dim, keepdim=True).sum_to_size(e.shape)
        return s * centred, grad_e, None, None, None


def _solve(x: Tensor, e: Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> Tensor:
    """Bisection for the logarithm of the largest weight, which lies in [-ln n, 0]."""
    if x.numel() == 0:
        return x.clone()
    m = x.amax(dim, keepdim=True)
    d = x - torch.where(m == -torch.inf, 0.0, m)
    low, high = torch.full_like(m, -math.log(x.shape[dim])), torch.zeros_like(m)
    for _ in range(n_iter):
        middle = (low + high) / 2
        reached = _weights(d, e, middle).sum(dim, keepdim=True) >= 1
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    p = _weights(d, e, high)  # from above: the largest weight is never lost
    if ensure_sum_one:
        total = p.sum(dim, keepdim=True)
        p = p / torch.where(total == 0, 1.0, total)
    return p.masked_fill(m.isnan() | (m == torch.inf) | e.isnan(), torch.nan)


def _weights(d: Tensor, e: Tensor, top: Tensor) -> Tensor:
    """Eq. 21: the weights of a row whose largest weight is exp(top)."""
    most = math.log(torch.finfo(d.dtype).max) - 1
    u = e * d * (-e * top).clamp_max(most).exp()
    live = u > -1
    return torch.where(live, (top + torch.log1p(torch.where(live, u, 0.0)) / e).exp(), 0.0)


def _weight(p: Tensor, log_p: Tensor, e: Tensor) -> Tensor:
    """w of Eq. 6, also where v = -e ln p is negative."""
    v = -e * log_p
    near = v.abs() < 1
    far_e = torch.where(near, 1.0, e)
    return torch.where(near, alpha_weight(p, torch.where(near, log_p, 0.0), e), p * (v.expm1() - v) / far_e**2)
