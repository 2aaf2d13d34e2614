"""The row operator's launcher: memory, tile, grid. A vendor's distribution makes one `RowOperator` from its tuning tables.

Nothing here waits for the device, so that a call can be captured into a CUDA graph once its kernels are compiled (`warmup`).
Kernels are compiled for a bounded number of cases: dtype, padded length, layout, whether alpha is a tensor, above or below 1/2,
and five integer exponents; not for each length, stride or alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.kernels.triton.common import geometry
from diffmax.kernels.triton.common.geometry import Geometry, View
from diffmax.kernels.triton.common.launch import (
    COMPILER_OPTIONS,
    SMALLEST_E_FOR_HARDWARE,
    SOLVED,
    Exponent,
    Launch,
    Plans,
    on_device,
    padded,
    signature,
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
    Attributes:
        plans: The launch plans of earlier calls.
    """

    def __init__(self, table: Callable[[torch.device], Table], processors: Callable[[torch.device], int], *, ptx: bool) -> None:
        self.table = table
        self.processors = processors
        self.ptx = ptx
        self.plans = Plans()

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

        tensors = {"x_ptr": x, "p_ptr": p, "m_ptr": m, "delta_ptr": delta}
        plan = self.plans.get(
            signature(x, e, dim, ensure_sum_one, x.device, *self.forced.items()),
            lambda: self._forward(x, p, e, dim, ensure_sum_one),
        )
        with on_device(x.device):
            plan.run(tensors, e, m, copied=("x_ptr",))
        return p, m, delta

    def _forward(self, x: Tensor, p: Tensor, e: float | Tensor, dim: int, ensure_sum_one: bool) -> _Plan:
        """The plan of a forward call."""
        acc, dtype = accumulation_dtype(x.dtype), x.dtype
        exponent, n = Exponent.of(e, acc), x.shape[dim]
        shape, found, _ = geometry.describe((x, p), e if isinstance(e, Tensor) else None, dim)
        table = self.table(x.device)
        hardware = _hardware(exponent, dtype)
        call = _ForwardCall(
            shape=shape,
            n=n,
            scalars={"e": exponent.e, "k": exponent.k, "e_bits": exponent.bits},
            limits={"newton_steps": newton_steps(200, n, 1.0 if exponent.tensor else exponent.e, acc)},
            fixed={
                "E_TENSOR": exponent.tensor, "K": exponent.code, "CUT": SOLVED[dtype], "PTX": self.ptx,
                "X_LAYOUT": shape.views[0].layout, "HARDWARE": hardware,
            },
            ensure_sum_one=ensure_sum_one,
            copies=found[0] is not x,
        )  # fmt: skip
        tiles = table.forward_float64 if acc == torch.float64 else table.forward
        few_registers = exponent.code == 2 or (exponent.code == ABOVE_2 and hardware == HARDWARE_ALL)
        if dtype.itemsize == 2 and few_registers:
            tiles = {width: _fewer_warps(each, width) for width, each in tiles.items() if width == padded(n)}
        tile = self._tile("rows", tiles, n, table, shape, dtype)
        if tile is not None:
            return call.tiled(tile)
        cut, chunks = self._cut("", table, x, shape.rows, n)
        hardware = HARDWARE_NONE if hardware == HARDWARE_FIRST else hardware
        call = replace(call, fixed={**call.fixed, "HARDWARE": hardware, "BLOCK": cut.block, "num_warps": cut.warps})
        return call.stream() if chunks == 1 else call.split(chunks, _expected_iterates(exponent))

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

        grad, p, m, delta = grad.to(p.dtype), p.contiguous(), m.contiguous(), delta.contiguous()
        x = x if x is None else x.contiguous()
        plan = self.plans.get(
            signature(grad, p, m, delta, x, e, dim, needs_e, p.device, *self.forced.items()),
            lambda: self._backward(grad, p, m, x is not None, e, dim, needs_e),
        )
        parts = torch.empty((plan.rows, plan.lanes) if needs_e else (0,), dtype=m.dtype, device=p.device)
        tensors = {
            "g_ptr": grad, "p_ptr": p, "x_ptr": p if x is None else x, "m_ptr": m, "delta_ptr": delta,
            "grad_x_ptr": grad_x, "grad_e_ptr": parts if needs_e else m,
        }  # fmt: skip
        with on_device(p.device):
            plan.run(tensors, e, m, copied=("g_ptr",))
        if not needs_e:
            return grad_x, parts
        return grad_x, (parts if plan.lanes == 1 else parts[:, : plan.chunks].sum(1)).view(m.shape)

    def _backward(self, grad: Tensor, p: Tensor, m: Tensor, from_x: bool, e: float | Tensor, dim: int, needs_e: bool) -> _Plan:
        """The plan of a backward call."""
        exponent, n = Exponent.of(e, m.dtype), p.shape[dim]
        shape, found, _ = geometry.describe((grad, p), e if isinstance(e, Tensor) else None, dim)
        table = self.table(p.device)
        view_g, view_p = shape.views
        shared: dict[str, Any] = {
            **_strides("g", view_g), **_strides("p", view_p), **_e_strides(shape), **_sizes(shape, n),
            "e": exponent.e, "e_bits": exponent.bits,
            "G_LAYOUT": view_g.layout, "P_LAYOUT": view_p.layout, "E_TENSOR": exponent.tensor,
            "FROM_X": from_x, "NEEDS_E": needs_e, "PTX": self.ptx,
        }  # fmt: skip
        tiles = table.backward_float64 if m.dtype == torch.float64 else table.backward
        tile = self._tile("rows_backward", tiles, n, table, shape, p.dtype)
        copies = found[0] is not grad
        if tile is not None:
            arguments = {**shared, "ROWS": tile.rows, "BLOCK": padded(n), "num_warps": tile.warps}
            return _Plan((Launch(bisect_bwd_rows_kernel, _grid(shape, tile.rows), arguments),), {}, shape.rows, copies=copies)
        cut, chunks = self._cut("_backward", table, p, shape.rows, n)
        lanes = 1 if chunks == 1 else MOST_CHUNKS
        shared |= {"chunks": chunks, "BLOCK": cut.block, "CHUNKS": lanes, "num_warps": cut.warps}
        passes = ((True, True),) if chunks == 1 else ((True, False), (False, True))
        launches = (
            Launch(bisect_bwd_long_kernel, (shape.rows * chunks,), {**shared, "SUMS": sums, "WRITES": writes})
            for sums, writes in passes
        )
        return _Plan(tuple(launches), {"sums_ptr": 2 * lanes}, shape.rows, chunks, lanes, copies)

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


