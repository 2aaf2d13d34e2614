"""Tensors of any strides as four dimensions: two outer ones, a third whose rows share a program, and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OUTER_DIMENSIONS = 3
VECTOR_BYTES = 16

# Layouts as in `layout`, which can be imported only with Triton
STRIDED, COLUMNS, ROWS_ADJACENT, ALIGNED = range(4)


@dataclass(frozen=True)
class View:
    """How the kernels address a tensor: strides of the three outer dimensions and of the columns, and the layout number."""

    outer: tuple[int, int, int]
    column: int
    layout: int


def collapse(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]] | None:
    """Merge the outer dimensions of all tensors into three, in the same way; None if that needs a copy.

    Two adjacent dimensions can be merged if, in every tensor, the left stride is the right stride times the right size.
    """
    merged_sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        steps = [tensor[axis] for tensor in strides]
        if merged_sizes and all(kept[-1] == step * size for kept, step in zip(merged, steps, strict=True)):
            merged_sizes[-1] *= size
            for kept, step in zip(merged, steps, strict=True):
                kept[-1] = step
        else:
            merged_sizes.append(size)
            for kept, step in zip(merged, steps, strict=True):
                kept.append(step)
    missing = OUTER_DIMENSIONS - len(merged_sizes)
    if missing < 0:
        return None
    return [1] * missing + merged_sizes, [[0] * missing + kept for kept in merged]


@dataclass(frozen=True)
class Geometry:
    """Sizes of the outer dimensions, and a view per tensor; the strides of e are 0 if it is a float."""

    sizes: tuple[int, int, int]
    views: tuple[View, ...]
    e_strides: tuple[int, int, int]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.sizes[0] * self.sizes[1] * self.sizes[2]


def describe(tensors: Sequence[Tensor], e: Tensor | None, dim: int) -> tuple[Geometry, tuple[Tensor, ...], Tensor | None]:
    """The geometry of tensors of one shape and of e, which broadcasts against their rows.

    Tensors whose outer dimensions cannot be merged into three are copied; the geometry describes the returned tensors.
    """
    shape = tensors[0].shape
    sizes = [*shape[:dim], *shape[dim + 1 :]]
    row_shape = [*shape[:dim], 1, *shape[dim + 1 :]]
    if e is not None:
        e = e.expand(row_shape)
    merged = collapse(sizes, _strides(tensors, e, dim))
    if merged is None:
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        e = None if e is None else e.contiguous()
        merged = collapse(sizes, _strides(tensors, e, dim))
        assert merged is not None, f"contiguous tensors of shape {tuple(shape)} have two outer dimensions at most"
    (size_0, size_1, size_2), strides = merged
    views = [_view(tensor, outer, dim) for tensor, outer in zip(tensors, strides, strict=False)]
    e_0, e_1, e_2 = strides[-1] if e is not None else (0, 0, 0)
    return Geometry((size_0, size_1, size_2), tuple(views), (e_0, e_1, e_2)), tuple(tensors), e


def _strides(tensors: Sequence[Tensor], e: Tensor | None, dim: int) -> list[list[int]]:
    every = [*tensors] if e is None else [*tensors, e]
    return [[step for axis, step in enumerate(tensor.stride()) if axis != dim] for tensor in every]


def _view(tensor: Tensor, outer: Sequence[int], dim: int) -> View:
    n, column = tensor.shape[dim], tensor.stride(dim)
    first, second, third = outer
    vector = VECTOR_BYTES // tensor.element_size()
    if column == 1 or n == 1:
        whole = tensor.data_ptr() % VECTOR_BYTES == 0 and not any(number % vector for number in (n, *outer))
        layout = ALIGNED if whole and column == 1 else COLUMNS
    else:
        layout = ROWS_ADJACENT if third == 1 else STRIDED
    return View((first, second, third), column, layout)


def contiguous_like(x: Tensor) -> Tensor:
    """An uninitialized contiguous tensor of x's shape, dtype and device."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
