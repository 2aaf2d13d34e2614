"""The compiled row operator's way in: tensors become addresses in a job. `compiled` has the loops, `threads` runs them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffmax import reference
from diffmax.kernels.cpu.rows import from_rows
from diffmax.kernels.numba.functions import DEGREE, OF_SLOPES
from diffmax.kernels.numba.jobs import BACKWARD_JOB, FORWARD_JOB, compiled
from diffmax.kernels.numba.simd import digit_bits
from diffmax.kernels.numba.tables import LARGEST, PowerTable, table_of, tables_for
from diffmax.kernels.numba.threads import Kernel, run_bytes
from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import accumulation_dtype, integer_exponent, newton_steps

# Elements that occupy a thread for longer than it takes to wake one.
THREAD_ELEMENTS = 1 << 14
# Rows are taken in multiples of the rows that are solved together, unless they are long.
ROWS_TOGETHER = 16
# A thread that finishes first takes more: the rows are shared out in this many chunks per thread.
CHUNKS_PER_THREAD = 4

# Below this k, weights near the threshold matter so much that they are moved there from where they have all their digits.
LEAST_BY_TABLE = 3.0

_NO_MEMORY = "diffmax: no memory to solve rows of {} entries in"
_pack_forward = FORWARD_JOB.pack


def bisect(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward kernel; arguments and results as `diffmax.reference.bisect`."""
    acc = accumulation_dtype(x.dtype)
    m = x.new_empty((*x.shape[:dim], 1, *x.shape[dim + 1 :]), dtype=None if acc == x.dtype else acc)
    delta = torch.empty_like(m)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype), m.fill_(-torch.inf), delta.zero_()
    return _weights(x, e, dim, n_iter, ensure_sum_one, m.data_ptr(), delta.data_ptr()), m, delta


def weights(x: Tensor, e: float, dim: int, n_iter: int, ensure_sum_one: bool) -> Tensor:
    """The first result of `bisect` alone, where nothing is to be differentiated. Small tensors have a shorter way."""
    size = x.numel()
    if size == 0:
        return torch.empty(x.shape, dtype=x.dtype)
    if size >= 2 * THREAD_ELEMENTS or dim != x.ndim - 1 or not x.is_contiguous():
        return _weights(x, e, dim, n_iter, ensure_sum_one, 0, 0)
    n = x.shape[dim]
    n_rows = size // n
    p = torch.empty_like(x)
    kernel, steps, integer, _kept = _small_plan(n_iter, n, e, x.dtype)
    job = _pack_forward(
        *(0, 0, n_rows, n_rows, x.data_ptr(), n, p.data_ptr(), 0, 0, 0, 0, n, integer, steps, ensure_sum_one, e)
    )
    if kernel(job) != n_rows:
        raise MemoryError(_NO_MEMORY.format(n))
    return p


bisect.weights = weights  # type: ignore[attr-defined]  # for `operators.rows.operator`: a call that takes this way does without the dispatcher


