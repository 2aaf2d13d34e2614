"""The arithmetic of the loss, row by row, in plain PyTorch around the row operator (docs/theory.md, section 12).

Weights are held for one block of rows at a time. If there is only one block, they are saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffmax.operators.common.numerics import accumulation_dtype, alpha_weight, clamp_e

# Elements per block. Saving less than 4 MB is not worth a second solve; on an accelerator a block must be worth its launches.
CPU_BLOCK_ELEMENTS = 1 << 20
DEVICE_BLOCK_ELEMENTS = 1 << 25

# Terms of the series of Eq. 19; the remainder is below rounding for |q| <= 1/4.
_TERMS = {torch.float32: 11, torch.float64: 25}
_NEAR = 1 / 4


def loss(
    x: Tensor, target: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, backend: str
) -> tuple[Tensor, Tensor]:
    """The loss of every row, in m's shape, and the weights if they fit one block, else (0,). Both in the accumulation dtype.

    Arguments as for `torch.ops.diffmax.loss`.
    """
    acc = accumulation_dtype(x.dtype)
    rows = row_shape(x, dim)
    losses = x.new_empty(rows, dtype=acc)
    weights = x.new_empty((0,), dtype=acc)
    of_block = soft_losses if target.is_floating_point() else _index_losses
    for block in _blocks(x, dim):
        scores = x[block].to(acc)
        row_e = _take(e_tensor, rows, block)
        p, m, delta = torch.ops.diffmax.bisect(scores, e, row_e, dim, n_iter, True, backend)
        losses[block] = of_block(scores, target[block], p, m, delta, clamp_e(e if row_e is None else row_e), dim)
        if kept_shape(x) == x.shape:
            weights = p
    return losses, weights


def loss_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    target: Tensor,
    e: float,
    e_tensor: Tensor | None,
    dim: int,
    n_iter: int,
    needs_x: bool,
    needs_e: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients for x, in its dtype, and for e, in m's shape; each is (0,) if not needed.

    Weights that were not saved are recomputed: saved, they would be as large as x.
    """
    acc = accumulation_dtype(x.dtype)
    rows = row_shape(x, dim)
    grad_x = x.new_empty(x.shape if needs_x else (0,))
    grad_e = x.new_empty(rows if needs_e else (0,), dtype=acc)
    for block in _blocks(x, dim):
        row_e = _take(e_tensor, rows, block)
        p = weights
        if weights.ndim == 1:
            p = torch.ops.diffmax.bisect(x[block].to(acc), e, row_e, dim, n_iter, True, backend)[0]
        y, g = target[block], grad[block]
        idle = silent(y, p.amax(dim, keepdim=True) == 0)
        if needs_e:
            slope = omega_slopes(y, p, clamp_e(e if row_e is None else row_e), dim)
            grad_e[block] = (g * slope).masked_fill_(idle, 0.0)
        if needs_x:
            product = p * g if p is weights else p.mul_(g)
            residual = product.sub_(y * g) if y.is_floating_point() else product.scatter_add_(dim, y.clamp_min(0), -g)
            grad_x[block] = residual.masked_fill_(idle, 0.0)
    return grad_x, grad_e


def kept_shape(x: Tensor) -> torch.Size | tuple[int, ...]:
    """Shape of the weights that forward saves: x's shape if they fit one block, else (0,)."""
    return x.shape if 0 < x.numel() <= _block_elements(x) else (0,)


def row_shape(x: Tensor, dim: int) -> list[int]:
    """x's shape with `dim` reduced to 1."""
    return [*x.shape[:dim], 1, *x.shape[dim + 1 :]]


def silent(target: Tensor, masked: Tensor) -> Tensor:
    """Rows without loss and gradient: `masked`, or ignored, with a negative index."""
    return masked if target.is_floating_point() else masked | (target < 0)


def omega_slopes(target: Tensor, p: Tensor, e: float | Tensor, dim: int) -> Tensor:
    """dL/de = dOmega(y)/de - dOmega(p)/de (Eq. 20), in differentiable operators of p and e."""
    slope = -_omega_slope(p, e, dim)  # 0 for an index: Omega is 0 at every corner of the simplex
    return slope + _omega_slope(target.to(p.dtype), e, dim) if target.is_floating_point() else slope


