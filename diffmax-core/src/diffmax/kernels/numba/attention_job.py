"""What a call of attention is to the compiled kernels: a job's words, the memory of its threads, and how it is run."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, cast

import numpy as np
import torch
from numba import cfunc
from torch import Tensor

from diffmax.kernels.numba.attention_backward import STRETCH, make_backward
from diffmax.kernels.numba.attention_forward import WORD_BITS, make_forward
from diffmax.kernels.numba.attention_words import N_COLUMNS, N_WORDS, Sequence, Word
from diffmax.kernels.numba.cache import compile_cached
from diffmax.kernels.numba.jobs import KERNEL
from diffmax.kernels.numba.one_row import LISTED
from diffmax.kernels.numba.products import PANEL_BYTES, ROWS
from diffmax.kernels.numba.rows import plan
from diffmax.kernels.numba.simd import BYTES
from diffmax.kernels.numba.threads import Kernel, run_on_threads
from diffmax.operators.attention.tiles import live_shape
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import TILE, AttentionCall
from diffmax.reference.dropout import threshold

# Scores that a thread holds at a time in the forward kernel stay in the second level of the cache.
SCORE_BYTES = 1 << 19
LEAST_ROWS = 16
# Scratch memory that is never too much.
LEAST_BYTES = 1 << 30
# A thread that finishes first takes more: tasks are shared out in this many chunks per thread.
CHUNKS_PER_THREAD = 16
# Multiplications that occupy a thread for longer than it takes to wake another.
THREAD_PRODUCTS = 1 << 20
Table = np.ndarray[Any, np.dtype[np.int64]]
KINDS = {torch.bfloat16: 1, torch.float16: 2}
COMPUTING: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


class Job:
    """The words of a call. Tensors of which it holds the addresses live as long as it does."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        self.acc = accumulation_dtype(query.dtype)
        self.numbers = np.zeros(N_WORDS)
        self.words = words = self.numbers.view(np.int64)
        self.alive: list[Tensor] = []
        self.table = _sequences(query, key, call)
        self.lanes, self.across = BYTES // self.acc.itemsize, PANEL_BYTES // self.acc.itemsize
        self.head_dim, self.value_dim = query.shape[3], value.shape[3]
        self.head_step, self.value_step = (_multiple(size, self.lanes) for size in (self.head_dim, self.value_dim))
        self.keys = int(self.table[:, Sequence.keys].max()) if len(self.table) else 0
        self.longest = _multiple(self.keys, self.across)
        self.converts = query.dtype in KINDS
        # scratch memory of all threads: one head's keys and values for each, but no more than some copies of them all
        self.most_bytes = max(LEAST_BYTES, 4 * (key.numel() + value.numel()) * self.acc.itemsize)
        self.seen = self.keys  # by a tile of queries, at most
        if call.left >= 0 and call.right >= 0:
            self.seen = min(self.keys, call.left + call.right + TILE)
        self.products = int((self.table[:, Sequence.length] * self.table[:, Sequence.keys]).sum())
        self.products *= query.shape[1] * (self.head_dim + self.value_dim)
        words[Word.table], words[Word.sequences] = self.table.ctypes.data, len(self.table)
        words[Word.kv_heads], words[Word.group] = key.shape[1], query.shape[1] // max(1, key.shape[1])
        words[Word.head_dim], words[Word.value_dim] = self.head_dim, self.value_dim
        words[Word.head_step], words[Word.value_step], words[Word.longest] = self.head_step, self.value_step, self.longest
        words[Word.kind] = KINDS.get(query.dtype, 0)
        for word, t in ((Word.query, query), (Word.key, key), (Word.value, value)):
            self.add(word, t)
        words[Word.length], words[Word.key_length] = query.shape[2], key.shape[2]
        words[Word.left], words[Word.right], words[Word.lower_right] = call.left, call.right, call.lower_right
        words[Word.tiles], words[Word.tile_words] = live_shape(query, key, call)[2:]
        self._add_numbers(query, call)
        self._add_rules(query, call)

    def add(self, word: int, t: Tensor) -> None:
        """Address and strides of (B, H, L, n), whose last dimension the kernels want side by side."""
        t = t.resolve_neg()
        t = self._kept(t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous())
        self.words[word : word + 4] = t.data_ptr(), *t.stride()[:3]

    def add_whole(self, word: int, t: Tensor) -> None:
        """Address of a contiguous tensor, 0 if it is empty."""
        self.words[word] = self._kept(t.resolve_neg().contiguous()).data_ptr() if t.numel() else 0

    def _kept(self, t: Tensor) -> Tensor:
        self.alive.append(t)
        return t

    def _add_numbers(self, query: Tensor, call: AttentionCall) -> None:
        words, numbers = self.words, self.numbers
        numbers[Word.scale] = call.scale
        if COMPUTING[self.acc](call.softcap) > 0:  # the kernels ask whether the word is 0
            numbers[Word.softcap] = call.softcap
        if isinstance(call.e, Tensor):
            self.add_whole(Word.e, call.e)
            words[Word.steps], _ = plan(200, max(1, self.keys), 1.0, query.dtype)
        else:
            numbers[Word.e_value] = call.e
            words[Word.steps], words[Word.integer] = plan(200, max(1, self.keys), call.e, query.dtype)
        if call.dropout_p > 0:
            if call.seed is None:
                raise ValueError("attention: dropout_p comes with a seed, got dropout_p alone")
            words[Word.seed_0], words[Word.seed_1] = (int(word) & 0xFFFFFFFF for word in call.seed.tolist())
            words[Word.least_word] = threshold(call.dropout_p)
            numbers[Word.passed] = 1 / (1 - call.dropout_p) if call.dropout_p < 1 else math.inf

    def _add_rules(self, query: Tensor, call: AttentionCall) -> None:
        words = self.words
        if call.mask is not None:
            self._add_broadcast(Word.mask, call.mask)
        if call.bias is not None:
            bias = call.bias if call.bias.dtype == query.dtype else call.bias.to(self.acc)
            self._add_broadcast(Word.bias, bias)
            words[Word.bias_kind] = KINDS.get(bias.dtype, 0)
        if call.alibi is not None:
            self.add_whole(Word.alibi, call.alibi)
            words[Word.alibi_batch] = call.alibi.shape[1] if call.alibi.ndim == 2 and len(call.alibi) > 1 else 0
        if call.sink is not None:
            self.add_whole(Word.sink, call.sink)

    def _add_broadcast(self, word: int, t: Tensor) -> None:
        """Address and strides of (B, H, L, S), of which dimensions may have size 1."""
        t = t.resolve_neg()
        if t.shape[3] > 1 and t.stride(3) != 1:
            t = t.contiguous()
        self.words[word : word + 5] = self._kept(t).data_ptr(), *_steps(t)

    def add_bias_gradient(self, total: Tensor) -> None:
        """Address and strides of what bias's gradient is added to: a share (B, H, L, S) for each chunk of tasks."""
        words = self.words
        words[Word.grad_bias : Word.grad_bias + 5] = self._kept(total).data_ptr(), *_steps(total[0])
        words[Word.bias_share] = total.stride(0) if len(total) > 1 else 0

    def scratch_of_forward(self, keeps: bool) -> None:
        """Lay out the memory of the forward kernel."""
        stride = _multiple(self.seen, self.across) + self.across + self.lanes
        fitting = max(LEAST_ROWS, SCORE_BYTES // (stride * self.acc.itemsize))
        rows = next(size for size in (TILE, TILE // 2, LEAST_ROWS) if size <= fitting)
        listed = LISTED * self.lanes
        copies = self.converts or self.value_step != self.value_dim
        floats = {
            "panels": self.longest * self.head_dim,
            "value_rows": self.longest * self.value_step if copies else 0,
            "pack_rows": self.across * self.head_step,
            "query_rows": rows * self.head_step,
            "scores": rows * stride,
            "slopes": rows * stride if keeps else 0,
            "sums": (2 * rows + 1) * self.value_step,
            **dict.fromkeys(("z", "weights", "reciprocals", "row_slopes", "some_weights", "some_slopes"), stride),
            **dict.fromkeys(("list_z", "list_weights", "list_slopes"), listed),
            "lanes": 8 * self.lanes,
            "norms": rows,
        }
        integers = {
            "index": stride,
            "some": stride,
            "list_index": listed,
            "touched": int(self.words[Word.tile_words]) * WORD_BITS,
        }
        self._lay_out(rows, stride, floats, integers, rows)

    def scratch_of_backward(self) -> None:
        """Lay out the memory of the backward kernel."""
        rows, stride = TILE, STRETCH + self.lanes
        floats = {
            "panels": self.longest * self.head_dim,
            "value_panels": self.longest * self.value_dim,
            "key_rows": self.longest * self.head_step if self.converts or self.head_step != self.head_dim else 0,
            "value_rows": self.longest * self.value_step if self.converts or self.value_step != self.value_dim else 0,
            "pack_rows": self.across * max(self.head_step, self.value_step),
            "query_rows": rows * self.head_step,
            "grad_rows": rows * self.value_step,
            **dict.fromkeys(("scores", "weights", "slopes", "gradients"), rows * stride),
            "capped": rows * stride if self.numbers[Word.softcap] > 0 else 0,
            "sums": rows * self.head_step,
            "key_sums": self.longest * self.head_step,
            "value_sums": self.longest * self.value_step,
            **dict.fromkeys(("some_weights", "some_slopes"), stride),
            **dict.fromkeys(("means", "row_sums"), rows),
        }
        self._lay_out(rows, stride, floats, {"index": rows, "some": stride, "weighted": rows}, stride)

    def _lay_out(self, rows: int, stride: int, floats: dict[str, int], integers: dict[str, int], places: int) -> None:
        """Tell each part of a thread's memory where it begins; `places` rows, and those of a tile, have theirs noted."""
        self.words[Word.rows], self.words[Word.stride] = rows, stride
        sizes = {name: count * self.acc.itemsize for name, count in floats.items()}
        sizes |= {name: count * 4 for name, count in integers.items()}
        sizes |= dict.fromkeys(("dense", "left_rows", "right_rows"), (places + ROWS) * 8)
        at = 0
        for name, size in sizes.items():
            self.words[getattr(Word, name)] = at
            at += _multiple(size, BYTES)
        self.words[Word.slot_bytes] = at

    def threads(self) -> int:
        """How many threads it is worth."""
        return torch.get_num_threads() if self.products >= 2 * THREAD_PRODUCTS else 1

    def run(self, name: str, tasks_of: Table, chunks: int) -> None:
        """Run a kernel, with so many tasks for each sequence, in so many chunks."""
        words, total = self.words, int(tasks_of.sum())
        if total == 0:
            return
        self.table[:, Sequence.first_task] = np.cumsum(tasks_of) - tasks_of
        kernel, address = _kernel(name, self.acc)
        words[Word.stop], words[Word.chunk] = total, -(-total // chunks)
        fitting = max(1, self.most_bytes // int(words[Word.slot_bytes]))
        threads = min(self.threads(), -(-total // int(words[Word.chunk])), fitting)
        memory = torch.empty(threads * int(words[Word.slot_bytes]) + BYTES, dtype=torch.uint8)
        words[Word.memory] = _multiple(memory.data_ptr(), BYTES)
        if threads == 1:
            words[Word.chunk] = total if chunks == 1 else words[Word.chunk]
            done = kernel(words.ctypes.data)
        else:
            run_on_threads(kernel, address, words.ctypes.data, threads)
            done = int(words[Word.done])
        if done != total:
            raise RuntimeError(f"diffmax: attention's {name} kernel did {done} of {total} tasks")


def _multiple(size: int, of: int) -> int:
    """The least multiple that is not smaller."""
    return -(-size // of) * of


def _steps(t: Tensor) -> list[int]:
    """Strides, 0 where a dimension has size 1."""
    return [0 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)]


def _sequences(query: Tensor, key: Tensor, call: AttentionCall) -> Table:
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        table = np.zeros((query.shape[0], N_COLUMNS), np.int64)
        table[:, Sequence.length], table[:, Sequence.keys] = query.shape[2], key.shape[2]
        table[:, Sequence.batch] = np.arange(len(table))
        return table
    starts_q = _starts("cu_seqlens_q", call.cu_seqlens_q, query.shape[2], call.max_seqlen_q)
    starts_k = _starts("cu_seqlens_k", call.cu_seqlens_k, key.shape[2], call.max_seqlen_k)
    number = np.arange(len(starts_q) - 1)
    table = np.zeros((len(number), N_COLUMNS), np.int64)
    table[:, Sequence.length], table[:, Sequence.keys] = np.diff(starts_q), np.diff(starts_k)
    table[:, Sequence.query_at], table[:, Sequence.key_at] = starts_q[:-1], starts_k[:-1]
    table[:, Sequence.tile_at] = starts_q[:-1] // TILE + number
    table[:, Sequence.number] = number
    return table


def _starts(what: str, starts: Tensor, tokens: int, longest: int) -> Table:
    """Where sequences start, checked: torch.compile cannot look at them, and a kernel would read what is not there."""
    found = starts.numpy().astype(np.int64)
    lengths = np.diff(found)
    if len(found) == 0 or found[0] < 0 or found[-1] > tokens or (lengths < 0).any() or (lengths > longest).any():
        raise ValueError(
            f"attention_varlen: {what} must ascend from 0 to the number of tokens, {tokens}, with no sequence longer than its "
            f"max_seqlen, {longest}; got {starts.tolist()[:10]}"
        )
    return found


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> tuple[Kernel, int]:
    make: Any = {"forward": make_forward, "backward": make_backward}[name]
    compiled = compile_cached(cfunc, KERNEL, error_model="numpy", function=make(COMPUTING[dtype]))
    address = cast("int", compiled.address)
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address), address
