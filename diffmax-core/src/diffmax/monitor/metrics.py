"""The metrics of `diffmax_bisect_monitored`, as scalar tensors on the device of the scores. Nothing here waits for it."""

import math

import torch
from torch import Tensor

from diffmax.operators.common.numerics import MIN_E, newton_steps
from diffmax.reference.rows import _power

SINK = 0.3  # a key is an attention sink of a map if its mean weight exceeds this (arXiv:2410.10781)


def forward_metrics(X: Tensor, p: Tensor, m: Tensor, delta: Tensor, e: Tensor, dim: int) -> dict[str, Tensor]:
    """Sparsity, spread and sinks of weights p for scores X; m, delta and e have one entry per row."""
    visible = ~X.isneginf()
    counts = _counts(m, p, dim)
    weights = torch.where(counts, p, 0.0).to(m.dtype)
    live = (weights > 0) & counts
    support = live.sum(dim, keepdim=True).to(m.dtype)
    entropy = -(weights * torch.where(live, weights, 1.0).log()).sum(dim, keepdim=True)
    zeros = (~live & visible & counts).sum().to(m.dtype)
    sinks = _sink_rates(weights, visible & counts, dim)
    return {
        "forward/support_mean": _mean(support, counts),
        "forward/support_max": support.amax() if support.numel() else support.sum(),
        "forward/zeros_share": zeros / (visible & counts).sum(),
        "forward/entropy_mean": _mean(entropy, counts),
        "forward/row_max_mean": _mean(weights.amax(dim, keepdim=True), counts) if p.shape[dim] else p.sum(),
        "forward/sink_rate": sinks.amax() if sinks.numel() else sinks.sum(),
        "forward/sink_rate_first": sinks[:1].sum(),
        "forward/rows_masked": (m == -torch.inf).sum(),
        "forward/rows_nan": (~counts & (m != -torch.inf)).sum(),
    }


def alpha_metrics(e: Tensor) -> dict[str, Tensor]:
    """alpha = 1 - e over its entries."""
    alpha = 1 - e
    return {"alpha/mean": alpha.mean(), "alpha/min": alpha.amin(), "alpha/max": alpha.amax()}


def convergence_metrics(X: Tensor, p: Tensor, m: Tensor, delta: Tensor, e: Tensor, dim: int, n_iter: int) -> dict[str, Tensor]:
    """tau, the residual of the kernel's root, and the number of steps of Eq. 2 that change the tau of each row."""
    counts = _counts(m, p, dim)
    row_e = e.clamp_min(MIN_E)
    z = row_e * (X.to(m.dtype) - torch.where(counts, m, 0.0))
    residual = (_power(z, delta, row_e)[0].sum(dim, keepdim=True) - 1).abs()
    tau = m - (1 - delta) / row_e
    iterations = _iterations(z, row_e, dim, n_iter)
    return {
        "convergence/tau_mean": _mean(tau, counts),
        "convergence/residual_mean": _mean(residual, counts),
        "convergence/residual_max": torch.where(counts, residual, 0.0).amax() if m.numel() else m.sum(),
        "convergence/iterations_mean": _mean(iterations, counts),
        "convergence/iterations_max": torch.where(counts, iterations, 0.0).amax() if m.numel() else m.sum(),
    }


def _iterations(z: Tensor, e: Tensor, dim: int, n_iter: int) -> Tensor:
    """The number of steps of Eq. 2, from t = -1, that move t by more than the accumulation dtype resolves at 1."""
    delta = torch.zeros_like(z.sum(dim, keepdim=True))
    moved = torch.zeros_like(delta)
    for _ in range(newton_steps(n_iter, z.shape[dim], 1.0, z.dtype)):
        power, _, base = _power(z, delta, e)
        total = power.sum(dim, keepdim=True)
        step = -total * torch.expm1(-e * total.log()) / (power / base).sum(dim, keepdim=True)
        moves = step > torch.finfo(z.dtype).eps  # False for a fully masked row, which is NaN
        moved += moves
        delta = torch.where(moves, delta + step, delta)
    return moved


def _sink_rates(weights: Tensor, visible: Tensor, dim: int) -> Tensor:
    """Per key, the share of maps (all axes but queries and keys) in which its mean weight over queries exceeds `SINK`."""
    weights, visible = weights.movedim(dim, -1), visible.movedim(dim, -1)
    if weights.ndim == 1:
        weights, visible = weights[None], visible[None]
    queries = visible.sum(-2)
    mean = weights.sum(-2) / queries.clamp_min(1)
    sinks = (mean > SINK).reshape(math.prod(mean.shape[:-1]), mean.shape[-1])
    return sinks.to(weights.dtype).mean(0)


def _counts(m: Tensor, p: Tensor, dim: int) -> Tensor:
    """Per row, whether it is not fully masked and holds no NaN."""
    return torch.isfinite(m) & ~p.isnan().any(dim, keepdim=True)


def _mean(per_row: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, per_row, 0).sum() / counts.sum()
