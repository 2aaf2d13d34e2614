"""What a call of attention is to the compiled kernels: a job's words, the memory of its threads, and how it is run."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from array import array
from collections.abc import Callable
from struct import Struct
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
from diffmax.kernels.numba.rows import plan, powers_of
from diffmax.kernels.numba.simd import BYTES
from diffmax.kernels.numba.solver import LISTED
from diffmax.kernels.numba.tables import PowerTable
from diffmax.kernels.numba.threads import Kernel, leave, run_packed, take
from diffmax.operators.attention.tiles import live_shape
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import TILE, AttentionCall
from diffmax.reference.dropout import threshold

# Scores that a thread holds at a time in the forward kernel stay in the second level of the cache.
SCORE_BYTES = 1 << 19
LEAST_ROWS = 16
# Of so few rows of queries that share a head of keys, each is multiplied by the keys as they lie, which are not packed.
DIRECT_ROWS = 8
# Of few queries there is room for a multiple of so many keys: a sequence that grows by a token finds its form again.
STEP = 256
# So many sequences are quicker in an array than in a list.
MANY = 64
# Scratch memory that is never too much.
LEAST_BYTES = 1 << 30
# A thread that finishes first takes more: tasks are shared out in this many chunks per thread.
CHUNKS_PER_THREAD = 16
# Multiplications that occupy a thread for longer than it takes to wake another.
THREAD_PRODUCTS = 1 << 20
Table = np.ndarray[Any, np.dtype[np.int64]]
Words = list[Any]
Numbers = list[int] | range
# Words as the kernels find them: whole numbers, but for those from scale on.
WORDS = Struct(f"{Word.scale}q{Word.panels - Word.scale}d{N_WORDS - Word.panels}q")
KINDS = {torch.bfloat16: 1, torch.float16: 2}
COMPUTING: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


class Job:
    """The words of a call. Tensors of which it holds the addresses live as long as it does.

    With `sequences` given, keys and values are those of a cache, (B, S, H_kv, D).
    """

    makers: ClassVar[dict[str, Callable[[Any], Any]]] = {"forward": make_forward, "backward": make_backward}

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, sequences: Sequences | None = None
    ) -> None:
        query, is_cache = _in_rows(query), sequences is not None
        if not is_cache:
            key, value = _in_rows(key), _in_rows(value)
        self.alive = [query, key, value]
        tiles = live_shape(query, key, call)[2:] if sequences is None else (0, -(-sequences.keys // (TILE * WORD_BITS)))
        sequences = sequences or _sequences(query, key, call)
        e = None if isinstance(call.e, Tensor) else call.e
        kv_heads = key.shape[2 if is_cache else 1]
        self.form = form = _form(
            *(query.dtype, query.shape[1], kv_heads, query.shape[3], value.shape[3], sequences.keys),
            *(e, call.softcap, call.left, call.right, call.lower_right),
        )
        self.acc, self.sizes, self.table, self.length = form.acc, form.sizes, sequences.table, sequences.length
        # how many threads it is worth
        self.threads = torch.get_num_threads() if sequences.pairs * form.products >= 2 * THREAD_PRODUCTS else 1
        self.words = words = form.words.copy()
        self.heads = query.shape[1]
        self.sequences = words[Word.sequences] = len(self.table) // N_COLUMNS
        words[Word.query : Word.query + 4] = query.data_ptr(), *query.stride()[:3]
        for word, t in ((Word.key, key), (Word.value, value)):
            batch, *steps, _ = t.stride()
            words[word : word + 4] = t.data_ptr(), batch, *(reversed(steps) if is_cache else steps)
        words[Word.length], words[Word.key_length] = query.shape[2], key.shape[1 if is_cache else 2]
        words[Word.tiles], words[Word.tile_words] = tiles
        words[Word.scale] = call.scale
        self._add_values(call)
        self._add_rules(query, call)

    def add(self, word: int, t: Tensor) -> None:
        """Address and strides of (B, H, L, n), whose last dimension the kernels want side by side."""
        t = self._kept(_in_rows(t))
        self.words[word : word + 4] = t.data_ptr(), *t.stride()[:3]

    def add_whole(self, word: int, t: Tensor) -> None:
        """Address of a contiguous tensor, 0 if it is empty."""
        self.words[word] = self._kept(t.resolve_neg().contiguous()).data_ptr() if t.numel() else 0

    def add_new(self, word: int, t: Tensor) -> None:
        """Address of a tensor that the caller has made and keeps; one without memory has 0."""
        self.words[word] = t.data_ptr()

    def add_pages(self, block_table: Tensor, page_size: int) -> None:
        """The pages of the sequences' keys and values: key and value hold pages in place of rows of the batch."""
        self.add_whole(Word.blocks, block_table.to(torch.int32))
        self.words[Word.blocks_step], self.words[Word.page_size] = block_table.shape[1], page_size

    def _kept(self, t: Tensor) -> Tensor:
        self.alive.append(t)
        return t

    def _add_values(self, call: AttentionCall) -> None:
        words = self.words
        if isinstance(call.e, Tensor):
            self.add_whole(Word.e, call.e)
            self.powers = powers_of(tuple(call.e.tolist()), self.acc)
            words[Word.integers] = self.powers.integers.ctypes.data
        if call.dropout_p > 0:
            if call.seed is None:
                raise ValueError("attention: dropout_p comes with a seed, got dropout_p alone")
            words[Word.seed_0], words[Word.seed_1] = (int(word) & 0xFFFFFFFF for word in call.seed.tolist())
            words[Word.least_word] = threshold(call.dropout_p)
            words[Word.passed] = 1 / (1 - call.dropout_p) if call.dropout_p < 1 else math.inf

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

    def fold(self, heads: int) -> None:
        """Have rows stand for heads that share keys, so many of them: each has its own e and sink."""
        self.words[Word.of_head], self.words[Word.of_row] = heads, 1

    def add_bias_gradient(self, total: Tensor) -> None:
        """Address and strides of what bias's gradient is added to: a share (B, H, L, S) for each chunk of tasks."""
        words = self.words
        words[Word.grad_bias : Word.grad_bias + 5] = self._kept(total).data_ptr(), *_steps(total[0])
        words[Word.bias_share] = total.stride(0) if len(total) > 1 else 0

    def scratch_of_forward(self, keeps: bool) -> None:
        """Lay out the memory of the forward kernel, and choose how it multiplies queries by keys."""
        words = self.words
        direct = self.length * words[Word.group] <= DIRECT_ROWS
        words[Word.direct] = direct
        sizes, form = self.sizes, self.form
        copies = form.converts or sizes.value_step != sizes.value_dim or words[Word.blocks] != 0
        tiles = words[Word.tile_words] * WORD_BITS
        self._lay_out(_forward_layout(sizes, form.seen, min(self.length, TILE), tiles, copies, keeps, direct))

    def scratch_of_backward(self) -> None:
        """Lay out the memory of the backward kernel."""
        sizes, converts = self.sizes, self.form.converts
        copies = (converts or sizes.head_step != sizes.head_dim, converts or sizes.value_step != sizes.value_dim)
        self._lay_out(_backward_layout(sizes, *copies, self.words[Word.softcap] > 0))

    def _lay_out(self, layout: _Layout) -> None:
        words = self.words
        words[Word.rows], words[Word.stride], words[Word.slot_bytes] = layout.rows, layout.stride, layout.slot_bytes
        words[Word.panels :] = layout.places

    def chunks(self) -> int:
        """In how many its tasks are shared out."""
        return 1 if self.threads == 1 else self.threads * CHUNKS_PER_THREAD

    def tasks_of_forward(self) -> list[int] | Table:
        """How many tasks each sequence has: a tile of a head's queries is one."""
        lengths = self.table[Sequence.length :: N_COLUMNS]
        if isinstance(lengths, list):
            return [-(-length // TILE) * self.heads for length in lengths]
        return -(-lengths // TILE) * self.heads

    def run(self, name: str, tasks_of: list[int] | Table, chunks: int = 0) -> None:
        """Run a kernel, with so many tasks for each sequence, in so many chunks; 0: as many as serve."""
        words, table = self.words, self.table
        total = sum(tasks_of) if isinstance(table, list) else int(np.sum(tasks_of))
        if total == 0:
            return
        if isinstance(table, list):
            table[Sequence.first_task :: N_COLUMNS] = itertools.accumulate(tasks_of[:-1], initial=0)
            rows = array("q", table).tobytes()
        else:
            table[Sequence.first_task :: N_COLUMNS] = np.cumsum(tasks_of) - tasks_of
            rows = table.tobytes()
        kernel, address = _kernel(self.makers[name], self.acc)
        chunk, slot_bytes = -(-total // (chunks or self.chunks())), words[Word.slot_bytes]
        threads = 1
        if self.threads > 1:  # each has memory for a head's keys and values, all together for some copies of them all at most
            numbers = sum(t.numel() for t in self.alive[1:3])
            most_bytes = max(LEAST_BYTES, 4 * numbers * self.acc.itemsize)
            threads = min(self.threads, -(-total // chunk), max(1, most_bytes // slot_bytes))
        memory = take(threads * slot_bytes + BYTES)
        words[Word.stop], words[Word.chunk], words[Word.memory] = total, chunk, _multiple(memory.data_ptr(), BYTES)
        run_packed(name, kernel, address, WORDS.pack(*words) + rows, threads, total)
        leave(memory)


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
    places: list[int]


class _Form(NamedTuple):
    """What calls share that differ in addresses and values alone."""

    acc: torch.dtype
    words: Words
    sizes: _Sizes
    converts: bool
    seen: int
    products: int
    table: PowerTable | None  # which `Word.integer` may be the address of


@functools.lru_cache(maxsize=256)
def _form(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    keys: int,
    e: float | None,
    softcap: float,
    left: int,
    right: int,
    lower_right: bool,
) -> _Form:
    """The form of a call, of its heads, room for the keys of a sequence, and numbers."""
    acc = accumulation_dtype(dtype)
    words: Words = [0] * N_WORDS
    lanes, across = BYTES // acc.itemsize, PANEL_BYTES // acc.itemsize
    sizes = _Sizes(
        acc.itemsize, head_dim, value_dim, _multiple(head_dim, lanes), _multiple(value_dim, lanes), _multiple(keys, across)
    )
    words[Word.kv_heads], words[Word.group], words[Word.of_head] = kv_heads, heads // max(1, kv_heads), 1
    words[Word.head_dim], words[Word.value_dim] = head_dim, value_dim
    words[Word.head_step], words[Word.value_step], words[Word.longest] = sizes.head_step, sizes.value_step, sizes.longest
    words[Word.kind] = KINDS.get(dtype, 0)
    words[Word.left], words[Word.right], words[Word.lower_right] = left, right, lower_right
    if COMPUTING[acc](softcap) > 0:  # the kernels ask whether the word is 0
        words[Word.softcap] = softcap
    if e is None:
        words[Word.steps], _, table = plan(200, max(1, keys), 1.0, dtype)
    else:
        words[Word.e_value] = e
        words[Word.steps], words[Word.integer], table = plan(200, max(1, keys), e, dtype)
    # the keys that a tile of queries sees, at most
    seen = min(keys, left + right + TILE) if left >= 0 and right >= 0 else keys
    return _Form(acc, words, sizes, dtype in KINDS, seen, heads * (head_dim + value_dim), table)


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
        **dict.fromkeys(("z", "weights", "other", "row_slopes", "some_weights", "some_slopes"), stride),
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
    places = [0] * N_WORDS
    at = 0
    for name, size in bytes_of.items():
        places[getattr(Word, name)] = at
        at += _multiple(size, BYTES)
    return _Layout(rows, stride, at, places[Word.panels :])


def _multiple(size: int, of: int) -> int:
    """The least multiple that is not smaller."""
    return -(-size // of) * of


def _in_rows(t: Tensor) -> Tensor:
    """Whose last dimension lies side by side."""
    t = t.resolve_neg()
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _steps(t: Tensor) -> list[int]:
    """Strides, 0 where a dimension has size 1."""
    return [0 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)]


class Sequences(NamedTuple):
    """The table of sequences, row by row, of many as an array; room for the keys of one; the most queries; all pairs."""

    table: list[int] | Table
    keys: int
    length: int
    pairs: int


def _sequences(query: Tensor, key: Tensor, call: AttentionCall) -> Sequences:
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        batch = query.shape[0]
        return sequences_of([key.shape[2]] * batch, [0] * batch, range(batch), query.shape[2])
    starts_q = _starts("cu_seqlens_q", call.cu_seqlens_q, query.shape[2], call.max_seqlen_q)
    starts_k = _starts("cu_seqlens_k", call.cu_seqlens_k, key.shape[2], call.max_seqlen_k)
    count = len(starts_q) - 1
    lengths, keys = np.diff(starts_q), np.diff(starts_k)
    columns = {
        Sequence.length: lengths,
        Sequence.keys: keys,
        Sequence.query_at: starts_q[:-1],
        Sequence.key_at: starts_k[:-1],
        Sequence.tile_at: starts_q[:-1] // TILE + np.arange(count),
        Sequence.number: np.arange(count),
    }
    table = np.zeros(count * N_COLUMNS, np.int64)
    for column, numbers in columns.items():
        table[column::N_COLUMNS] = numbers
    return Sequences(table, int(keys.max(initial=0)), int(lengths.max(initial=0)), int((lengths * keys).sum()))


def sequences_of(keys: Numbers, key_at: Numbers, key_batch: Numbers, length: int) -> Sequences:
    """Sequences of `length` queries each: how many keys each has, where they begin, and in which row of the batch."""
    count = len(keys)
    table: list[int] | Table = [0] * (count * N_COLUMNS) if count < MANY else np.zeros(count * N_COLUMNS, np.int64)
    for column, numbers in (
        (Sequence.length, [length] * len(keys)),
        (Sequence.batch, range(len(keys))),
        *((Sequence.keys, keys), (Sequence.key_at, key_at), (Sequence.key_batch, key_batch)),
    ):
        table[column::N_COLUMNS] = numbers
    room = _multiple(max(keys, default=0), STEP if length <= DIRECT_ROWS else 1)
    return Sequences(table, room, length, length * sum(keys))


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
