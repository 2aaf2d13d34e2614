"""What a call of power attention is to the compiled kernels: a job's words, the memory of its threads, and how it is run."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numba import cfunc
from torch import Tensor

from diffmax.kernels.numba.cache import compile_cached
from diffmax.kernels.numba.jobs import KERNEL
from diffmax.kernels.numba.power_backward import make_backward
from diffmax.kernels.numba.power_forward import make_forward
from diffmax.kernels.numba.power_words import COLUMNS, N_NUMBERS, N_WORDS, ROWS_AT_ONCE, SLICE, Word
from diffmax.kernels.numba.simd import BYTES
from diffmax.kernels.numba.threads import Kernel, run_job
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power.cost import chosen_chunk
from diffmax.operators.power.symmetric import coefficients, expanded_dim, first_of
from diffmax.plugin import PowerCall

# Multiplications that occupy a thread for longer than it takes to wake another.
THREAD_PRODUCTS = 1 << 20
# Of so few queries that share a head of keys, each is multiplied by the state as it lies.
FEW = 16
# A span of a head's chunks has so many at least.
LEAST_CHUNKS = 4
Table = np.ndarray[Any, np.dtype[np.int64]]
KINDS = {torch.bfloat16: 1, torch.float16: 2}
COMPUTING: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


class Job:
    """The words of a call. Tensors of which it holds the addresses live as long as it does."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: PowerCall) -> None:
        self.acc = accumulation_dtype(query.dtype)
        self.numbers = np.zeros(N_WORDS)
        self.words = words = self.numbers.view(np.int64)
        self.alive: list[Tensor] = []
        batch, heads, length, size = query.shape
        groups, many, value_size = key.shape[1], key.shape[2], value.shape[3]
        self.heads, group = batch * groups, heads // groups if groups else 1
        span = call.chunk or chosen_chunk(length, many, size, value_size, call.degree, group)
        self.is_quadratic = span >= many
        self.columns = max(1, -(-max(length, many) // COLUMNS))
        has_states = not self.is_quadratic or call.final or call.sums is not None
        self.shape = _Shape(self.acc, size, value_size, call.degree, has_states)
        plan = _plan(self.shape)
        self.plan, self.span = plan, max(1, min(span, many))
        words[Word.kv_heads], words[Word.group] = groups, group
        words[Word.head_dim], words[Word.value_dim], words[Word.degree] = size, value_size, call.degree
        words[Word.length], words[Word.many], words[Word.span] = length, many, self.span
        words[Word.kind] = words[Word.out_kind] = KINDS.get(query.dtype, 0)
        words[Word.coefficients], words[Word.firsts] = plan.coefficients.data_ptr(), plan.firsts.ctypes.data
        words[Word.level_at] = plan.level_at.ctypes.data
        for word, number in plan.words:
            words[word] = number
        self.numbers[Word.scale] = call.scale
        for word, t in ((Word.query, query), (Word.key, key), (Word.value, value)):
            self.add(word, t)
        if call.log_gates is not None and many:
            self.add_whole(Word.gates, call.log_gates)
        if call.sums is not None and call.norm is not None:
            self.add_whole(Word.sums, call.sums)
            self.add_whole(Word.norm, call.norm)
        pairs = min(many, self.span) * (size + value_size) * length
        state = plan.monomials * (value_size + 1) * (many + length * group)
        self.products = self.heads * (pairs * group + (0 if self.is_quadratic and call.sums is None else state))

    def add(self, word: int, t: Tensor) -> None:
        """Address and strides of (B, H, L, n), whose last dimension the kernels want side by side."""
        t = t.resolve_neg()
        t = self._kept(t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous())
        self.words[word : word + 4] = t.data_ptr(), *t.stride()[:3]

    def add_whole(self, word: int, t: Tensor) -> None:
        """Address of a contiguous tensor, 0 if it is empty."""
        self.words[word] = self._kept(t.resolve_neg().contiguous()).data_ptr() if t.numel() else 0

    def add_new(self, word: int, t: Tensor) -> None:
        """Address of a tensor that the caller has made and keeps, 0 if it is empty."""
        self.words[word] = t.data_ptr() if t.numel() else 0

    def _kept(self, t: Tensor) -> Tensor:
        self.alive.append(t)
        return t

    def run(self, name: str) -> None:
        """Run a kernel: a task for each head of keys, or for some of its tokens where heads are fewer than threads."""
        if self.heads == 0:
            return
        words = self.words
        threads = torch.get_num_threads() if self.products >= 2 * THREAD_PRODUCTS else 1
        words[Word.parts] = words[Word.spans] = 1
        if threads > 1 and self.is_quadratic:
            words[Word.parts] = self.columns
        chunks = -(-int(words[Word.many]) // self.span)
        spans = min(threads // max(1, self.heads), chunks // LEAST_CHUNKS)
        if spans > 1:
            words[Word.span_chunks] = -(-chunks // spans)
            words[Word.spans] = words[Word.parts] = spans = -(-chunks // int(words[Word.span_chunks]))
            state = self.heads * spans * self.plan.monomials * int(words[Word.state_step])
            states = torch.empty(2 if name == "backward" else 1, state, dtype=self.acc)
            decays = torch.ones(self.heads * spans, dtype=torch.float64)
            words[Word.states], words[Word.of_states] = states[0].data_ptr(), states[-1].data_ptr()
            words[Word.decays], words[Word.collects] = decays.data_ptr(), 1
            self._run(name, threads)
            words[Word.collects] = 0
        self._run(name, threads)

    def step_in_place(self) -> None:
        """Have few queries read the state where it lies, if its rows are whole vectors."""
        words = self.words
        few = int(words[Word.length] * words[Word.group]) <= FEW
        ends = words[Word.end_norm] == 0 or 0 < words[Word.many] <= COLUMNS
        whole = words[Word.value_dim] == words[Word.value_step]
        words[Word.in_place] = few and whole and ends and bool(words[Word.norm]) and self.is_quadratic

    def _run(self, name: str, threads: int) -> None:
        words, tasks = self.words, self.heads * int(self.words[Word.parts])
        layout = self.plan.backward if name == "backward" else self.plan.forward
        since = _multiple(8 * self.span if words[Word.gates] else 0, BYTES)
        starts = _multiple(8 * (-(-int(words[Word.many]) // self.span)) if words[Word.gates] else 0, BYTES)
        words[Word.state :] = layout.places
        words[Word.since], words[Word.starts] = layout.slot_bytes, layout.slot_bytes + since
        words[Word.slot_bytes] = layout.slot_bytes + since + starts
        threads = min(threads, tasks)
        memory = torch.empty(threads * int(words[Word.slot_bytes]) + BYTES, dtype=torch.uint8)
        words[Word.stop], words[Word.chunk] = tasks, 1 if threads > 1 else tasks
        words[Word.memory] = _multiple(memory.data_ptr(), BYTES)
        words[Word.next] = words[Word.done] = words[Word.slots] = 0
        kernel, address = _kernel(name, self.acc)
        run_job(f"power attention's {name}", kernel, address, words, threads, tasks)


class _Shape(NamedTuple):
    """What tables and the size of scratch memory depend on. Without states there are none of their rows."""

    acc: torch.dtype
    size: int
    value_size: int
    degree: int
    has_states: bool


class _Layout(NamedTuple):
    """A thread's memory: where each part begins, from `Word.state` on, in bytes, and where the last one ends."""

    places: Table
    slot_bytes: int


class _Plan(NamedTuple):
    """What calls of a shape share."""

    words: list[tuple[int, int]]
    coefficients: Tensor
    firsts: Table
    level_at: Table
    monomials: int
    forward: _Layout
    backward: _Layout


@functools.lru_cache(maxsize=32)
def _plan(shape: _Shape) -> _Plan:
    acc, size, value_size, degree, has_states = shape
    lanes = BYTES // acc.itemsize
    head_step, value_step = _multiple(size, lanes), _multiple(value_size, lanes)
    row_step, state_step, stride = value_step + lanes, value_step + 1, COLUMNS + lanes
    monomials = expanded_dim(size, degree) if has_states else 0
    places = [[first_of(size, d, i) if d else 0 for i in range(size + 1)] for d in range(degree + 1 if has_states else 0)]
    firsts = np.array(places, np.int64)
    level_at = np.zeros(degree + 1, np.int64)
    level_rows = 0
    for d in range(1, degree if has_states else 2):
        level_at[d] = level_rows
        level_rows += expanded_dim(size, d)
    words = [
        *((Word.head_step, head_step), (Word.value_step, value_step), (Word.row_step, row_step)),
        *((Word.state_step, state_step), (Word.stride, stride), (Word.monomials, monomials), (Word.level_rows, level_rows)),
    ]
    floats = {
        "state": monomials * state_step,
        "levels": max(level_rows, head_step) * stride,
        "entries": SLICE * stride,
        "scores": ROWS_AT_ONCE * stride,
        "lane_rows": COLUMNS * max(head_step, row_step),
        "value_rows": COLUMNS * row_step,
        "rows": ROWS_AT_ONCE * head_step,
        "more_rows": ROWS_AT_ONCE * row_step,
        "result": max(row_step * stride, row_step),
        "numbers_of_lanes": N_NUMBERS * stride,
        "found": stride,
    }
    more = {
        "of_levels": max(level_rows, head_step) * stride,
        "slopes": ROWS_AT_ONCE * stride,
        "lanes_t": row_step * stride,
        "of_values": row_step * stride,
    }
    rows = max(SLICE, ROWS_AT_ONCE, size, value_step + 1)
    like = torch.empty(0, dtype=acc)
    forward, backward = (_layout(acc.itemsize, parts, rows) for parts in (floats, {**floats, **more}))
    c = coefficients(size, degree, like).contiguous() if has_states else like
    return _Plan(words, c, firsts, level_at, monomials, forward, backward)


def _layout(itemsize: int, floats: dict[str, int], rows: int) -> _Layout:
    bytes_of = {name: count * itemsize for name, count in floats.items()}
    bytes_of |= dict.fromkeys(("left_rows", "right_rows"), 8 * rows)
    places = np.zeros(N_WORDS, np.int64)
    at = 0
    for name, size in bytes_of.items():
        places[getattr(Word, name)] = at
        at += _multiple(size, BYTES)
    return _Layout(places[Word.state :], at)


def _multiple(size: int, of: int) -> int:
    """The least multiple that is not smaller."""
    return -(-size // of) * of


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> tuple[Kernel, int]:
    make: Any = {"forward": make_forward, "backward": make_backward}[name]
    compiled = compile_cached(cfunc, KERNEL, error_model="numpy", function=make(COMPUTING[dtype]))
    address = cast("int", compiled.address)
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address), address
