"""The row operator by core's shared Triton kernels, lowered by Triton-Ascend: experimental and opt-in.

See docs/npu.md: the kernels are lowered to the input of the chip's own compiler, and keep its documented limits. They have
never run on a chip.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from diffmax import reference
from diffmax.kernels.triton.common.tuning import Table, Tile
from diffmax.kernels.triton.rows.launch import RowOperator
from diffmax_npu.layout import per_row, rows, take, unrows

# Triton-Ascend refuses larger grids.
MOST_PROGRAMS = 65535

# Entries per tile: half of a core's 192 KiB holds a dozen float32 tensors of this size. The compiler uses the other half for
# prefetching.
TILE_ELEMENTS = 2048


def table(device: torch.device) -> Table:
    """Tiles for rows of each padded length; warps have no effect here."""
    tiles = {n: Tile(max(1, TILE_ELEMENTS // n), 4) for n in (16 << power for power in range(8))}
    return Table("documented limits", tiles, tiles, {}, {}, TILE_ELEMENTS, 4, TILE_ELEMENTS)


# One processor, so that no row is split over several programs: Triton-Ascend 3.2.0 cannot lower that kernel.
operator = RowOperator(table, lambda device: 1, ptx=False)


def bisect(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward kernel; arguments and results as `diffmax.reference.bisect`."""
    if x.numel() == 0:
        return reference.bisect(x, e, dim, n_iter, ensure_sum_one)
    row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    matrix, row_e = rows(x, dim), per_row(e, row_shape)
    with _on(x.device):
        parts = [operator.bisect(matrix[some], take(row_e, some), 1, n_iter, ensure_sum_one) for some in _slices(len(matrix))]
    p, m, delta = (torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True))
    return unrows(p, x.shape, dim), m.view(row_shape), delta.view(row_shape)


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
    if p.numel() == 0:
        return reference.bisect_backward(grad, p, m, delta, x, e, dim, needs_e)
    given = [None if t is None else rows(t, dim) for t in (grad, p, m, delta, x)]
    row_e, parts = per_row(e, m.shape), []
    with _on(p.device):
        for some in _slices(m.numel()):
            g, weights, top, d, scores = (t if t is None else t[some] for t in given)
            parts.append(operator.bisect_backward(g, weights, top, d, scores, take(row_e, some), 1, needs_e))  # type: ignore[arg-type]
    grad_x, grad_e = (torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True))
    return unrows(grad_x, p.shape, dim), grad_e.view(m.shape) if needs_e else grad_e


def _slices(rows: int) -> list[slice]:
    return [slice(start, start + MOST_PROGRAMS) for start in range(0, rows, MOST_PROGRAMS)]


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the device of the tensors the current one, on which Triton launches."""
    module = getattr(torch, device.type, None)
    change: contextlib.AbstractContextManager[object] = (
        module.device(device) if device.type == "npu" and module is not None else contextlib.nullcontext()
    )
    return change