def _weights(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool, m_at: int, delta_at: int) -> Tensor:
    """The weights; m and delta go to their addresses, if those are not 0."""
    shape = x.shape
    n = shape[dim]
    rows, x_stride = _rows(x, dim, n)
    p = torch.empty_like(x) if rows is x else torch.empty_like(rows, memory_format=torch.contiguous_format)
    if isinstance(e, Tensor):
        e_rows, e_stride = _per_row(e, (*shape[:dim], 1, *shape[dim + 1 :]))
        e_at, e_value, known = e_rows.data_ptr(), 0.0, _known(e)
        steps, *_ = plan(n_iter, n, 1.0, x.dtype)
        integer, _kept = (0, None) if known is None else power_of(known, e.dtype)
    else:
        e_at, e_stride, e_value, (steps, integer, _kept) = 0, 0, e, plan(n_iter, n, e, x.dtype)
    addresses = (rows.data_ptr(), x_stride, p.data_ptr(), m_at, delta_at, e_at, e_stride)
    run("forward", x.dtype, FORWARD_JOB, x.numel() // n, n, *addresses, n, integer, steps, ensure_sum_one, e_value)
    return p if rows is x else from_rows(p, shape, dim)


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
    shape = p.shape
    n = shape[dim]
    if p.numel() == 0 or grad.dtype != p.dtype or (x is not None and x.dtype != p.dtype):
        return reference.bisect_backward(grad, p, m, delta, x, e, dim, needs_e)

    (p_rows, p_stride), (grad_rows, grad_stride) = _rows(p, dim, n), _rows(grad, dim, n)
    x_rows, x_stride = (None, 0) if x is None else _rows(x, dim, n)
    m, delta = m.contiguous(), delta.contiguous()
    grad_x = torch.empty_like(p_rows, memory_format=torch.contiguous_format)
    grad_e = torch.empty_like(m) if needs_e else m.new_empty(0)
    e_rows, e_stride = _per_row(e, m.shape) if isinstance(e, Tensor) else (None, 0)
    addresses = (
        *(grad_rows.data_ptr(), grad_stride, p_rows.data_ptr(), p_stride),
        *(0 if x_rows is None else x_rows.data_ptr(), x_stride, m.data_ptr(), delta.data_ptr(), grad_x.data_ptr()),
        *(grad_e.data_ptr() if needs_e else 0, 0 if e_rows is None else e_rows.data_ptr(), e_stride),
    )
    e_value = 0.0 if isinstance(e, Tensor) else e
    known = _known(e) if isinstance(e, Tensor) else e
    in_table = known is not None and 0 < known < 1 and m.dtype == torch.float32 and not needs_e
    table = table_of(1.0 - cast("float", known), OF_SLOPES) if in_table else None
    run(
        *("backward", p.dtype, BACKWARD_JOB, m.numel(), n, *addresses, n),
        *(0 if table is None else table.ctypes.data, e_value),
    )
    return grad_x if p_rows is p else from_rows(grad_x, shape, dim), grad_e


def warmup(device: torch.device, dtype: torch.dtype, n: int, e: float | None, backward: bool) -> None:
    """Have the kernels of a dtype compiled, or read from the cache: one serves every length, and e as a float or a tensor."""
    x = torch.zeros(1, n, dtype=dtype)
    residuals = bisect(x, 0.5 if e is None else e, 1, 50, True)
    if backward:
        bisect_backward(x, *residuals, None, 0.5 if e is None else e, 1, False)


@functools.lru_cache(maxsize=1024)
def plan(n_iter: int, n: int, e: float, dtype: torch.dtype) -> tuple[int, int, PowerTable | None]:
    """The largest number of steps, k if it is a whole number, else the address of its table or 0, and that, to be kept.

    Four times what Newton's method needs, whose proof does not cover the kernel's shorter steps; it takes two or three.
    """
    return 4 * newton_steps(n_iter, n, e, dtype), *power_of(e, accumulation_dtype(dtype))


@functools.lru_cache(maxsize=1024)
def power_of(e: float, dtype: torch.dtype) -> tuple[int, PowerTable | None]:
    """How u^k is computed in a dtype: k if it is a whole number, else the address of its table or 0; and that, to be kept."""
    whole = integer_exponent(e, dtype) if e < 1 else 0
    table = table_of(1.0 / e) if whole == 0 and dtype == torch.float32 and _has_table(e) else None
    return whole if table is None else table.ctypes.data, table


class PowersOf(NamedTuple):
    """`power_of` for each of some e: the numbers, as a kernel finds them, and the tables that some are addresses of."""

    integers: npt.NDArray[np.int64]
    kept: PowerTable | None


@functools.lru_cache(maxsize=256)
def powers_of(exponents: tuple[float, ...], dtype: torch.dtype) -> PowersOf:
    """`power_of` of many; 0 where e is none. What a head gets does not depend on the others, nor on the size of a call."""
    integers = np.array([integer_exponent(e, dtype) if 0 < e < 1 else 0 for e in exponents], np.int64)
    bits = digit_bits() if dtype == torch.float32 else 0  # type: ignore[no-untyped-call]
    places = [i for i, e in enumerate(exponents) if bits and not integers[i] and _has_table(e)]
    if not places:
        return PowersOf(integers, None)
    tables = tables_for(bits, [1.0 / exponents[i] for i in places], DEGREE)
    integers[places] = tables.ctypes.data + tables.strides[0] * np.arange(len(places))
    return PowersOf(integers, tables)


def _has_table(e: float) -> bool:
    return 1 / LARGEST <= e <= 1 / LEAST_BY_TABLE


@functools.lru_cache(maxsize=1024)
def _small_plan(n_iter: int, n: int, e: float, dtype: torch.dtype) -> tuple[Kernel, int, int, PowerTable | None]:
    """The forward kernel and its `plan`: one look-up."""
    return _kernel("forward", dtype)[0], *plan(n_iter, n, e, dtype)


@alone_in_child
def _rows(t: Tensor, dim: int, n: int) -> tuple[Tensor, int]:
    """`t` with the rows along `dim` as its last axis, of unit stride, and the step from row to row: a view where possible."""
    if dim == t.ndim - 1 and t.is_contiguous():
        return t, n
    rows = t.movedim(dim, -1).reshape(-1, n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _known(e: Tensor) -> float | None:
    """e, if it is one for all rows, whatever the batch."""
    value = e.item() if e.ndim == 0 else -1.0
    return value if 0 <= value <= 1 else None


@alone_in_child
def _per_row(e: Tensor, row_shape: Sequence[int]) -> tuple[Tensor, int]:
    """e for every row and the step from one to the next: 0 if there is only one e."""
    return (e.contiguous(), 0) if e.numel() == 1 else (e.expand(row_shape).contiguous(), 1)


def run(name: str, dtype: torch.dtype, layout: Struct, n_rows: int, n: int, *words: float) -> None:
    """Run a kernel on all rows, on as many threads as torch would use.

    Raises:
        MemoryError: A thread found no memory to work in.
    """
    kernel, address = _kernel(name, dtype)
    threads = torch.get_num_threads() if n_rows * n >= 2 * THREAD_ELEMENTS else 1
    chunk = n_rows if threads == 1 else _chunk(n_rows, n, threads)
    job = layout.pack(0, 0, n_rows, chunk, *words)
    done = run_bytes(kernel, address, job, 1 if chunk >= n_rows else threads)
    if done != n_rows:
        raise MemoryError(_NO_MEMORY.format(n))


def _chunk(n_rows: int, n: int, threads: int) -> int:
    """How many rows a thread takes at a time. That changes no bit of the result."""
    least = ROWS_TOGETHER if n * ROWS_TOGETHER < THREAD_ELEMENTS or n_rows >= threads * ROWS_TOGETHER else 1
    share = -(-n_rows // (threads * CHUNKS_PER_THREAD))
    return -(-share // least) * least


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> tuple[Kernel, int]:
    """A compiled kernel, to be called with a job or its address, and where its machine code is."""
    address = cast("int", compiled(name, dtype).address)
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address), address
