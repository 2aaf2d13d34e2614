"""What a call of attention is to the compiled kernels: a job's words, the memory of its threads, and how it is run."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numba import cfunc
from torch import Tensor

from diffmax.kernels.numba.attention_backward import STRETCH, make_backward
from diffmax.kernels.numba.attention_forward import GROUPED, WORD_BITS, make_forward
from diffmax.kernels.numba.attention_words import N_COLUMNS, N_WORDS, Sequence, Word
from diffmax.kernels.numba.cache import compile_cached
from diffmax.kernels.numba.jobs import KERNEL
from diffmax.kernels.numba.products import DEPTH, PANEL_BYTES, ROWS
from diffmax.kernels.numba.rows import plan
from diffmax.kernels.numba.simd import BYTES
from diffmax.kernels.numba.solver import LISTED
from diffmax.kernels.numba.threads import Kernel, run_job
from diffmax.operators.attention.tiles import live_shape
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import TILE, AttentionCall
from diffmax.reference.dropout import threshold

# Scores that a thread holds at a time in the forward kernel stay in the second level of the cache.
SCORE_BYTES = 1 << 19
LEAST_ROWS = 16
# Of so few rows of queries that share a head of keys, each is multiplied by the keys as they lie, which are not packed.
DIRECT_ROWS = 8
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

    makers: ClassVar[dict[str, Callable[[Any], Any]]] = {"forward": make_forward, "backward": make_backward}

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, sequences: Sequences | None = None
    ) -> None:
        self.acc = accumulation_dtype(query.dtype)
        self.numbers = np.zeros(N_WORDS)
        self.words = words = self.numbers.view(np.int64)
        self.alive: list[Tensor] = []
        tiles = live_shape(query, key, call)[2:] if sequences is None else (0, -(-sequences.keys // (TILE * WORD_BITS)))
        sequences = sequences or _sequences(query, key, call)
        self.table = sequences.table.copy()
        self.lanes, self.across = BYTES // self.acc.itemsize, PANEL_BYTES // self.acc.itemsize
        self.head_dim, self.value_dim = query.shape[3], value.shape[3]
        self.head_step, self.value_step = (_multiple(size, self.lanes) for size in (self.head_dim, self.value_dim))
        self.keys, self.length = sequences.keys, sequences.length
        self.longest = _multiple(self.keys, self.across)
        self.converts = query.dtype in KINDS
        # scratch memory of all threads: one head's keys and values for each, but no more than some copies of them all
        self.most_bytes = max(LEAST_BYTES, 4 * (key.numel() + value.numel()) * self.acc.itemsize)
        self.seen = self.keys  # by a tile of queries, at most
        if call.left >= 0 and call.right >= 0:
            self.seen = min(self.keys, call.left + call.right + TILE)
        self.products = sequences.pairs * query.shape[1] * (self.head_dim + self.value_dim)
        words[Word.table], words[Word.sequences] = self.table.ctypes.data, len(self.table)
        words[Word.kv_heads], words[Word.group] = key.shape[1], query.shape[1] // max(1, key.shape[1])
        words[Word.head_dim], words[Word.value_dim] = self.head_dim, self.value_dim
        words[Word.head_step], words[Word.value_step], words[Word.longest] = self.head_step, self.value_step, self.longest
        words[Word.kind] = KINDS.get(query.dtype, 0)
        for word, t in ((Word.query, query), (Word.key, key), (Word.value, value)):
            self.add(word, t)
        words[Word.length], words[Word.key_length] = query.shape[2], key.shape[2]
        words[Word.left], words[Word.right], words[Word.lower_right] = call.left, call.right, call.lower_right
        words[Word.tiles], words[Word.tile_words] = tiles
        self._add_numbers(query, call)
        self._add_rules(query, call)

    def add(self, word: int, t: Tensor) -> None:
        """Address and strides of (B, H, L, n), whose last dimension the kernels want side by side."""
        t = t.resolve_neg()
        t = self._kept(t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous())
        words = self.words  # one by one: numpy makes an array of a tuple first
        words[word], (words[word + 1], words[word + 2], words[word + 3], _) = t.data_ptr(), t.stride()

    def add_whole(self, word: int, t: Tensor) -> None:
        """Address of a contiguous tensor, 0 if it is empty."""
        self.words[word] = self._kept(t.resolve_neg().contiguous()).data_ptr() if t.numel() else 0

    def add_new(self, word: int, t: Tensor) -> None:
        """Address of a tensor that the caller has made and keeps, 0 if it is empty."""
        self.words[word] = t.data_ptr() if t.numel() else 0

    def add_pages(self, block_table: Tensor, page_size: int) -> None:
        """The pages of the sequences' keys and values: key and value hold pages in place of rows of the batch."""
        self.add_whole(Word.blocks, block_table.to(torch.int32))
        self.words[Word.blocks_step], self.words[Word.page_size] = block_table.shape[1], page_size

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
        """Lay out the memory of the forward kernel, and choose how it multiplies queries by keys."""
        words = self.words
        direct = self.length * int(words[Word.group]) <= DIRECT_ROWS
        words[Word.direct] = direct
        sizes = _Sizes(self.acc.itemsize, self.head_dim, self.value_dim, self.head_step, self.value_step, self.longest)
        copies = self.converts or self.value_step != self.value_dim or words[Word.blocks] != 0
        tiles = int(words[Word.tile_words]) * WORD_BITS
        self._lay_out(_forward_layout(sizes, self.seen, min(self.length, TILE), tiles, copies, keeps, direct))

    def scratch_of_backward(self) -> None:
        """Lay out the memory of the backward kernel."""
        sizes = _Sizes(self.acc.itemsize, self.head_dim, self.value_dim, self.head_step, self.value_step, self.longest)
        copies = (self.converts or self.head_step != self.head_dim, self.converts or self.value_step != self.value_dim)
        self._lay_out(_backward_layout(sizes, *copies, bool(self.numbers[Word.softcap] > 0)))

    def _lay_out(self, layout: _Layout) -> None:
        words = self.words
        words[Word.rows], words[Word.stride], words[Word.slot_bytes] = layout.rows, layout.stride, layout.slot_bytes
        words[Word.panels :] = layout.places

    def threads(self) -> int:
        """How many threads it is worth."""
        return torch.get_num_threads() if self.products >= 2 * THREAD_PRODUCTS else 1

    def chunks(self) -> int:
        """In how many its tasks are shared out."""
        threads = self.threads()
        return 1 if threads == 1 else threads * CHUNKS_PER_THREAD

    def run(self, name: str, tasks_of: Table | int, chunks: int) -> None:
        """Run a kernel, with so many tasks for each sequence, in so many chunks."""
        words = self.words
        if isinstance(tasks_of, int):
            total = tasks_of * len(self.table)
            if len(self.table) > 1:  # the first of one sequence is 0
                self.table[:, Sequence.first_task] = np.arange(len(self.table)) * tasks_of
        else:
            total = int(tasks_of.sum())
            self.table[:, Sequence.first_task] = np.cumsum(tasks_of) - tasks_of
        if total == 0:
            return
        kernel, address = _kernel(self.makers[name], self.acc)
        chunk, slot_bytes = -(-total // chunks), int(words[Word.slot_bytes])
        threads = min(self.threads(), -(-total // chunk), max(1, self.most_bytes // slot_bytes))
        memory = torch.empty(threads * slot_bytes + BYTES, dtype=torch.uint8)
        words[Word.stop], words[Word.chunk], words[Word.memory] = total, chunk, _multiple(memory.data_ptr(), BYTES)
        run_job(name, kernel, address, words, threads, total)


class _Sizes(NamedTuple):
    """What the size of scratch memory depends on, forward and backward, see `Word`."""

    itemsize: int
    head_dim: int
    value_dim: int
    head_step: int
    value_step: int
    longest: int


class _Layout(NamedTuple):
    """A thread's memory: rows and their stride, and where each part begins, from `Word.panels` on, in bytes."""

    rows: int
    stride: int
    slot_bytes: int
    places: Table


@functools.lru_cache(maxsize=256)
def _forward_layout(sizes: _Sizes, seen: int, most_rows: int, tiles: int, copies: bool, keeps: bool, direct: bool) -> _Layout:
    lanes, across = BYTES // sizes.itemsize, PANEL_BYTES // sizes.itemsize
    stride = _multiple(seen, across) + across + lanes
    fitting = max(LEAST_ROWS, SCORE_BYTES // (stride * sizes.itemsize))
    rows = next(size for size in (TILE, TILE // 2, LEAST_ROWS) if size <= fitting)
    rows = min(rows, _multiple(max(1, most_rows), LEAST_ROWS))
    listed = LISTED * lanes
    floats = {
        "panels": 0 if direct else sizes.longest * sizes.head_dim,
        "value_rows": (DEPTH if direct else sizes.longest) * sizes.value_step if copies else 0,
        "pack_rows": across * sizes.head_step,
        "query_rows": rows * sizes.head_step,
        "scores": rows * stride,
        "slopes": rows * stride if keeps else 0,
        "sums": (2 * rows + 1) * sizes.value_step,
        **dict.fromkeys(("z", "weights", "reciprocals", "row_slopes", "some_weights", "some_slopes"), stride),
        **dict.fromkeys(("list_z", "list_weights", "list_slopes"), max(listed, min(stride, GROUPED) * lanes)),
        "lanes": 8 * lanes,
        "norms": rows,
    }
    return _layout(rows, stride, sizes, floats, {"index": stride, "some": stride, "list_index": listed, "touched": tiles}, rows)


@functools.lru_cache(maxsize=256)
def _backward_layout(sizes: _Sizes, copies_keys: bool, copies_values: bool, caps: bool) -> _Layout:
    rows, stride = TILE, STRETCH + BYTES // sizes.itemsize
    floats = {
        "panels": sizes.longest * sizes.head_dim,
        "value_panels": sizes.longest * sizes.value_dim,
        "key_rows": sizes.longest * sizes.head_step if copies_keys else 0,
        "value_rows": sizes.longest * sizes.value_step if copies_values else 0,
        "pack_rows": PANEL_BYTES // sizes.itemsize * max(sizes.head_step, sizes.value_step),
        "query_rows": rows * sizes.head_step,
        "grad_rows": rows * sizes.value_step,
        **dict.fromkeys(("scores", "weights", "slopes", "gradients"), rows * stride),
        "capped": rows * stride if caps else 0,
        "sums": rows * sizes.head_step,
        "key_sums": sizes.longest * sizes.head_step,
        "value_sums": sizes.longest * sizes.value_step,
        **dict.fromkeys(("some_weights", "some_slopes"), stride),
        **dict.fromkeys(("means", "row_sums"), rows),
    }
    return _layout(rows, stride, sizes, floats, {"index": rows, "some": stride, "weighted": rows}, stride)


def _layout(rows: int, stride: int, sizes: _Sizes, floats: dict[str, int], integers: dict[str, int], noted: int) -> _Layout:
    """Parts of so many floats and integers, one behind the other; so many rows have their places noted, and a tile's more."""
    bytes_of = {name: count * sizes.itemsize for name, count in floats.items()}
    bytes_of |= {name: count * 4 for name, count in integers.items()}
    bytes_of |= dict.fromkeys(("dense", "left_rows", "right_rows"), (noted + ROWS) * 8)
    places = np.zeros(N_WORDS, np.int64)
    at = 0
    for name, size in bytes_of.items():
        places[getattr(Word, name)] = at
        at += _multiple(size, BYTES)
    return _Layout(rows, stride, at, places[Word.panels :])


def _multiple(size: int, of: int) -> int:
    """The least multiple that is not smaller."""
    return -(-size // of) * of


def _steps(t: Tensor) -> list[int]:
    """Strides, 0 where a dimension has size 1."""
    return [0 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)]


class Sequences(NamedTuple):
    """The table of sequences; how many keys the longest has, the most queries, and all pairs of a query and a key."""

    table: Table
    keys: int
    length: int
    pairs: int


def _sequences(query: Tensor, key: Tensor, call: AttentionCall) -> Sequences:
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return _whole_batch(query.shape[0], query.shape[2], key.shape[2])
    starts_q = _starts("cu_seqlens_q", call.cu_seqlens_q, query.shape[2], call.max_seqlen_q)
    starts_k = _starts("cu_seqlens_k", call.cu_seqlens_k, key.shape[2], call.max_seqlen_k)
    number = np.arange(len(starts_q) - 1)
    table = np.zeros((len(number), N_COLUMNS), np.int64)
    lengths, keys = np.diff(starts_q), np.diff(starts_k)
    table[:, Sequence.length], table[:, Sequence.keys] = lengths, keys
    table[:, Sequence.query_at], table[:, Sequence.key_at] = starts_q[:-1], starts_k[:-1]
    table[:, Sequence.tile_at] = starts_q[:-1] // TILE + number
    table[:, Sequence.number] = number
    return Sequences(table, int(keys.max(initial=0)), int(lengths.max(initial=0)), int((lengths * keys).sum()))


@functools.lru_cache(maxsize=256)
def _whole_batch(batch: int, length: int, keys: int) -> Sequences:
    return sequences_of([keys] * batch, [0] * batch, list(range(batch)), length)


def sequences_of(keys: list[int], key_at: list[int], key_batch: list[int], length: int) -> Sequences:
    """Sequences of `length` queries each: how many keys each has, where they begin, and in which row of the batch."""
    nothing = [0] * len(keys)
    columns = [nothing] * N_COLUMNS
    columns[Sequence.length], columns[Sequence.batch] = [length] * len(keys), list(range(len(keys)))
    columns[Sequence.keys], columns[Sequence.key_at], columns[Sequence.key_batch] = keys, key_at, key_batch
    table = np.array(columns, np.int64).T.copy()  # in one go: a call of one sequence is short
    return Sequences(table, max(keys, default=0), length, length * sum(keys))


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
def _kernel(make: Callable[[Any], Any], dtype: torch.dtype) -> tuple[Kernel, int]:
    compiled = compile_cached(cfunc, KERNEL, error_model="numpy", function=make(COMPUTING[dtype]))
    address = cast("int", compiled.address)
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address), address