def _index_losses(x: Tensor, index: Tensor, p: Tensor, m: Tensor, delta: Tensor, e: float | Tensor, dim: int) -> Tensor:
    """Eq. 18 for a target that is a corner of the simplex."""
    place = index.clamp_min(0)
    p_y, x_y = p.gather(dim, place), x.gather(dim, place)
    p.scatter_(dim, place, 0.0)
    rest, powers = p.sum(dim, keepdim=True), p.pow(1 + e).sum(dim, keepdim=True)
    p.scatter_(dim, place, p_y)
    return index_losses(rest, powers, p_y, x_y, m, delta, e).masked_fill_(silent(index, m == -torch.inf), 0.0)


def index_losses(rest: Tensor, powers: Tensor, p_y: Tensor, x_y: Tensor, m: Tensor, delta: Tensor, e: float | Tensor) -> Tensor:
    """Eq. 18 from numbers per row: the weight and the score of its class, and sums of p and p^(1 + e) over the other classes.

    rest is 1 - p_y without cancellation.
    """
    far = (m - x_y) + delta / e - (1 - p_y.pow(1 + e)) / (1 + e)
    return torch.where(rest <= _NEAR, _near(rest, e), far) + powers / (1 + e)


def soft_losses(
    x: Tensor,
    target: Tensor,
    p: Tensor,
    m: Tensor,
    delta: Tensor,
    e: float | Tensor,
    dim: int,
    expm1: Callable[[Tensor], Tensor] = torch.expm1,
) -> Tensor:
    """Eq. 18 for any target on the simplex."""
    y = target.to(p.dtype)
    shared = y > 0
    y = torch.where(shared, y, 1.0)
    q = (y - p) / y
    p_power, y_power = p.pow(1 + e), y.pow(1 + e)
    far = y * (expm1(e * y.log()) / e + (m - x) + delta / e) - (y_power - p_power) / (1 + e)
    terms = torch.where(q.abs() <= _NEAR, y_power * _near(q, e), far.clamp_min_(0.0))
    losses = torch.where(shared, terms, p_power / (1 + e)).sum(dim, keepdim=True)
    return losses.masked_fill_(silent(target, m == -torch.inf), 0.0)


def _near(q: Tensor, e: float | Tensor) -> Tensor:
    """D(1 - q) by its series (Eq. 19), for |q| <= 1/4."""
    terms = _TERMS[q.dtype]
    series = torch.full_like(q, 1 / (terms + 2))
    for k in range(terms, 0, -1):
        series = series * q * ((k - e) / k) + 1 / (k + 1)
    return q.square() * series


def _omega_slope(q: Tensor, e: float | Tensor, dim: int) -> Tensor:
    """dOmega/de at q: a sum of nonnegative terms (Eq. 20)."""
    log_q = torch.where(q != 0, q, 1.0).log()
    v = e * log_q
    near = v > -1
    near_log, far_e = torch.where(near, log_q, 0.0), torch.where(near, torch.ones_like(v), e)
    # q^e w with w of Eq. 6; one expression if v is far from 0, because q^e may round to 0 and w to infinity
    curved = torch.where(near, v.exp() * alpha_weight(q, near_log, e), q * (v * v.exp() - v.expm1()) / far_e**2)
    return (curved / (1 + e) - q * v.expm1() / (e * (1 + e) ** 2)).sum(dim, keepdim=True)


def _take(e_tensor: Tensor | None, rows: list[int], block: tuple[slice, ...]) -> Tensor | None:
    return None if e_tensor is None else e_tensor.expand(rows)[block]


def _blocks(x: Tensor, dim: int) -> Iterator[tuple[slice, ...]]:
    """Index tuples that split x along its longest axis other than `dim`; also valid for tensors with one entry per row."""
    if x.numel() == 0:
        return
    axis = max((axis for axis in range(x.ndim) if axis != dim), key=lambda axis: x.shape[axis])
    height = max(1, _block_elements(x) * x.shape[axis] // x.numel())
    for start in range(0, x.shape[axis], height):
        yield (*[slice(None)] * axis, slice(start, start + height))


def _block_elements(x: Tensor) -> int:
    return CPU_BLOCK_ELEMENTS if x.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
