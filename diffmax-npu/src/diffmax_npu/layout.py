"""Conversion of a tensor, along any dimension, to a matrix of rows and back."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(t: Tensor, dim: int) -> Tensor:
    """`t` as a matrix whose rows run along `dim`: a view if the strides allow it."""
    return t.movedim(dim, -1).reshape(-1, t.shape[dim])


def unrows(matrix: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """The inverse of `rows`: the contiguous tensor of `shape`.

    For autograd it is not a view, because a view returned by an operator cannot be modified in place.
    """
    whole = matrix.view([*shape[:dim], *shape[dim + 1 :], shape[dim]]).movedim(-1, dim).contiguous()
    unviewed: Tensor = torch.ops.aten._unsafe_view(whole, shape)
    return unviewed


def per_row(e: float | Tensor, row_shape: list[int] | torch.Size) -> float | Tensor:
    """e; if it is a tensor, with one entry per row of such a matrix."""
    return e.expand(row_shape).reshape(-1, 1) if isinstance(e, Tensor) else e


def take(e_rows: float | Tensor, block: slice) -> float | Tensor:
    """The e of some rows."""
    return e_rows[block] if isinstance(e_rows, Tensor) else e_rows
