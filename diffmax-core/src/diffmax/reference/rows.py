"""The row operator in plain PyTorch: the reference for all other kernels, and the fallback on any device.

It runs a fixed number of Newton steps, so it never waits for a device. Equations: docs/theory.md.
"""

import torch
from torch import Tensor

from diffmax.operators.common.numerics import MIN_E, accumulation_dtype, alpha_weight, clamp_e, newton_steps


def bisect(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward kernel: weights p, row maximum m and delta (tau = m - (1 - delta) / e).

    Args:
        x: Scores of a floating dtype, any strides.
        e: 1 - alpha: a float in (0, 1], already checked, or a tensor that broadcasts against m, in the accumulation dtype.
            Rows whose entry lies outside [0, 1] are NaN.
        dim: Normalized dimension, non-negative.
        n_iter: The result is at least as accurate as after this many bisection steps.
        ensure_sum_one: Whether to divide by the sum at the end.
    Returns:
        p, of x's shape and dtype, contiguous; m and delta with `dim` reduced to 1, in the accumulation dtype.
    """
    acc = accumulation_dtype(x.dtype)
    row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    if x.numel() == 0:
        return x.new_empty(x.shape), x.new_full(row_shape, -torch.inf, dtype=acc), x.new_zeros(row_shape, dtype=acc)

    scores = x.to(acc)
    given_e = e if isinstance(e, Tensor) else torch.full((), e, dtype=acc, device=x.device)
    invalid_e = ~((given_e >= 0) & (given_e <= 1))
    row_e = given_e.clamp_min(MIN_E)
    m = scores.amax(dim, keepdim=True)
    # a fully masked row has m = -inf: subtract 0 there, so that every z is -inf and not NaN
    z = row_e * (scores - torch.where(m == -torch.inf, 0.0, m))
    delta = torch.zeros_like(m)
    for _ in range(newton_steps(n_iter, x.shape[dim], 1.0 if isinstance(e, Tensor) else e, acc)):
        p, _, base = _power(z, delta, row_e)
        total = p.sum(dim, keepdim=True)
        slope = (p / base).sum(dim, keepdim=True)
        # S - S^alpha = -S expm1(-e ln S): the difference of two numbers near 1, without cancellation
        step = -total * torch.expm1(-row_e * total.log()) / slope
        delta = torch.where(total > 0, delta + step, delta)

    p, _, _ = _power(z, delta, row_e)
    if ensure_sum_one:
        total = p.sum(dim, keepdim=True)
        p = p / torch.where(total > 0, total, 1.0)
    p = p.masked_fill(m.isnan() | (m == torch.inf) | invalid_e, torch.nan)
    return p.to(x.dtype).contiguous(), m.contiguous(), delta.contiguous()


def bisect_backward(
    grad: Tensor,
    p: Tensor,
    m: Tensor,
    delta: Tensor,
    x: Tensor | None,
    e: float | Tensor,
    dim: int,
    needs_e: bool,
) -> tuple[Tensor, Tensor]:
    """Backward kernel: gradients for x (Eq. 3) and, per row, for e = 1 - alpha (the negative of Eq. 4).

    Args:
        grad: Gradient for p.
        p, m, delta: The results of any forward kernel.
        x: The scores if p's dtype flushes small weights to zero (float16), else None. With scores the support is
            z > delta - 1; without, p > 0.
        e, dim: As for the forward.
        needs_e: Whether to compute the gradient for e.
    Returns:
        Gradient for x in p's dtype, and for e in the accumulation dtype: m's shape, or (0,) if not requested.

    It consists of differentiable operators of grad, p and e, and so gives the second derivative too.
    """
    s, weights, log_p, row_e = _slopes(p, m, delta, x, e)
    g = grad.to(s.dtype)
    centred = g - _mean(s, g, dim)
    grad_x = (s * centred).to(p.dtype)
    if not needs_e:
        return grad_x, m.new_empty(0)
    return grad_x, -(alpha_weight(weights, log_p, row_e) * centred).sum(dim, keepdim=True)


def bisect_jvp(
    tangent_x: Tensor | None,
    tangent_e: Tensor | None,
    p: Tensor,
    m: Tensor,
    delta: Tensor,
    x: Tensor | None,
    e: float | Tensor,
    dim: int,
) -> Tensor:
    """Derivative of the weights along tangents of x and e, one of which may be None; otherwise as `bisect_backward`.

    The Jacobian for x is symmetric, so its part is Eq. 3 again; for e it is the negative of w - s sum(w) / sum(s)  (Eq. 4).
    """
    s, weights, log_p, row_e = _slopes(p, m, delta, x, e)
    tangent_p = torch.zeros_like(s)
    if tangent_x is not None:
        t = tangent_x.to(s.dtype)
        tangent_p = s * (t - _mean(s, t, dim))
    if tangent_e is not None:
        w = alpha_weight(weights, log_p, row_e)
        total = s.sum(dim, keepdim=True)
        share = w.sum(dim, keepdim=True) / torch.where(total == 0, 1.0, total)
        tangent_p = tangent_p - (w - s * share) * tangent_e
    return tangent_p.to(p.dtype)


def retraced(x: Tensor, e: float | Tensor, m: Tensor, delta: Tensor, dim: int) -> Tensor:
    """The weights of x as a composition of differentiable operators, given constants m and delta that solve it.

    Two Newton steps change no value. Each doubles the order to which the derivatives of tau are correct, so the derivatives
    of the weights for x and e are correct to third order. This takes several tensors of x's size; for float16 it returns
    float32.
    """
    row_e = clamp_e(e)
    z = row_e * (x.to(accumulation_dtype(x.dtype)) - torch.where(m == -torch.inf, 0.0, m))
    for _ in range(2):
        powers, _, base = _power(z, delta, row_e)
        slopes = (powers / base).sum(dim, keepdim=True)
        delta = delta + row_e * (powers.sum(dim, keepdim=True) - 1) / torch.where(slopes == 0, 1.0, slopes)
    return torch.where(m == -torch.inf, 0.0, _power(z, delta, row_e)[0])


def _slopes(
    p: Tensor, m: Tensor, delta: Tensor, x: Tensor | None, e: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
    """s = p^alpha, the weights and their logarithm, each 0 off the support, recomputed from x if given; and e."""
    acc = accumulation_dtype(p.dtype)
    row_e = clamp_e(e)
    if x is None:
        weights = p.to(acc)
        live = weights != 0  # NaN counts as live and so reaches the gradient
        log_p = torch.where(live, weights, 1.0).log()
    else:
        shift = torch.where(m == -torch.inf, 0.0, m)
        weights, log_p, _ = _power(row_e * (x.to(acc) - shift), delta, row_e)
        live = (weights != 0) | p.isnan()
        weights, log_p = (torch.where(p.isnan(), torch.nan, t) for t in (weights, log_p))
    return torch.where(live, torch.exp((1 - row_e) * log_p), 0.0), weights, log_p, row_e


def _mean(s: Tensor, g: Tensor, dim: int) -> Tensor:
    """The mean of g with the weights s; 0 if all are 0."""
    total = s.sum(dim, keepdim=True)
    return (s * g).sum(dim, keepdim=True) / torch.where(total == 0, 1.0, total)


def _power(z: Tensor, delta: Tensor, e: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[z - t]^(1/e) with t = delta - 1, its logarithm, and z - t; off the support 0, 0 and 1."""
    u = z - delta
    live = u > -1
    u = torch.where(live, u, 0.0)
    log_p = torch.log1p(u) / e
    return torch.where(live, log_p.exp(), 0.0), log_p, 1 + u