class _Plan(NamedTuple):
    """The launches of a call, one after the other.

    Attributes:
        launches: The launches.
        scratch: Entries of scratch memory per row, by the name of the kernels' pointer.
        rows: The number of rows.
        chunks, lanes: Programs per row, and the entries per row of alpha's gradient that they write.
        copies: Whether the tensors cannot be addressed as they are (`geometry.describe`).
    """

    launches: tuple[Launch, ...]
    scratch: dict[str, int]
    rows: int
    chunks: int = 1
    lanes: int = 1
    copies: bool = False

    def run(self, tensors: dict[str, Tensor], e: float | Tensor, m: Tensor, copied: tuple[str, ...]) -> None:
        """Launch; `copied` are the names of the tensors that the call may copy, besides e."""
        tensors["e_ptr"] = m if not isinstance(e, Tensor) else e.expand(m.shape).contiguous() if self.copies else e
        for name in copied if self.copies else ():
            tensors[name] = tensors[name].contiguous()
        for name, per_row in self.scratch.items():
            tensors[name] = torch.empty(self.rows * per_row, dtype=m.dtype, device=m.device)
        for launch in self.launches:
            launch(tensors)


@dataclass(frozen=True)
class _ForwardCall:
    """The arguments shared by all launches of a forward call."""

    shape: Geometry
    n: int
    scalars: dict[str, Any]
    limits: dict[str, int]
    fixed: dict[str, Any]
    ensure_sum_one: bool
    copies: bool

    def _arguments(self, *names: str) -> dict[str, Any]:
        """Strides, sizes, and the named fixed arguments of a kernel for streamed rows."""
        strides = {**_strides("x", self.shape.views[0]), **_sizes(self.shape, self.n)}
        return strides | {name: self.fixed[name] for name in ("X_LAYOUT", "BLOCK", "num_warps", *names)}

    def _plan(self, scratch: dict[str, int], *launches: Launch) -> _Plan:
        return _Plan(launches, scratch, self.shape.rows, copies=self.copies)

    def tiled(self, tile: Tile) -> _Plan:
        """Rows in the registers of a program."""
        arguments = {
            **_strides("x", self.shape.views[0]), **_sizes(self.shape, self.n), **self.fixed, **self._weights_arguments(),
            **self.scalars, **self.limits, "high": -math.expm1(-self.scalars["e"] * math.log(self.n)),
            "ENSURE_SUM_ONE": self.ensure_sum_one,
            "ROWS": tile.rows, "BLOCK": padded(self.n), "KEEP": tile.keep, "num_warps": tile.warps,
        }  # fmt: skip
        return self._plan({}, Launch(bisect_rows_kernel, _grid(self.shape, tile.rows), arguments))

    def stream(self) -> _Plan:
        """One program per row."""
        arguments = {
            **self._arguments("E_TENSOR", "K", "CUT", "HARDWARE", "PTX"), **self._weights_arguments(),
            **self.scalars, **self.limits, "ENSURE_SUM_ONE": self.ensure_sum_one,
        }  # fmt: skip
        return self._plan({"tops_ptr": self._tiles()}, Launch(bisect_stream_kernel, (self.shape.rows,), arguments))

    def split(self, chunks: int, iterates: int) -> _Plan:
        """Several programs per row."""
        rows, lanes = self.shape.rows, {"chunks": chunks, "CHUNKS": MOST_CHUNKS}
        grid, e_strides = (rows * chunks,), _e_strides(self.shape)
        solver = {**self._arguments("E_TENSOR", "K", "CUT", "HARDWARE", "PTX"), **e_strides, **self.scalars, **lanes}
        start = {**self._arguments("E_TENSOR"), **e_strides, **self.scalars, **lanes}
        finish = {**solver, **self.limits, "n_rows": rows, "stage": iterates, "ENSURE_SUM_ONE": self.ensure_sum_one}
        write = {
            **self._arguments("E_TENSOR", "K", "HARDWARE", "PTX"), **self._weights_arguments(), **self.scalars, "chunks": chunks
        }  # fmt: skip
        scratch = {
            "tops_ptr": self._tiles(), "chunk_tops_ptr": MOST_CHUNKS, "ends_ptr": 3,
            "sums_ptr": (iterates + 1) * 3 * MOST_CHUNKS, "state_ptr": (iterates + 1) * 3,
        }  # fmt: skip
        return self._plan(
            scratch,
            Launch(split_top_kernel, grid, {**self._arguments(), **lanes}),
            Launch(split_start_kernel, grid, start),
            *(
                Launch(split_step_kernel, grid, {**solver, "n_rows": rows, "stage": stage, "FIRST": stage == 1})
                for stage in range(1, iterates + 1)
            ),
            Launch(split_finish_kernel, (rows,), finish),
            Launch(split_write_kernel, grid, write),
        )

    def _weights_arguments(self) -> dict[str, int]:
        view = self.shape.views[1]
        return {**_strides("p", view), **_e_strides(self.shape), "P_LAYOUT": view.layout}

    def _tiles(self) -> int:
        return -(-self.n // int(self.fixed["BLOCK"]))


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
