"""The row operator from operators that torch_npu runs on the device, in blocks of rows that stay in its cache.

It differs from `diffmax.reference` only for speed. docs/npu.md has the number of launches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffmax import reference
from diffmax_npu.layout import per_row, rows, take, unrows
from diffmax_npu.solver import solve

# Elements per block. Scores and two buffers, 96 MiB in float32, fit the 192 MiB cache of an Ascend 910B; with smaller blocks
# the launches cost more than a closer buffer gains.
BLOCK_ELEMENTS = 1 << 23


def bisect(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward kernel; arguments and results as `diffmax.reference.bisect`, but for float64, which the device lacks."""
    row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    if x.numel() == 0:
        return reference.bisect(x, e, dim, n_iter, ensure_sum_one)

    x_rows, e_rows = rows(x, dim), per_row(e, row_shape)
    p, results = torch.empty(x_rows.shape, dtype=x.dtype, device=x.device), []
    for block in _blocks(*x_rows.shape):
        results.append(_solve_block(x_rows[block], take(e_rows, block), n_iter, ensure_sum_one, p[block]))
    m, delta = (torch.cat(parts).view(row_shape) for parts in zip(*results, strict=True))
    return unrows(p, x.shape, dim), m, delta


def _solve_block(x: Tensor, e: float | Tensor, n_iter: int, ensure_sum_one: bool, p: Tensor) -> tuple[Tensor, Tensor]:
    """Write the weights, return m and delta; the buffers are freed before the next block allocates its own."""
    solved = solve(x.to(torch.float32), e, n_iter, ensure_sum_one, x.dtype != torch.float32)
    p.copy_(solved.p)
    return solved.m, solved.delta


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
    """Backward kernel; arguments and results as `diffmax.reference.bisect_backward`, whose formulas run block by block."""
    if p.numel() == 0:
        return reference.bisect_backward(grad, p, m, delta, x, e, dim, needs_e)

    grad_rows, p_rows, m_rows, delta_rows = (rows(t, dim) for t in (grad, p, m, delta))
    x_rows, e_rows = None if x is None else rows(x, dim), per_row(e, m.shape)
    grad_x, grads_e = torch.empty_like(p_rows, memory_format=torch.contiguous_format), []
    for block in _blocks(*p_rows.shape):
        scores = None if x_rows is None else x_rows[block]
        of_x, of_e = reference.bisect_backward(
            *(grad_rows[block], p_rows[block], m_rows[block], delta_rows[block], scores, take(e_rows, block), 1, needs_e)
        )
        grad_x[block].copy_(of_x)
        grads_e.append(of_e)
    return unrows(grad_x, p.shape, dim), torch.cat(grads_e).view(m.shape) if needs_e else grads_e[0]


def _blocks(n_rows: int, n: int) -> Iterator[slice]:
    height = max(1, BLOCK_ELEMENTS // n)
    return (slice(start, start + height) for start in range(0, n_rows, height))
