"""The kernels in NumPy, by bisection: slow, exact, and independent of diffmax's own solver."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_E = 2.0**-60  # for smaller e the operator is softmax to the last digit of float64
STEPS = 60  # delta lies in [0, 1]: halvings beyond the digits of float64 change nothing
# (exp(v) - 1 - v) / v^2 = 1/2! + v/3! + v^2/4! + ..., to float64's precision for v < 1
PHI_SERIES = 1 / np.cumprod(np.arange(2.0, 21.0))


def bisect(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward kernel; arguments and results as `diffmax.reference.bisect`. Computes in float64 for every dtype."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    if x.numel() == 0:
        return (
            torch.zeros(x.shape, dtype=x.dtype),
            torch.full(row_shape, -torch.inf, dtype=acc),
            torch.zeros(row_shape, dtype=acc),
        )

    with np.errstate(all="ignore"):  # -inf, NaN and overflow are part of the contract
        scores, given_e = _array(x), _array(e)
        row_e = np.maximum(given_e, MIN_E)
        m = scores.max(axis=dim, keepdims=True)
        z = row_e * (scores - np.where(m == -np.inf, 0.0, m))

        # S(delta) = sum [z + 1 - delta]_+^(1/e) decreases, and S(low) >= 1 >= S(high): halving keeps the root inside
        low = np.zeros(np.broadcast_shapes(m.shape, row_e.shape))
        high = np.broadcast_to(-np.expm1(-row_e * np.log(x.shape[dim])), low.shape)
        for _ in range(min(n_iter, STEPS)):
            middle = (low + high) / 2
            above = _power(z, middle, row_e)[0].sum(axis=dim, keepdims=True) >= 1
            low, high = np.where(above, middle, low), np.where(above, high, middle)

        # one Newton step with more digits, if the processor has them: then only the result is rounded
        z = row_e * (scores.astype(np.longdouble) - np.where(m == -np.inf, 0.0, m))
        p, log_p = _power(z, low, row_e)
        slopes = np.where(p > 0, np.exp((1 - row_e) * log_p), 0.0).sum(axis=dim, keepdims=True)
        step = row_e * (p.sum(axis=dim, keepdims=True) - 1) / np.where(slopes > 0, slopes, np.inf)
        p = _power(z, low + np.where(np.isfinite(step), step, 0.0), row_e)[0]
        if ensure_sum_one:
            total = p.sum(axis=dim, keepdims=True)
            p = p / np.where(total > 0, total, 1.0)
        bad = np.isnan(m) | (m == np.inf) | ~((given_e >= 0) & (given_e <= 1))
        return _tensor(np.where(bad, np.nan, p), x.dtype), _tensor(m, acc), _tensor(low, acc)


def bisect_backward(
    grad: Tensor, p: Tensor, m: Tensor, delta: Tensor, x: Tensor | None, e: float | Tensor, dim: int, needs_e: bool
) -> tuple[Tensor, Tensor]:
    """Backward kernel; arguments and results as `diffmax.reference.bisect_backward`."""
    if p.numel() == 0:
        return torch.zeros(p.shape, dtype=p.dtype), torch.zeros(m.shape if needs_e else (0,), dtype=m.dtype)
    with np.errstate(all="ignore"):
        row_e = np.maximum(_array(e), MIN_E)
        weights = _array(p)
        if x is None:
            live = weights != 0  # NaN is live, and so reaches the gradient
            log_p = np.log(np.where(live, weights, 1.0))
        else:  # in float16 small weights are 0: recompute them from the scores
            shift = np.where(_array(m) == -np.inf, 0.0, _array(m))
            recomputed, log_p = _power(row_e * (_array(x) - shift), _array(delta), row_e)
            weights = np.where(np.isnan(weights), np.nan, recomputed)
            live = weights != 0
        s = np.where(live, np.exp((1 - row_e) * log_p), 0.0) + 0.0 * weights  # the last term carries NaN
        total = s.sum(axis=dim, keepdims=True)
        g = _array(grad)
        centred = g - (s * g).sum(axis=dim, keepdims=True) / np.where(total == 0, 1.0, total)
        grad_x = _tensor(s * centred, p.dtype)
        if not needs_e:
            return grad_x, torch.zeros(0, dtype=m.dtype)
        # dp/de = -p phi(ln p) + ..., phi(l) = (exp(v) - 1 - v) / e^2 with v = -e l: a series where that would cancel
        v = -row_e * log_p
        near = log_p**2 * np.polynomial.polynomial.polyval(np.where(v < 1, v, 0.0), PHI_SERIES)
        phi = np.where(v < 1, near, (np.expm1(v) - v) / row_e**2)
        return grad_x, _tensor(-(weights * phi * centred).sum(axis=dim, keepdims=True), m.dtype)


def _power(z: Any, delta: Any, e: Any) -> tuple[Any, Any]:
    """[z + 1 - delta]_+^(1/e) and its logarithm (0 off the support). log1p keeps the digits where e is small."""
    u = z - delta
    live = u > -1
    log_p = np.log1p(np.where(live, u, 0.0)) / e
    return np.where(live, np.exp(log_p), 0.0), log_p


def _array(values: float | Tensor) -> Any:
    return np.asarray(values.detach().numpy() if isinstance(values, Tensor) else values, dtype=np.float64)


def _tensor(array: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64)).to(dtype)
