"""The compiled row operator's way in: tensors become addresses, rows are shared among threads. `compiled` has the loops."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from diffmax import reference
from diffmax._numerics import accumulation_dtype, integer_exponent, newton_steps
from diffmax.cpu.compiled import BACKWARD, FORWARD
from diffmax.cpu.rows import from_rows

# Elements that occupy a thread for longer than it takes to wake one, about 20 us.
THREAD_ELEMENTS = 1 << 15
# Rows are shared out in multiples of the rows that are solved together.
ROWS_TOGETHER = 16

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def bisect(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Forward kernel; arguments and results as `diffmax.reference.bisect`."""
    shape = x.shape
    n = shape[dim]
    acc = accumulation_dtype(x.dtype)
    m = x.new_empty((*shape[:dim], 1, *shape[dim + 1 :]), dtype=None if acc == x.dtype else acc)
    delta = torch.empty_like(m)
    if x.numel() == 0:
        return torch.empty(shape, dtype=x.dtype), m.fill_(-torch.inf), delta.zero_()

    rows, x_stride = _rows(x, dim, n)
    p = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if isinstance(e, Tensor):
        e_rows, e_stride = _per_row(e, m.shape)
        e_at, e_value, (steps, integer) = e_rows.data_ptr(), 0.0, _plan(n_iter, n, 1.0, acc)
    else:
        e_at, e_stride, e_value, (steps, integer) = 0, 0, e, _plan(n_iter, n, e, acc)
    addresses = (rows.data_ptr(), x_stride, p.data_ptr(), m.data_ptr(), delta.data_ptr(), e_at, e_stride, e_value, n)
    _share(FORWARD[_NAMES[x.dtype]], addresses, (integer, steps, ensure_sum_one), m.numel(), n)
    return p if rows is x else from_rows(p, shape, dim), m, delta


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
        *(0.0 if isinstance(e, Tensor) else e, n),
    )
    _share(BACKWARD[_NAMES[p.dtype]], addresses, (), m.numel(), n)
    return grad_x if p_rows is p else from_rows(grad_x, shape, dim), grad_e


def warmup(device: torch.device, dtype: torch.dtype, n: int, e: float | None, backward: bool) -> None:
    """Have the kernels of a dtype compiled, or read from the cache: one serves every length, and e as a float or a tensor."""
    x = torch.zeros(1, n, dtype=dtype)
    residuals = bisect(x, 0.5 if e is None else e, 1, 50, True)
    if backward:
        bisect_backward(x, *residuals, None, 0.5 if e is None else e, 1, False)


@functools.lru_cache(maxsize=1024)
def _plan(n_iter: int, n: int, e: float, acc: torch.dtype) -> tuple[int, int]:
    """The largest number of steps, and k if it is a whole number.

    Two more than Newton's method alone would need: where Halley's step passes the root, Newton's comes back to it.
    """
    return newton_steps(n_iter, n, e, acc) + 2, integer_exponent(e) if e < 1 else 0


def _rows(t: Tensor, dim: int, n: int) -> tuple[Tensor, int]:
    """`t` with the rows along `dim` as its last axis, of unit stride, and the step from row to row: a view where possible."""
    if dim == t.ndim - 1 and t.is_contiguous():
        return t, n
    rows = t.movedim(dim, -1).reshape(-1, n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _per_row(e: Tensor, row_shape: torch.Size) -> tuple[Tensor, int]:
    """e for every row and the step from one to the next: 0 if there is only one e."""
    return (e.contiguous(), 0) if e.numel() == 1 else (e.expand(row_shape).contiguous(), 1)


_pool: ThreadPoolExecutor | None = None


def _share(kernel: Callable[..., None], before: tuple[object, ...], after: tuple[object, ...], n_rows: int, n: int) -> None:
    """Call kernel(*before, start, stop, *after) for all rows, on as many threads as torch would use.

    The calling thread is the first of them.
    """
    if n_rows * n < 2 * THREAD_ELEMENTS or (threads := _useful_threads(n_rows, n)) < 2:
        kernel(*before, 0, n_rows, *after)
        return
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="diffmax")
    height = -(-n_rows // threads // ROWS_TOGETHER) * ROWS_TOGETHER
    shares = [(start, min(start + height, n_rows)) for start in range(0, n_rows, height)]
    others = [_pool.submit(kernel, *before, *share, *after) for share in shares[1:]]
    kernel(*before, *shares[0], *after)
    for other in others:
        other.result()


def _useful_threads(n_rows: int, n: int) -> int:
    return min(torch.get_num_threads(), n_rows * n // THREAD_ELEMENTS, -(-n_rows // ROWS_TOGETHER))


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # its threads live in the parent only
