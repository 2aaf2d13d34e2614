"""The row operator's launcher: memory, tile, grid. A vendor's distribution makes one `RowOperator` from its tuning tables.

Nothing here waits for the device, so that a call can be captured into a CUDA graph once its kernels are compiled (`warmup`).
Kernels are compiled for a bounded number of cases: dtype, padded length, layout, whether alpha is a tensor, above or below 1/2,
and five integer exponents; not for each length, stride or alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.common import geometry
from diffmax.kernels.triton.common.geometry import Geometry, View
from diffmax.kernels.triton.common.launch import (
    COMPILER_OPTIONS,
    SERIES_TERMS,
    SMALLEST_E_FOR_HARDWARE,
    SOLVED,
    Exponent,
    on_device,
    padded,
)
from diffmax.kernels.triton.common.numerics import ABOVE_2, HARDWARE_ALL, HARDWARE_FIRST, HARDWARE_NONE
from diffmax.kernels.triton.common.tuning import Stream, Table, Tile, Tunable
from diffmax.kernels.triton.rows.backward import bisect_bwd_rows_kernel
from diffmax.kernels.triton.rows.forward import bisect_rows_kernel
from diffmax.kernels.triton.rows.long_backward import bisect_bwd_long_kernel
from diffmax.kernels.triton.rows.split import (
    split_finish_kernel,
    split_start_kernel,
    split_step_kernel,
    split_top_kernel,
    split_write_kernel,
)
from diffmax.kernels.triton.rows.stream import bisect_stream_kernel
from diffmax.operators.common.numerics import accumulation_dtype, newton_steps

MOST_CHUNKS = 512


class RowOperator(Tunable):
    """`bisect` and `bisect_backward` for one vendor, with the signatures of `diffmax.reference`.

    Args:
        table: The tuning table for a device.
        processors: How many multiprocessors (compute units) a device has.
        ptx: Whether the compiler takes NVIDIA's assembly: the bare exponential and logarithm instructions.
    """

    def __init__(self, table: Callable[[torch.device], Table], processors: Callable[[torch.device], int], *, ptx: bool) -> None:
        self.table = table
        self.processors = processors
        self.ptx = ptx

    def bisect(
        self, x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Forward kernel; arguments and results as `diffmax.reference.bisect`.

        Rows are always solved to the precision of their dtype, so that any `n_iter` is honoured.
        """
        acc = accumulation_dtype(x.dtype)
        row_shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
        p = geometry.contiguous_like(x)
        m = torch.empty(row_shape, dtype=acc, device=x.device)
        delta = torch.empty(row_shape, dtype=acc, device=x.device)
        if x.numel() == 0:
            return p, m.fill_(-torch.inf), delta.zero_()

        exponent, n = Exponent.of(e, acc), x.shape[dim]
        e_tensor = e if isinstance(e, Tensor) else None
        shape, (x, p), e_tensor = geometry.describe((x, p), e_tensor, dim)
        e_tensor = m if e_tensor is None else e_tensor
        table = self.table(x.device)
        scalars = {"e": exponent.e, "k": exponent.k, "e_bits": exponent.bits}
        limits = {"newton_steps": newton_steps(200, n, 1.0 if exponent.tensor else exponent.e, acc)}
        fixed = {
            "E_TENSOR": exponent.tensor,
            "K": exponent.code,
            "CUT": SOLVED[x.dtype],
            "PTX": self.ptx,
            "X_LAYOUT": shape.views[0].layout,
        }
        view_x, view_p = shape.views
        tiles = table.forward_float64 if acc == torch.float64 else table.forward
        hardware = _hardware(exponent, x.dtype)
        few_registers = exponent.code == 2 or (exponent.code == ABOVE_2 and hardware == HARDWARE_ALL)
        if x.dtype.itemsize == 2 and few_registers:
            tiles = {width: _fewer_warps(each, width) for width, each in tiles.items() if width == padded(n)}
        tile = self._tile("rows", tiles, n, table, shape, x.dtype)
        with on_device(x.device):
            if tile is not None:
                bisect_rows_kernel[_grid(shape, tile.rows)](
                    x, p, m, delta, e_tensor,
                    **_strides("x", view_x), **_strides("p", view_p), **_e_strides(shape), **_sizes(shape, n),
                    **scalars, **limits, **fixed, high=-math.expm1(-exponent.e * math.log(n)),
                    P_LAYOUT=view_p.layout, ENSURE_SUM_ONE=ensure_sum_one, HARDWARE=hardware,
                    ROWS=tile.rows, BLOCK=padded(n), KEEP=tile.keep, num_warps=tile.warps,
                )  # fmt: skip
                return p, m, delta
            cut, chunks = self._cut("", table, x, shape.rows, n)
            fixed |= {"HARDWARE": HARDWARE_NONE if hardware == HARDWARE_FIRST else hardware, "BLOCK": cut.block}
            call = _LongCall(x, p, m, delta, e_tensor, shape, n, scalars, limits, fixed, cut.warps)
            if chunks == 1:
                call.stream(ensure_sum_one)
            else:
                call.split(ensure_sum_one, chunks, _expected_iterates(exponent))
        return p, m, delta

    def bisect_backward(
        self,
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
        grad_x = geometry.contiguous_like(p)
        if p.numel() == 0:
            return grad_x, torch.zeros(m.shape if needs_e else (0,), dtype=m.dtype, device=p.device)

        exponent, n = Exponent.of(e, m.dtype), p.shape[dim]
        p, m, delta = p.contiguous(), m.contiguous(), delta.contiguous()
        x = x if x is None else x.contiguous()
        shape, (grad, p), e_tensor = geometry.describe((grad.to(p.dtype), p), e if isinstance(e, Tensor) else None, dim)
        table = self.table(p.device)
        view_g, view_p = shape.views
        e_tensor = m if e_tensor is None else e_tensor
        shared: dict[str, Any] = {
            **_strides("g", view_g), **_strides("p", view_p), **_e_strides(shape), **_sizes(shape, n),
            "e": exponent.e, "e_bits": exponent.bits,
            "G_LAYOUT": view_g.layout, "P_LAYOUT": view_p.layout, "E_TENSOR": exponent.tensor,
            "FROM_X": x is not None, "NEEDS_E": needs_e, "TERMS": SERIES_TERMS[m.dtype], "PTX": self.ptx,
        }  # fmt: skip
        x = p if x is None else x
        is_double = m.dtype == torch.float64
        tiles = table.backward_float64 if is_double else table.backward
        tile = self._tile("rows_backward", tiles, n, table, shape, p.dtype)
        with on_device(p.device):
            if tile is not None:
                grad_e = torch.empty(m.shape if needs_e else (0,), dtype=m.dtype, device=p.device)
                bisect_bwd_rows_kernel[_grid(shape, tile.rows)](
                    grad, p, x, m, delta, e_tensor, grad_x, grad_e if needs_e else m,
                    **shared, ROWS=tile.rows, BLOCK=padded(n), num_warps=tile.warps,
                )  # fmt: skip
                return grad_x, grad_e
            cut, chunks = self._cut("_backward", table, p, shape.rows, n)
            lanes = 1 if chunks == 1 else MOST_CHUNKS
            parts = torch.empty((shape.rows, lanes) if needs_e else (1, 1), dtype=m.dtype, device=p.device)
            sums = torch.empty(shape.rows * 2 * lanes, dtype=m.dtype, device=p.device)
            for does_sums, writes in ((True, True),) if chunks == 1 else ((True, False), (False, True)):
                bisect_bwd_long_kernel[(shape.rows * chunks,)](
                    grad, p, x, m, delta, e_tensor, grad_x, parts, sums, chunks=chunks,
                    **shared, BLOCK=cut.block, CHUNKS=lanes, SUMS=does_sums, WRITES=writes, num_warps=cut.warps,
                )  # fmt: skip
            return grad_x, parts[:, :chunks].sum(1).view(m.shape) if needs_e else m.new_empty(0)

    def warmup(self, device: torch.device, dtype: torch.dtype, n: int, e: float | None, backward: bool) -> None:
        """Compile the kernels for rows of length `n`, by calls with and without aligned rows, including alpha's gradient.

        Args:
            device: Device of the calls.
            dtype: Dtype of the scores.
            n: Length of the rows.
            e: 1 - alpha, or None for alpha as a tensor.
            backward: Whether to prepare the backward too.
        """
        acc = accumulation_dtype(dtype)
        for width in (n, n + 1):  # the rows of the second view are not aligned to whole vectors
            x = torch.zeros(2, width, dtype=dtype, device=device)[:, :n]
            row_e = torch.full((2, 1), 0.5, dtype=acc, device=device) if e is None else e
            p, m, delta = self.bisect(x, row_e, 1, 50, True)
            if backward:
                for needs_e in (False, True) if e is None else (False,):
                    self.bisect_backward(x, p, m, delta, x if dtype == torch.float16 else None, row_e, 1, needs_e)

    def _tile(
        self, kernel: str, tiles: Mapping[int, Tile], n: int, table: Table, shape: Geometry, dtype: torch.dtype
    ) -> Tile | None:
        """The tile for rows of length n; None if they are streamed."""
        width = padded(n)
        tile: Tile | None = tiles.get(width)
        if tile is None:
            return None
        tile = self.tuned(table, kernel, dtype, n) or tile
        if geometry.ROWS_ADJACENT not in (view.layout for view in shape.views):
            return tile
        # neighbouring rows share cache lines: process as many of them as registers allow
        rows = max(tile.rows, min(16, table.adjacent_elements // width))
        return replace(tile, rows=rows, warps=max(tile.warps, min(16, rows * width // 1024)))

    def _cut(self, suffix: str, table: Table, x: Tensor, rows: int, n: int) -> tuple[Stream, int]:
        """The tile of streamed rows, and the number of programs per row."""
        default = Stream(table.stream_block // (2 if x.dtype == torch.float64 else 1), table.stream_warps)
        processors = self.processors(x.device)
        if rows < processors:
            cut = self.tuned(table, f"split{suffix}", x.dtype) or default
            chunks = min(-(-n // cut.block), -(-cut.programs * processors // rows), MOST_CHUNKS)
            if chunks > 1:
                return cut, chunks
        return self.tuned(table, f"stream{suffix}", x.dtype) or default, 1


@dataclass(frozen=True)
class _LongCall:
    """The arguments shared by all launches of a forward call on streamed rows."""

    x: Tensor
    p: Tensor
    m: Tensor
    delta: Tensor
    e_tensor: Tensor
    shape: Geometry
    n: int
    scalars: dict[str, Any]
    limits: dict[str, int]
    fixed: dict[str, Any]
    warps: int

    def _arguments(self, *names: str) -> dict[str, Any]:
        """Strides, sizes, and the named fixed arguments of a kernel."""
        strides = {**_strides("x", self.shape.views[0]), **_sizes(self.shape, self.n)}
        return strides | {name: self.fixed[name] for name in ("X_LAYOUT", "BLOCK", *names)} | {"num_warps": self.warps}

    def stream(self, ensure_sum_one: bool) -> None:
        """One program per row."""
        bisect_stream_kernel[(self.shape.rows,)](
            self.x, self.p, self.m, self.delta, self.e_tensor, self._scratch(self._tiles()),
            **self._arguments("E_TENSOR", "K", "CUT", "HARDWARE", "PTX"), **self._weights_arguments(),
            **self.scalars, **self.limits, ENSURE_SUM_ONE=ensure_sum_one,
        )  # fmt: skip

    def split(self, ensure_sum_one: bool, chunks: int, iterates: int) -> None:
        """Several programs per row."""
        rows = self.shape.rows
        tops, chunk_tops, ends = self._scratch(self._tiles()), self._scratch(MOST_CHUNKS), self._scratch(3)
        sums, state = self._scratch((iterates + 1) * 3 * MOST_CHUNKS), self._scratch((iterates + 1) * 3)
        e_strides = _e_strides(self.shape)
        grid, lanes = (rows * chunks,), {"chunks": chunks, "CHUNKS": MOST_CHUNKS}
        solver = self._arguments("E_TENSOR", "K", "CUT", "HARDWARE", "PTX")
        split_top_kernel[grid](self.x, tops, chunk_tops, **self._arguments(), **lanes)
        split_start_kernel[grid](
            self.x, self.e_tensor, tops, chunk_tops, sums, **self._arguments("E_TENSOR"), **e_strides, **self.scalars, **lanes
        )
        for stage in range(1, iterates + 1):
            split_step_kernel[grid](
                self.x, self.e_tensor, tops, chunk_tops, sums, state,
                **solver, **e_strides, **self.scalars, **lanes, n_rows=rows, stage=stage, FIRST=stage == 1,
            )  # fmt: skip
        split_finish_kernel[(rows,)](
            self.x, self.m, self.delta, self.e_tensor, tops, chunk_tops, sums, state, ends,
            **solver, **e_strides, **self.scalars, **self.limits, **lanes,
            n_rows=rows, stage=iterates, ENSURE_SUM_ONE=ensure_sum_one,
        )  # fmt: skip
        split_write_kernel[grid](
            self.x, self.p, self.m, self.e_tensor, tops, ends,
            **self._arguments("E_TENSOR", "K", "HARDWARE", "PTX"), **self._weights_arguments(), **self.scalars, chunks=chunks,
        )  # fmt: skip

    def _weights_arguments(self) -> dict[str, int]:
        view = self.shape.views[1]
        return {**_strides("p", view), **_e_strides(self.shape), "P_LAYOUT": view.layout}

    def _tiles(self) -> int:
        return -(-self.n // int(self.fixed["BLOCK"]))

    def _scratch(self, per_row: int) -> Tensor:
        return torch.empty(self.shape.rows * per_row, dtype=self.m.dtype, device=self.x.device)


def _fewer_warps(tile: Tile, width: int) -> Tile:
    """Half the warps where a thread of 32 lanes then holds 64 scores: what is computed per row is repeated by every thread."""
    halves = tile.warps > 1 and tile.rows * width == 1024 * tile.warps
    return replace(tile, warps=tile.warps // 2) if halves else tile


def _grid(shape: Geometry, rows: int) -> tuple[int]:
    size_0, size_1, size_2 = shape.sizes
    return (size_0 * size_1 * -(-size_2 // rows),)


def _sizes(shape: Geometry, n: int) -> dict[str, int]:
    return {"n": n, "size_1": shape.sizes[1], "size_2": shape.sizes[2], **COMPILER_OPTIONS}


def _strides(letter: str, view: View) -> dict[str, int]:
    return {f"{letter}_{axis}": step for axis, step in enumerate(view.outer)} | {f"{letter}_col": view.column}


def _e_strides(shape: Geometry) -> dict[str, int]:
    return {f"e_{axis}": step for axis, step in enumerate(shape.e_strides)}


def _hardware(exponent: Exponent, dtype: torch.dtype) -> int:
    """Where the hardware logarithm is used (`numerics.HARDWARE_*`)."""
    if exponent.tensor or exponent.integer or exponent.e < SMALLEST_E_FOR_HARDWARE or dtype == torch.float64:
        return int(HARDWARE_NONE)
    return int(HARDWARE_FIRST if dtype == torch.float32 else HARDWARE_ALL)


def _expected_iterates(exponent: Exponent) -> int:
    """Number of launches that evaluate a split row; a single program solves rows that need more. See docs/performance.md."""
    if exponent.tensor:
        return 4
    return 3 if exponent.k >= 2 else 5
