"""What a call of decoding with bounds is to the compiled kernel: a job's words, and the memory of its threads."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from diffmax.kernels.cpu import decoding
from diffmax.kernels.numba.attention_job import COMPUTING, KINDS, THREAD_PRODUCTS, Table, _in_rows, _kernel, _multiple
from diffmax.kernels.numba.bounded import N_WORDS, SOME, TOGETHER, Word, make_bounded
from diffmax.kernels.numba.rows import plan
from diffmax.kernels.numba.simd import BYTES
from diffmax.kernels.numba.threads import leave, run_job, take
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.plugin import KVCacheCall, KVCacheResults


def attend(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, starts: list[int], ends: list[int], stats: bool
) -> KVCacheResults:
    """As `diffmax.reference.decoding.attention_kvcache`, for caches whose last dimension lies side by side.

    Each sequence is seen from its start to its end; its new tokens, which are appended, are the last ones.
    """
    if call.low is None or call.high is None:
        raise ValueError("attention_kvcache: low and high need each other, got one without the other")
    batch, length, heads, head_dim = query.shape
    kv_heads, value_dim = k_cache.shape[2], v_cache.shape[3]
    acc = accumulation_dtype(query.dtype)
    lanes = BYTES // acc.itemsize
    numbers = np.zeros(N_WORDS)
    words = numbers.view(np.int64)
    query = _in_rows(query)
    blocks = None if call.block_table is None else call.block_table.contiguous()
    places = range(batch) if call.cache_batch_idx is None else call.cache_batch_idx.tolist()
    held = [max(0, tokens) for tokens in call.cache_seqlens.tolist()]
    of_sequences = np.array([starts, held, ends, list(places)], np.int64)
    pages = max(1, -(-max(ends) // call.page_size))
    out = torch.empty(batch, length, heads, value_dim, dtype=query.dtype)
    m, delta = (torch.empty(batch, heads, length, dtype=acc) for _ in range(2))
    support, read = (torch.empty(shape if stats else (0,), dtype=torch.int32) for shape in (m.shape, (batch, kv_heads)))
    words[Word.kv_heads], words[Word.group], words[Word.length] = kv_heads, heads // kv_heads, length
    words[Word.head_dim], words[Word.value_dim] = head_dim, value_dim
    words[Word.head_step], words[Word.value_step] = _multiple(head_dim, lanes), _multiple(value_dim, lanes)
    words[Word.kind], words[Word.page_size], words[Word.pages] = KINDS.get(query.dtype, 0), call.page_size, pages
    words[Word.row_pages] = 0 if blocks is not None else call.low.shape[1]
    tensors = {Word.query: query, Word.key: k_cache, Word.value: v_cache}
    if call.k is not None and call.v is not None:
        tensors |= {Word.new_key: _in_rows(call.k), Word.new_value: _in_rows(call.v)}
    for word, t in tensors.items():
        words[word], (words[word + 1], words[word + 2], words[word + 3], _) = t.data_ptr(), t.stride()
    for word, kept in ((Word.low, call.low), (Word.high, call.high), (Word.codes, call.codes)):
        words[word] = 0 if kept is None else kept.data_ptr()
    words[Word.starts], words[Word.held], words[Word.ends], words[Word.rows] = (row.ctypes.data for row in of_sequences)
    if blocks is not None:
        words[Word.blocks], words[Word.blocks_step] = blocks.data_ptr(), blocks.shape[1]
    words[Word.before], words[Word.after] = call.left, call.right
    numbers[Word.scale] = call.scale
    if COMPUTING[acc](call.softcap) > 0:
        numbers[Word.softcap] = call.softcap
    alive = []
    for word, of_heads in ((Word.e, call.e), (Word.alibi, call.alibi), (Word.sink, call.sink)):
        if isinstance(of_heads, Tensor):
            alive.append(of_heads.contiguous())
            words[word] = alive[-1].data_ptr()
    words[Word.alibi_batch] = heads if call.alibi is not None and len(call.alibi) > 1 else 0
    if isinstance(call.e, Tensor):
        words[Word.steps], _, _kept = plan(200, max(1, *ends), 1.0, query.dtype)
    else:
        numbers[Word.e_value] = call.e
        words[Word.steps], words[Word.integer], _kept = plan(200, max(1, *ends), call.e, query.dtype)
    for word, t in ((Word.out, out), (Word.m, m), (Word.delta, delta), (Word.support, support), (Word.pages_read, read)):
        words[word] = t.data_ptr() if t.numel() else 0
    sizes = pages, call.page_size, int(words[Word.head_step]), int(words[Word.value_step])
    words[Word.stride], slot_bytes, words[Word.scores :] = _layout(acc.itemsize, *sizes)
    _run(words, acc, batch * kv_heads, slot_bytes, sum(ends) * length * heads * head_dim)
    return KVCacheResults(out, m, delta, support, read)


def append(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, starts: list[int], ends: list[int]
) -> KVCacheCall:
    """Append what is new, bounds included; returns the call that is left, for a kernel that reads all keys."""
    attend(query[:, :0], k_cache, v_cache, call, starts, ends, False)
    held = torch.tensor(ends, dtype=torch.int32)
    return dataclasses.replace(call, cache_seqlens=held, k=None, v=None, low=None, high=None, codes=None)


def _run(words: Table, acc: torch.dtype, tasks: int, slot_bytes: int, products: int) -> None:
    """Run the kernel, with a task for each key head of a sequence; first to see whether the bounds are those of the cache."""
    kernel, address = _kernel(make_bounded, acc)
    threads = min(tasks, torch.get_num_threads() if products >= 2 * THREAD_PRODUCTS else 1)
    memory = take(threads * slot_bytes + BYTES)
    words[Word.slot_bytes], words[Word.memory] = slot_bytes, _multiple(memory.data_ptr(), BYTES)
    words[Word.stop], words[Word.chunk], words[Word.checks] = tasks, tasks, 1
    kernel(words.ctypes.data)
    if words[Word.old]:
        decoding.refuse_old_bounds(int(words[Word.old]) - 1)
    words[Word.slots], words[Word.checks] = 0, 0
    words[Word.chunk] = tasks if threads == 1 else 1
    run_job("bounded", kernel, address, words, threads, tasks)
    leave(memory)


@functools.lru_cache(maxsize=256)
def _layout(itemsize: int, pages: int, page_size: int, head_step: int, value_step: int) -> tuple[int, int, Table]:
    """The stride of rows of scores; the bytes of a thread; and where each part of its memory begins, in bytes."""
    lanes = BYTES // itemsize
    stride = _multiple(pages * page_size + 1, lanes) + 2 * lanes  # a sink, and a vector behind what is stored in vectors
    floats = {
        "scores": TOGETHER * stride,
        "errors": TOGETHER * pages,
        **dict.fromkeys(("z", "weights", "other", "exact"), stride),
        "queries": TOGETHER * head_step,
        "factors": TOGETHER * (head_step + 2),
        **dict.fromkeys(("lows", "highs"), head_step),
        "some_rows": SOME * max(head_step, value_step),
        "some_weights": SOME,
        "sums": TOGETHER * value_step,
    }
    bytes_of = {name: count * itemsize for name, count in floats.items()}
    bytes_of |= {"index": 4 * stride, "found": 4 * stride, "some": 4 * SOME, "read": pages}
    bytes_of |= dict.fromkeys(("left", "right"), 8 * TOGETHER)
    starts = np.zeros(N_WORDS, np.int64)
    at = 0
    for name, size in bytes_of.items():
        starts[getattr(Word, name)] = at
        at += _multiple(size, BYTES)
    return stride, at, starts[Word.scores :]
