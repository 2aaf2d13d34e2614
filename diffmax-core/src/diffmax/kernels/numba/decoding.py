"""Decoding for CPUs, compiled: attention's forward kernel, whose sequences are those of the cache.

Few queries with bounds have a kernel of their own (`bounded`). To many, which all keys together would serve anyway, bounds are
of no use: they are kept up to date. Chunks of queries on long sequences that are fewer than the threads go the way of
`diffmax.kernels.cpu.decoding`, with the compiled row operator.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from diffmax.kernels.cpu import decoding
from diffmax.kernels.numba import bounded_job
from diffmax.kernels.numba.attention_job import DIRECT_ROWS, Job, sequences_of
from diffmax.kernels.numba.attention_words import Word
from diffmax.kernels.numba.rows import bisect
from diffmax.machine.forked import alone_in_child
from diffmax.plugin import AttentionCall, KVCacheCall, KVCacheResults
from diffmax.reference.decoding import bounds_of, codes_of

# Many queries of so many keys of a head are faster with torch's products, where a thread would have no head.
KEYS_TO_SHARE = 1 << 16
# Queries of a key head for which bounds are looked at. More together need most pages, and to multiply them with all keys costs
# little more than to ask which.
BOUNDED_QUERIES = 16
# Statistics that nobody asked for.
_UNASKED = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)


@alone_in_child
def attention_kvcache(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool) -> KVCacheResults:
    """Kernel; arguments and results as `diffmax.reference.decoding.attention_kvcache`."""
    batch, length, heads, _ = query.shape
    kv_heads = k_cache.shape[2]
    ends = decoding.ends(k_cache, call)
    starts = _starts(call, ends, length)
    keys = [end - start for start, end in zip(starts, ends, strict=True)]
    if call.low is not None and _has_bounds(query, k_cache, v_cache):
        pads = [0] * batch if call.leftpad is None else call.leftpad.tolist()
        if length * heads // kv_heads <= BOUNDED_QUERIES or not _is_served(query, k_cache, v_cache, keys):
            return bounded_job.attend(query, k_cache, v_cache, call, pads, ends, stats)
        call = bounded_job.append(query, k_cache, v_cache, call, pads, ends)
    elif call.low is not None or not _is_served(query, k_cache, v_cache, keys):
        return decoding.attention_kvcache(query, k_cache, v_cache, call, stats, bisect)
    if call.k is not None:
        decoding.append(k_cache, v_cache, call)
    # heads that share keys are rows of one head, where no distance is to be told
    folds = length == 1 and call.alibi is None
    rows = query.reshape(batch, kv_heads, heads // kv_heads, -1) if folds else query.transpose(1, 2)
    plain = folds and call.sink is None and not isinstance(call.e, Tensor)
    whole = _plain(call.scale, call.e, call.softcap) if plain else _whole(call, folds)
    of_cache = range(batch) if call.cache_batch_idx is None else call.cache_batch_idx.tolist()
    sequences = sequences_of(keys, starts, of_cache, rows.shape[2])
    job = Job(rows, k_cache, v_cache, whole, sequences)
    if folds:
        job.fold(heads // kv_heads)
    if call.block_table is not None:
        job.add_pages(call.block_table, call.page_size)
    # one query's heads lie as those of queries in order
    out = torch.empty(batch, *((1, heads) if length == 1 else (heads, length)), v_cache.shape[3], dtype=v_cache.dtype)
    m = torch.empty(batch, heads, length, dtype=job.acc)
    delta = torch.empty_like(m)
    support, pages = _UNASKED
    if stats:
        support, pages = torch.empty_like(m, dtype=torch.int32), _pages_read(call, starts, ends, kv_heads)
    for word, t in ((Word.out, out), (Word.m, m), (Word.delta, delta), (Word.support, support)):
        job.add_new(word, t)
    job.scratch_of_forward(False)
    job.run("forward", job.tasks_of_forward())
    return KVCacheResults(out if length == 1 else out.transpose(1, 2).contiguous(), m, delta, support, pages)


@functools.lru_cache(maxsize=64)
def _plain(scale: float, e: float, softcap: float) -> AttentionCall:
    """What is left of a call whose heads are rows: kept, since to make it takes as long as to fetch a hundred keys."""
    return AttentionCall(scale=scale, e=e, softcap=softcap)


def _whole(call: KVCacheCall, folds: bool) -> AttentionCall:
    """The call as attention's; of heads that are rows, what lies before a window is not among the keys."""
    left, right = (-1, -1) if folds else (call.left, call.right)
    return AttentionCall(
        scale=call.scale, e=call.e, softcap=call.softcap, alibi=call.alibi, sink=call.sink,
        left=left, right=right, lower_right=True,
    )  # fmt: skip


def warmup(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    e: float | None,
    backward: bool,
    features: frozenset[str],
) -> None:
    """Have the kernels of a dtype compiled, or read from the cache: they serve every call. There is no backward.

    The one for rounded keys if they are among the features.
    """
    query, v_cache = (torch.zeros(1, 2, 1, size, dtype=dtype) for size in (head_dim, value_dim))
    lengths = torch.full((1,), 2, dtype=torch.int32)
    call = KVCacheCall(scale=1.0, e=0.5 if e is None else e, cache_seqlens=lengths)
    attention_kvcache(query, query, v_cache, call, False)
    if "rounded_keys" in features:
        low, high = bounds_of(query, call)
        rounded = dataclasses.replace(call, low=low, high=high, codes=codes_of(query, call, low, high))
        attention_kvcache(query, query, v_cache, rounded, False)
    decoding.attention_kvcache(query, query, v_cache, call, False, bisect)


def _has_bounds(query: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernel for bounds takes the call."""
    return 0 not in (*query.shape[:3], v_cache.shape[3]) and k_cache.stride(3) == v_cache.stride(3) == 1


def _is_served(query: Tensor, k_cache: Tensor, v_cache: Tensor, keys: list[int]) -> bool:
    """Whether attention's kernel takes the call."""
    batch, length, heads, _ = query.shape
    if 0 in (batch, length, heads, v_cache.shape[3]):
        return False
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:  # the kernel would want a copy of the cache
        return False
    if batch * k_cache.shape[2] >= torch.get_num_threads() or max(keys) < KEYS_TO_SHARE:
        return True
    # few queries are memory's work, which torch's threads do not share
    return length * heads // k_cache.shape[2] <= DIRECT_ROWS


def _starts(call: KVCacheCall, ends: list[int], length: int) -> list[int]:
    """The first token that a query of each sequence sees: what lies before all windows, or is padding, is left out."""
    starts = [max(end - length - call.left, 0) for end in ends] if call.left >= 0 else [0] * len(ends)
    if call.leftpad is None:
        return starts
    return [min(max(start, pad), end) for start, pad, end in zip(starts, call.leftpad.tolist(), ends, strict=True)]


def _pages_read(call: KVCacheCall, starts: list[int], ends: list[int], kv_heads: int) -> Tensor:
    size = call.page_size
    pages = [-(-end // size) - start // size for start, end in zip(starts, ends, strict=True)]
    return torch.tensor(pages, dtype=torch.int32).unsqueeze(1).expand(-1, kv_heads).contiguous()
