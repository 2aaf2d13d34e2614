"""The argument checks of `diffmax.attention_with_kvcache`, which run before any backend is chosen."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffmax.operators.common.autograd import differentiates
from diffmax.operators.common.checks import _dtype, _readable, _shape, as_int, check_strided, check_tensor, is_whole
from diffmax.plugin import TILE, KVCacheCall

if TYPE_CHECKING:
    from diffmax.operators.decoding.api import PageBounds


NO_GRADIENT = (
    "diffmax.attention_with_kvcache: it has no gradient, and an argument requires one\n"
    "call it under torch.no_grad() or torch.inference_mode(), or train with diffmax.attention"
)


def check_cache(name: str, what: str, t: Tensor) -> None:
    """Check one tensor on its own."""
    check_tensor(name, what, t)
    if t.ndim != 4:
        raise ValueError(f"{name}: {what} must have 4 dimensions (batch, tokens, heads, size), got shape {_shape(t)}")


def check_tensors(
    name: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, paged: bool
) -> None:
    """Check that queries, caches and new tokens match in dtype, device and shape."""
    check_cache(name, "v_cache", v_cache)
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k and v are given together or not at all, got {'v' if k is None else 'k'} alone")
    for what, t in (("k", k), ("v", v)):
        if t is not None:
            check_cache(name, what, t)
            given[what] = t
    if [t.dtype for t in given.values()].count(q.dtype) < len(given):
        raise TypeError(
            f"{name}: q, the caches, k and v must have one dtype, got{_facts(given)}\nconvert q, k and v to the caches' dtype"
        )
    if [t.device for t in given.values()].count(q.device) < len(given):
        raise ValueError(f"{name}: q, the caches, k and v must be on one device, got{_facts(given)}")
    for what in () if torch.compiler.is_compiling() else ("k_cache", "v_cache"):
        if given[what].is_neg():  # torch would negate a copy and lose what is written to it
            raise ValueError(
                f"{name}: {what} must not be a negated view, got one\nmake it contiguous first, with resolve_neg()"
            )
    if q.shape[3] != k_cache.shape[3] or q.shape[3] == 0:
        raise ValueError(
            f"{name}: q and k_cache must have the same head size, at least 1, "
            f"got {q.shape[3]} and {k_cache.shape[3]}{_facts(given)}"
        )
    heads, kv_heads = q.shape[2], k_cache.shape[2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{name}: the query heads must be a multiple of the key heads, got {heads} and {kv_heads}{_facts(given)}\n"
            "tokens come before heads in q and in the caches, (batch, tokens, heads, size): transpose(1, 2) if yours come after"
        )
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"{name}: k_cache and v_cache must have the same batch, tokens and heads, got{_facts(given)}")
    if k is not None and v is not None:
        for what, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
            wanted = (q.shape[0], k.shape[1], *cache.shape[2:])
            if new.shape != wanted:
                raise ValueError(f"{name}: {what} must have shape {tuple(wanted)}, got {_shape(new)}{_facts(given)}")
        for what, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            strides = cache.stride()
            if 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, cache.shape, strict=True)):
                raise ValueError(
                    f"{name}: {what} must have its own memory for each token where k and v are appended, got an expanded one, "
                    f"of strides {strides}\nmake it contiguous first"
                )
        if _same_memory(k_cache, v_cache):
            raise ValueError(
                f"{name}: k_cache and v_cache must be two tensors where k and v are appended, got one{_facts(given)}"
            )
        for what, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if _readable(cache) and not cache.is_contiguous() and overlaps_itself(tuple(cache.shape), cache.stride()):
                raise ValueError(
                    f"{name}: {what} must have its own memory for each token where k and v are appended, got one that overlaps "
                    f"itself, of strides {cache.stride()}\nmake it contiguous first"
                )
        if _overlap(k_cache, v_cache):
            raise ValueError(
                f"{name}: k_cache and v_cache must not overlap where k and v are appended, got views of the same memory"
                f"{_facts(given)}"
            )
    if not paged and q.shape[0] > k_cache.shape[0]:
        hint = "\nfor a cache in pages, pass block_table"
        raise ValueError(
            f"{name}: the caches must have a row for each sequence, "
            f"got {k_cache.shape[0]} for {q.shape[0]}{_facts(given)}{hint}"
        )


def _facts(given: dict[str, Tensor]) -> str:
    return "\n  " + "   ".join(f"{what} {_shape(t)} {_dtype(t)} {t.device}" for what, t in given.items())


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if a is b or not (_readable(a) and _readable(b) and a.numel()):
        return a is b
    return a.data_ptr() == b.data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether an entry of `a` is one of `b` too; not found where their strides differ."""
    if not (_readable(a) and _readable(b)) or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    offset = b.storage_offset() - a.storage_offset()
    each = zip(a.stride(), b.stride(), a.shape, b.shape, strict=True)
    alike = all(of_a == of_b or (in_a <= 1 and in_b <= 1) for of_a, of_b, in_a, in_b in each)
    return alike and shifted_overlap(offset, tuple(a.shape), tuple(b.shape), a.stride())


