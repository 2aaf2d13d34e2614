"""The row operator for CPUs in plain PyTorch: blocks of rows that fit the cache, only candidates where they are few.

It differs from `diffmax.reference` for speed alone. Equations: docs/theory.md.
"""

import math

import torch
from torch import Tensor

from diffmax import reference
from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import accumulation_dtype, alpha_weight, clamp_e, integer_exponent, newton_steps

# Elements of one block: its three buffers stay in the last level of the cache. Smaller blocks lose more to the cost of calling
# an operator, and of splitting it over threads, than a nearer cache gains.
BLOCK_ELEMENTS = 1 << 18

# Listing the candidates costs about as much as one evaluation of S over all entries. It pays where this share or less is left.
SPARSE_SHARE = 1 / 2

_LOG2_E = 1 / math.log(2)
_TINY = 2.0**-60


@alone_in_child
def bisect(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward kernel; arguments and results as `diffmax.reference.bisect`."""
    acc = accumulation_dtype(x.dtype)
    row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    m = torch.full(row_shape, -torch.inf, dtype=acc)
    delta = torch.zeros_like(m)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype), m, delta

    x_rows = _rows(x, dim)
    n_rows, n = x_rows.shape
    p_rows = torch.empty(n_rows, n, dtype=x.dtype)
    m_rows, delta_rows, e_rows = m.view(-1, 1), delta.view(-1, 1), _per_row(e, row_shape)
    steps = newton_steps(n_iter, n, 1.0 if isinstance(e, Tensor) else e, acc)
    buffers = [torch.empty(min(n_rows * n, max(n, BLOCK_ELEMENTS)), dtype=acc) for _ in range(3)]
    for rows in _blocks(n_rows, n):
        z, a, b = (buffer[: x_rows[rows].numel()].view(-1, n) for buffer in buffers)
        row_e = clamp_e(_take(e_rows, rows))
        scores = x_rows[rows].to(acc)
        torch.amax(scores, 1, keepdim=True, out=m_rows[rows])
        # a fully masked row has m = -inf: subtract 0 there, so that every z is -inf and not NaN
        torch.sub(scores, m_rows[rows].masked_fill(m_rows[rows] == -torch.inf, 0.0), out=z).mul_(row_e)

        candidates = _candidates(z)
        if candidates is None:
            p, total, delta_rows[rows] = _newton(z, a, b, row_e, steps)
            _normalise(p, total, ensure_sum_one, out=p_rows[rows])
        else:
            index, listed, z = candidates
            p, total, delta_rows[rows] = _newton(z, torch.empty_like(z), torch.empty_like(z), row_e, steps)
            _normalise(p, total, ensure_sum_one, out=p)
            p_rows[rows].zero_().view(-1)[index] = p[listed].to(x.dtype)

    row_e = _take(e_rows, slice(None))
    invalid = m_rows.isnan() | (m_rows == torch.inf)
    if isinstance(row_e, Tensor):
        invalid |= ~((row_e >= 0) & (row_e <= 1))
    if invalid.any():
        p_rows.masked_fill_(invalid, torch.nan)
    return from_rows(p_rows, x.shape, dim), m, delta


@alone_in_child
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
    """Backward kernel; arguments and results as `diffmax.reference.bisect_backward`."""
    if p.numel() == 0 or x is not None:
        return reference.bisect_backward(grad, p, m, delta, x, e, dim, needs_e)

    p_rows, grad_rows, e_rows = _rows(p, dim), _rows(grad, dim), _per_row(e, m.shape)
    grad_x_rows = torch.empty_like(p_rows, memory_format=torch.contiguous_format)
    grad_e_rows = torch.empty_like(m).view(-1, 1) if needs_e else None
    for rows in _blocks(*p_rows.shape):
        row_e = clamp_e(_take(e_rows, rows))
        weights, g = p_rows[rows].to(m.dtype), grad_rows[rows].to(m.dtype)
        s = _slopes(weights, row_e)
        product = s * g
        total = s.sum(1, keepdim=True)
        mean = product.sum(1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        grad_x_rows[rows] = torch.addcmul(product, s, mean, value=-1, out=product)  # s * (g - mean)
        if grad_e_rows is not None:
            log_p = weights.masked_fill(weights == 0, 1.0).log_()
            grad_e_rows[rows] = -(alpha_weight(weights, log_p, row_e) * (g - mean)).sum(1, keepdim=True)
    grad_e = m.new_empty(0) if grad_e_rows is None else grad_e_rows.view(m.shape)
    return from_rows(grad_x_rows, p.shape, dim), grad_e


def _rows(t: Tensor, dim: int) -> Tensor:
    """`t` as a matrix whose rows run along `dim`: a view where the strides allow it."""
    return t.movedim(dim, -1).reshape(-1, t.shape[dim])


@alone_in_child
def from_rows(rows: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """The contiguous tensor of `shape` that `_rows(..., dim)` turns into `rows`, which is given up.

    It is no view for autograd: the result of an operator that is one cannot be changed in place.
    """
    whole = rows.view([*shape[:dim], *shape[dim + 1 :], shape[dim]]).movedim(-1, dim).contiguous()
    unviewed: Tensor = torch.ops.aten._unsafe_view(whole, shape)
    return unviewed


def _per_row(e: float | Tensor, row_shape: list[int] | torch.Size) -> float | Tensor:
    return e.expand(row_shape).reshape(-1, 1) if isinstance(e, Tensor) else e


def _take(e_rows: float | Tensor, rows: slice) -> float | Tensor:
    return e_rows[rows] if isinstance(e_rows, Tensor) else e_rows


def _blocks(n_rows: int, n: int) -> list[slice]:
    height = max(1, BLOCK_ELEMENTS // n)
    return [slice(start, min(start + height, n_rows)) for start in range(0, n_rows, height)]


def _candidates(z: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The entries with z > -1 = t_0, side by side in a narrower matrix; None where they are too many to be worth it.

    Returns their positions in z (flat), which places of the narrow matrix are taken, and the narrow matrix; a place that is
    not taken holds -inf, a score that weighs nothing.
    """
    live = z > -1
    counts = live.sum(1, keepdim=True)
    width = max(1, int(counts.max()))
    if width > SPARSE_SHARE * z.shape[1]:
        return None
    index = live.view(-1).nonzero().squeeze(1)
    listed = torch.arange(width) < counts
    short = torch.full(listed.shape, -torch.inf, dtype=z.dtype)
    short[listed] = z.view(-1)[index]
    return index, listed, short


def _newton(z: Tensor, a: Tensor, b: Tensor, e: float | Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solve every row for t = delta - 1 (Eq. 2); `a` and `b` are work space like z.

    Returns [z - t]^k at the last iterate (in `a`), its sum, and delta.
    """
    k = 0 if isinstance(e, Tensor) else integer_exponent(e, z.dtype)
    eps = torch.finfo(z.dtype).eps
    delta = torch.zeros(z.shape[0], 1, dtype=z.dtype)
    last = steps == 0
    for step in range(steps + 1):
        _integer_powers(z, delta, k, a, b) if k else _powers(z, delta, e, a, b)
        total = a.sum(1, keepdim=True)
        excess = total - 1  # NaN in a row of NaN, -1 in a fully masked row: neither counts as unsolved
        unsolved = excess > 4 * eps
        if last or not unsolved.any():
            break
        # S - S^alpha = -S expm1(-e ln S): the difference of two numbers near 1, without cancellation
        update = -total * torch.expm1(-e * total.log()) / b.sum(1, keepdim=True)
        delta = torch.where(unsolved, delta + update, delta)
        # convergence is quadratic: a step from below sqrt(eps) ends at rounding level
        last = step + 1 == steps or not (excess > math.sqrt(eps)).any()
    return a, total, delta


def _powers(z: Tensor, delta: Tensor, e: float | Tensor, a: Tensor, b: Tensor) -> None:
    """a = [z - t]^k and b = [z - t]^(k-1) with k = 1/e, in the log1p form that keeps the digits near alpha = 1."""
    torch.sub(z, delta, out=a).clamp_min_(-1.0)
    torch.add(a, 1.0, out=b).clamp_min_(_TINY)
    a.log1p_().mul_(_LOG2_E / e).exp2_()
    torch.div(a, b, out=b)


def _integer_powers(z: Tensor, delta: Tensor, k: int, a: Tensor, b: Tensor) -> None:
    """As `_powers`, by multiplications."""
    torch.add(z, 1.0 - delta, out=a).clamp_min_(0.0)
    torch.mul(a, a, out=b) if k > 2 else b.copy_(a)
    for factor in _MULTIPLICATION_CHAINS[k]:
        b.mul_(a if factor == "base" else b)
    a.mul_(b)


# From b = base^2 (base, for k = 2) to b = base^(k-1), one multiplication each: by the base or by b itself.
_MULTIPLICATION_CHAINS: dict[int, tuple[str, ...]] = {
    2: (),
    3: (),
    4: ("base",),
    5: ("itself",),
    10: ("itself", "itself", "base"),
}


def _normalise(p: Tensor, total: Tensor, ensure_sum_one: bool, out: Tensor) -> None:
    if ensure_sum_one:
        torch.div(p, total.masked_fill(total == 0, 1.0), out=out)
    elif out is not p:
        out.copy_(p)


def _slopes(p: Tensor, e: float | Tensor) -> Tensor:
    """p^alpha, 0 where p is 0 (at alpha = 0 too)."""
    if not isinstance(e, Tensor) and e == 0.5:
        return p.sqrt()
    # log2 is four times slower at 0, and slower still at subnormal numbers: keep it off them
    return p.clamp_min(torch.finfo(p.dtype).tiny).log2_().mul_(1 - e).exp2_().mul_(p != 0)
