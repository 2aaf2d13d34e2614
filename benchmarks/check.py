"""The gate before the clock: does a contestant compute what its name says, on the very input that is timed?

The exact weights are `diffmax.reference` in float64 on a sample of the rows (the whole tensor would cost more than the
benchmark); that every row is finite and sums to 1 is checked on all of them. Errors are relative to the largest weight of
their row. A gradient is compared with the exact formula at the weights that the contestant itself returned: at the edge of
the support the slope p**alpha amplifies the last digit of p without bound, which says nothing about the backward kernel.

Our kernels are held to `diffmax.testing.gates`: twice what the reference errs in the same dtype, plus 2 ulp. A rival has only
to show that it computes the same function: 64 ulp, entmax_bisect needs 30.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmax import reference
from diffmax.testing import gates

SAMPLE_ELEMENTS = 1 << 16
RIVAL_ULP = 64


@dataclass(frozen=True)
class Verdict:
    """`error` and `allowed` in units of the dtype's epsilon; `zeros` is the share of weights that are exactly 0."""

    correct: bool
    error: float
    allowed: float
    zeros: float
    reason: str | None = None


def check(x: Tensor, grad: Tensor, p: Tensor, grad_x: Tensor | None, e: float, ours: bool) -> Verdict:
    """Judge the weights `p` of `x`, and the gradient `grad_x` where there is one."""
    eps = torch.finfo(x.dtype).eps
    zeros = (p == 0).double().mean().item()
    sums = p.double().sum(1)
    worst_sum = (sums - 1).abs().max().item()
    if not worst_sum <= RIVAL_ULP * eps:  # written so that NaN fails too
        return Verdict(False, worst_sum / eps, RIVAL_ULP, zeros, f"a row sums to 1 within {worst_sum:.1e}")
    if grad_x is not None and not grad_x.isfinite().all():
        return Verdict(False, float("inf"), RIVAL_ULP, zeros, "the gradient is not finite")

    rows = _sample(*x.shape)
    x, grad, p = x[rows], grad[rows], p[rows]
    errors = [_weights_error(x, p, e, ours)]
    if grad_x is not None:
        errors.append(_gradient_error(grad, p, grad_x[rows], e, ours))
    for what, (error, allowed) in zip(("weights", "gradient"), errors, strict=False):
        if not error <= allowed:
            reason = f"the {what} err by {error / eps:.1f} ulp of the row's largest, allowed {allowed / eps:.1f}"
            return Verdict(False, error / eps, allowed / eps, zeros, reason)
    error, allowed = errors[-1]
    return Verdict(True, error / eps, allowed / eps, zeros)


def _sample(rows: int, n: int) -> Tensor:
    count = min(rows, max(1, SAMPLE_ELEMENTS // n))
    return torch.linspace(0, rows - 1, count).long()


def _weights_error(x: Tensor, p: Tensor, e: float, ours: bool) -> tuple[float, float]:
    exact = _weights(x.double(), e)
    scale = exact.amax(1, keepdim=True)
    allowed = gates(lambda x: _weights(x, e), x, scale=scale)[0].allowed if ours else RIVAL_ULP * torch.finfo(x.dtype).eps
    return _worst(p, exact, scale), allowed


def _gradient_error(grad: Tensor, p: Tensor, grad_x: Tensor, e: float, ours: bool) -> tuple[float, float]:
    exact = _gradient(grad.double(), p.double(), e)
    # the size of the terms whose difference the gradient is: the gradient itself vanishes in rows with one large weight
    scale = p.double().amax(1, keepdim=True) ** (1 - e) * grad.double().abs().amax(1, keepdim=True)
    eps = torch.finfo(grad.dtype).eps
    allowed = gates(lambda grad, p: _gradient(grad, p, e), grad, p, scale=scale)[0].allowed if ours else RIVAL_ULP * eps
    return _worst(grad_x, exact, scale), allowed


def _weights(x: Tensor, e: float) -> Tensor:
    return torch.softmax(x, 1) if e == 0 else reference.bisect(x, e, 1, 200, True)[0]


def _gradient(grad: Tensor, p: Tensor, e: float) -> Tensor:
    m = torch.zeros(p.shape[0], 1, dtype=torch.promote_types(p.dtype, torch.float32))
    return reference.bisect_backward(grad, p, m, torch.zeros_like(m), None, e, 1, False)[0]


def _worst(got: Tensor, exact: Tensor, scale: Tensor) -> float:
    return ((got.double() - exact).abs() / scale).max().item()