@functools.lru_cache(maxsize=64)
def shifted_overlap(offset: int, a: tuple[int, ...], b: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two views of these shapes and strides have an entry in common, if the second begins `offset` entries later."""
    if 0 in a or 0 in b:
        return False
    steps = [(s, 1 - in_b, in_a - 1) for s, in_a, in_b in zip(strides, a, b, strict=True) if in_a > 1 or in_b > 1]
    return _is_sum(offset, tuple(sorted(steps, reverse=True)))


@functools.lru_cache(maxsize=64)
def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two entries of a view of this shape and strides have one place."""
    if 0 in shape:
        return False
    steps = sorted(((s, 1 - size, size - 1) for s, size in zip(strides, shape, strict=True) if size > 1), reverse=True)
    # two entries whose first difference, by the size of strides, is in dimension i
    return any(_is_sum(0, ((s, 1, most), *steps[i + 1 :])) for i, (s, _, most) in enumerate(steps))


def _is_sum(total: int, steps: tuple[tuple[int, int, int], ...]) -> bool:
    """Whether `total` is a sum of n * stride, with an n from least to most for each (stride, least, most), largest first."""
    if not steps:
        return total == 0
    (stride, least, most), rest = steps[0], steps[1:]
    if stride == 0:
        return _is_sum(total, rest)
    low, high = (sum(s * steps[end] for s, *steps in rest) for end in (0, 1))
    first, last = max(least, -((high - total) // stride)), min(most, (total - low) // stride)
    return any(_is_sum(total - n * stride, rest) for n in range(first, last + 1))


def apart(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall) -> tuple[Tensor, KVCacheCall]:
    """The queries and the call, with a copy of what may be a view of caches or bounds: they are written before it is read."""
    kept = (k_cache, v_cache, call.low, call.high, call.codes)
    written = [t.untyped_storage().data_ptr() for t in kept if t is not None]
    own: dict[str, Any] = {
        name: t.clone()
        for name, t in (("query", query), ("k", call.k), ("v", call.v))
        if t is not None and t.untyped_storage().data_ptr() in written
    }
    if not own:
        return query, call
    query = own.pop("query", query)
    return query, dataclasses.replace(call, **own)


def check_gradients(*arguments: Any) -> None:
    """Refuse arguments that require a gradient."""
    if torch.is_grad_enabled() and differentiates(*(t for t in arguments if isinstance(t, Tensor))):
        raise NotImplementedError(NO_GRADIENT)


def check_lengths(name: str, lengths: int | Tensor | None, batch: int, room: int, new: int | None, beside: Tensor) -> Tensor:
    """cache_seqlens as int32 (B,), before `new` tokens are appended. Values are checked if they can be read.

    They lie where the tensor `beside` does; of a DTensor an int becomes one.
    """
    if lengths is None and new is not None:
        raise ValueError(
            f"{name}: with k and v, cache_seqlens must say how many tokens are in the cache before them, got None\n"
            "for an empty cache pass cache_seqlens=0"
        )
    if lengths is None:
        return beside.new_full((batch,), room, dtype=torch.int32)
    new = new or 0
    # a tensor first: to ask an abstract class takes a microsecond
    if isinstance(lengths, bool) or not isinstance(lengths, (Tensor, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name}: cache_seqlens must be an int or an int32 tensor, got {type(lengths).__name__}")
    if not isinstance(lengths, Tensor):
        if not torch.compiler.is_compiling():
            _check_room(name, int(lengths), int(lengths), room, new)
        return beside.new_full((batch,), lengths, dtype=torch.int32)
    _check_index(name, "cache_seqlens", lengths, (batch,), beside.device)
    if _readable(lengths) and batch:
        tokens = lengths.tolist()
        _check_room(name, min(tokens), max(tokens), room, new)
    return lengths if lengths.dtype is torch.int32 else lengths.to(torch.int32)


def _check_room(name: str, least: int, most: int, room: int, new: int) -> None:
    if least < 0 or most + new > room:
        got = f"{least}" if least < 0 else f"{most}"
        added = f" with {new} new ones" if new else ""
        hint = "" if least < 0 else "\nmake the caches longer, with block_table by more pages, or keep fewer tokens"
        raise ValueError(
            f"{name}: cache_seqlens must be at least 0, and fit{added} into the cache's {room} tokens, got {got}{hint}"
        )


def _check_index(name: str, what: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check_strided(name, what, t)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: {what} must be an int32 tensor, got {_dtype(t)}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: {what} must have shape {shape}, got {_shape(t)}")
    if t.device != device:
        raise ValueError(f"{name}: {what} and the caches must be on one device, got {t.device} and {device}")


def check_leftpad(name: str, leftpad: Tensor | None, lengths: Tensor, device: torch.device) -> Tensor | None:
    """Check cache_leftpad."""
    if leftpad is None:
        return None
    if not isinstance(leftpad, Tensor):
        raise TypeError(f"{name}: cache_leftpad must be an int32 tensor, got {type(leftpad).__name__}")
    _check_index(name, "cache_leftpad", leftpad, tuple(lengths.shape), device)
    if _readable(leftpad) and _readable(lengths) and not bool(((leftpad >= 0) & (leftpad <= lengths)).all()):
        raise ValueError(
            f"{name}: cache_leftpad must lie between 0 and cache_seqlens, got {leftpad.tolist()} for {lengths.tolist()}"
        )
    return leftpad.to(torch.int32)


def check_rows(name: str, rows: Tensor | None, batch: int, k_cache: Tensor, block_table: Tensor | None) -> Tensor | None:
    """Check cache_batch_idx."""
    if rows is None:
        return None
    if block_table is not None:
        raise ValueError(f"{name}: cache_batch_idx and block_table exclude each other, got both\npass the table of those rows")
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name}: cache_batch_idx must be an int32 tensor, got {type(rows).__name__}")
    _check_index(name, "cache_batch_idx", rows, (batch,), k_cache.device)
    if _readable(rows) and batch:
        least, most = int(rows.min()), int(rows.max())
        if least < 0 or most >= k_cache.shape[0]:
            raise ValueError(f"{name}: cache_batch_idx must lie between 0 and {k_cache.shape[0] - 1}, got {least} to {most}")
        if len(set(rows.tolist())) < batch:
            raise ValueError(f"{name}: cache_batch_idx must have no row twice, got {rows.tolist()}")
    return rows.to(torch.int32)


def check_unserved(name: str, rotary_cos: Any, rotary_sin: Any, num_splits: Any) -> None:
    """Refuse flash-attn's rotary embedding, and check the type of num_splits."""
    for what, given in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if given is not None:
            raise ValueError(
                f"{name}: {what} must be None, got {type(given).__name__}\n"
                "rotate q and k before the call; the cache holds rotated keys"
            )
    if not is_whole(num_splits):
        raise TypeError(f"{name}: num_splits must be an int, which has no effect, got {num_splits!r}")


def check_block_table(name: str, table: Tensor | None, k_cache: Tensor, batch: int | None) -> Tensor | None:
    """Check the type and shape of block_table; `check_pages` checks its entries."""
    if table is None:
        return None
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: block_table must be an int32 tensor, got {type(table).__name__}")
    if table.ndim != 2 or (batch is not None and table.shape[0] != batch):
        rows = "B" if batch is None else batch
        raise ValueError(f"{name}: block_table must have shape ({rows}, pages), got {_shape(table)}")
    if k_cache.shape[1] == 0:
        raise ValueError(f"{name}: the pages of a cache must have room for a token, got shape {_shape(k_cache)}")
    _check_index(name, "block_table", table, tuple(table.shape), k_cache.device)
    return table.to(torch.int32)


def check_pages(name: str, table: Tensor | None, lengths: Tensor, new: int, k_cache: Tensor) -> None:
    """Check the entries of block_table in use, including those for new tokens, where their values can be read."""
    if table is None or not (_readable(table) and _readable(lengths)):
        return
    held, size = lengths.view(-1, 1), k_cache.shape[1]
    begin = torch.arange(table.shape[1], device=table.device) * size
    is_used = begin < held + new
    used = table[is_used]
    if not len(used):
        return
    least, most = (int(end) for end in used.aminmax())
    if least < 0 or most >= k_cache.shape[0]:
        raise ValueError(
            f"{name}: block_table must have pages from 0 to {k_cache.shape[0] - 1} up to each sequence's end, "
            f"got {least if least < 0 else most}\ngive a sequence its pages before its tokens"
        )
    if new > 1 or (new and len(lengths) > 1):
        written = table[is_used & (begin + size > held)].tolist()
        if len(set(written)) < len(written):
            twice = next(page for page in written if written.count(page) > 1)
            raise ValueError(
                f"{name}: block_table must have each page that new tokens are written to once, got page {twice} twice\n"
                "give each sequence a page of its own from its last token on"
            )


def check_values(k_cache: Tensor, call: KVCacheCall) -> None:
    """Check lengths, padding, rows and pages of a call that was built where nobody could look, as under torch.compile."""
    name, table, batch = "diffmax.attention_with_kvcache", call.block_table, len(call.cache_seqlens)
    room = k_cache.shape[1] * (1 if table is None else table.shape[1])
    new = None if call.k is None else call.k.shape[1]
    check_lengths(name, call.cache_seqlens, batch, room, new, k_cache)
    check_pages(name, table, call.cache_seqlens, new or 0, k_cache)
    check_rows(name, call.cache_batch_idx, batch, k_cache, table)
    check_leftpad(name, call.leftpad, call.cache_seqlens, k_cache.device)


def check_page_size(name: str, page_size: int) -> int:
    """Check a page size."""
    if not is_whole(page_size):
        raise TypeError(f"{name}: page_size must be an int, got {page_size!r} of type {type(page_size).__name__}")
    if page_size < 1:
        raise ValueError(f"{name}: page_size must be at least 1, got {page_size}")
    return as_int(page_size)


def check_bits(name: str, bits: int | None) -> None:
    """Check the bits of rounded keys."""
    if bits is None:
        return
    if not is_whole(bits):
        raise TypeError(f"{name}: bits must be 4 or None, got {bits!r} of type {type(bits).__name__}")
    if bits != 4:
        raise ValueError(f"{name}: bits must be 4 or None, got {bits}")


def check_bounds(
    name: str, bounds: PageBounds | None, k_cache: Tensor, block_table: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int, Tensor | None]:
    """Check page_bounds; return low, high, the page size and the codes."""
    paged = block_table is not None
    if bounds is None:
        return None, None, k_cache.shape[1] if paged else TILE, None
    if not isinstance(bounds, tuple) or len(bounds) not in (3, 4):
        raise TypeError(f"{name}: page_bounds must be what diffmax.page_bounds returns, got {type(bounds).__name__}")
    low, high, page_size, codes = (*bounds, None)[:4]
    check_page_size(name, page_size)
    rows, tokens, *rest = k_cache.shape
    wanted = (rows, *rest) if paged else (rows, -(-tokens // page_size), *rest)
    if paged and page_size != tokens:
        raise ValueError(f"{name}: page_bounds must have the pages' size, got {page_size} for pages of {tokens}")
    given = {"low": (low, wanted, k_cache.dtype), "high": (high, wanted, k_cache.dtype)}
    if codes is not None:
        given["codes"] = (codes, (*wanted[:-1], -(-wanted[-1] // 2), page_size), torch.uint8)
    for what, (t, shape, dtype) in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: page_bounds.{what} must be a tensor, got {type(t).__name__}")
        if not torch.compiler.is_compiling() and t.is_neg():
            raise ValueError(f"{name}: page_bounds.{what} must hold its own numbers, got a negated view of others")
        if not t.is_contiguous():
            raise ValueError(
                f"{name}: page_bounds.{what} must be contiguous, as diffmax.page_bounds makes it, got {t.stride()}"
            )
        if t.shape != shape or t.dtype != dtype or t.device != k_cache.device:
            raise ValueError(
                f"{name}: page_bounds.{what} must be {tuple(shape)} {str(dtype).removeprefix('torch.')} {k_cache.device}, "
                f"got {_shape(t)} {_dtype(t)} {t.device}\nmake the bounds of this cache with diffmax.page_bounds"
            )
    return low, high, page_size, codes
