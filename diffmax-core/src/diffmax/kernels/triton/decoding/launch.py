"""Decoding's launcher: memory, splits, three launches. A vendor's distribution makes one `Decoder`.

Nothing here waits for the device or reads a length, so that a call can be captured into a CUDA graph. The grid is that of a
full cache; where a sequence is shorter its tiles are shared among the same programs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS, SOLVED, Exponent, on_device, padded, power_of_two
from diffmax.kernels.triton.common.tuning import Decode, Table, Tunable, no_table
from diffmax.kernels.triton.decoding.read import kvcache_read_kernel
from diffmax.kernels.triton.decoding.start import kvcache_start_kernel
from diffmax.kernels.triton.decoding.tiles import LISTED, SLOTS
from diffmax.kernels.triton.decoding.values import kvcache_values_kernel
from diffmax.operators.common.numerics import newton_steps
from diffmax.plugin import TILE, KVCacheCall, KVCacheResults
from diffmax.reference.decoding import append, capacity

MOST_SPLITS = 128


class Decoder(Tunable):
    """`attention_kvcache` for one vendor, with the signature of `diffmax.reference.decoding`, for dtypes up to float32.

    Args:
        processors: How many multiprocessors (compute units) a device has.
        ptx: Whether the compiler takes NVIDIA's assembly.
        table: The tuning table of a device's own architecture, if there is one.
    """

    def __init__(
        self,
        processors: Callable[[torch.device], int],
        *,
        ptx: bool,
        table: Callable[[torch.device], Table | None] = no_table,
    ) -> None:
        self.processors = processors
        self.ptx = ptx
        self.table = table

    def attention_kvcache(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool
    ) -> KVCacheResults:
        """Kernel; arguments and results as `diffmax.reference.decoding.attention_kvcache`."""
        device, (batch, length, heads, size) = query.device, query.shape
        kv_heads, value_size, room = k_cache.shape[2], v_cache.shape[3], capacity(k_cache, call)
        out = torch.empty((batch, length, heads, value_size), dtype=query.dtype, device=device)
        m, delta = (torch.empty((batch, heads, length), dtype=torch.float32, device=device) for _ in range(2))
        support = torch.empty(m.shape if stats else (0,), dtype=torch.int32, device=device)
        if m.numel() == 0 or room == 0 or value_size == 0:
            append(k_cache, v_cache, call)
            pages = torch.zeros((batch, kv_heads) if stats else (0,), dtype=torch.int32, device=device)
            return KVCacheResults(out.zero_(), m.fill_(-torch.inf), delta.zero_(), support.zero_(), pages)

        group = heads // kv_heads
        block_d, block_v = padded(size), padded(value_size)
        launch = self.tuned(self.table(device), "decode", query.dtype, max(size, value_size)) or Decode()
        block_m = min(padded(group * length), 32 if max(block_d, block_v) <= 64 else 16)
        block_n = min(padded(call.page_size), max(16, launch.tile_bytes // (max(block_d, block_v) * query.element_size())), 64)
        blocks, parts = -(-group * length // block_m), -(-call.page_size // block_n)
        most_tiles = -(-room // call.page_size) * parts
        programs = batch * kv_heads * blocks
        splits = min(MOST_SPLITS, -(-most_tiles // launch.tiles_per_split))
        splits = min(splits, max(1, -(-launch.programs * self.processors(device) // programs)))
        lanes = power_of_two(splits)

        def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        tops, scores = scratch(programs, most_tiles, block_m), scratch(programs, most_tiles, block_m, block_n)
        work, lists = scratch(programs, int(SLOTS), block_m, lanes), scratch(programs, int(LISTED), block_m, lanes)
        state, partial = scratch(programs, 2, block_m), scratch(programs, splits, 2, block_m, block_v)
        counters, filled, read = (scratch(programs, n, dtype=torch.int32) for n in (2, splits, splits))

        exponent, none = Exponent.of(call.e, torch.float32), counters
        k, v = (k_cache, v_cache) if call.k is None or call.v is None else (call.k, call.v)
        new = 0 if call.k is None else call.k.shape[1]
        low, high = (call.low, call.high) if call.low is not None and call.high is not None else (k_cache, k_cache)
        table = none if call.block_table is None else call.block_table.contiguous()
        places, kind = _places(call, none)
        alibi = work if call.alibi is None else call.alibi.contiguous()
        e, sink = (t.contiguous() if isinstance(t, Tensor) else work for t in (call.e, call.sink))
        lengths = call.cache_seqlens.contiguous()
        q_b, q_l, q_h, q_d = query.stride()
        queries = {"q_b": q_b, "q_l": q_l, "q_h": q_h, "q_d": q_d}
        keys = _strides("k", k_cache) | _strides("kn", k)
        values = _strides("v", v_cache) | _strides("vn", v)
        sizes = {
            "table_b": 0 if call.block_table is None else table.stride(0), "new": new, "room": room,
            "page_size": call.page_size, "parts": parts, "kv_heads": kv_heads, "group": group, "length": length,
            "blocks": blocks, "splits": splits, "most_tiles": most_tiles, "left": call.left, "e": exponent.e, "k": exponent.k,
        }  # fmt: skip
        scoring = {
            "alibi_b": alibi.stride(0) if call.alibi is not None and alibi.shape[0] > 1 else 0,
            "right": call.right, "scale": call.scale, "softcap": call.softcap,
        }  # fmt: skip
        shared = {
            "PAGED": call.block_table is not None, "HAS_NEW": new > 0, "PLACES": kind,
            "WINDOW": call.left >= 0 or call.right > 0 or (call.right == 0 and length > 1),
            "E_TENSOR": exponent.tensor, "K": exponent.integer, "PTX": self.ptx,
            "BLOCK_M": block_m, "BLOCK_N": block_n, "SPLITS": lanes, **COMPILER_OPTIONS,
        }  # fmt: skip
        of_scores = {
            "HEAD_DIM": size, "BLOCK_D": block_d, "HAS_BOUNDS": call.low is not None, "SOFTCAP": call.softcap != 0,
            "ALIBI": call.alibi is not None,
        }  # fmt: skip
        of_values = {"VALUE_DIM": value_size, "BLOCK_V": block_v}
        solving = {"CUT": SOLVED[torch.float32], "HAS_SINK": call.sink is not None}
        steps = 8 + newton_steps(200, room + 1, 1.0 if exponent.tensor else exponent.e, torch.float32)
        grid = (programs, splits)
        with on_device(device):
            kvcache_start_kernel[grid](
                query, k_cache, v_cache, k, v, low, high, lengths, places, table, e, alibi, tops, work, counters,
                **queries, **keys, **values, **sizes, **scoring, pages=-(-room // call.page_size),
                **shared, **of_scores, **of_values, num_warps=launch.start_warps,
            )  # fmt: skip
            kvcache_read_kernel[grid](
                query, k_cache, k, lengths, places, table, e, alibi, sink,
                tops, scores, work, lists, state, read, counters,
                **queries, **keys, **sizes, **scoring, steps=steps, **shared, **of_scores, **solving,
                num_warps=launch.read_warps,
            )  # fmt: skip
            kvcache_values_kernel[grid](
                v_cache, v, lengths, places, table, e, sink, tops, scores, work, state, partial, filled, counters,
                out, m, delta, support if stats else filled,
                **values, **sizes, steps=steps, STATS=stats, **shared, **of_values, **solving,
                num_warps=launch.values_warps,
            )  # fmt: skip
        pages = read[:0].view(-1)
        if stats:
            pages = read.view(batch, kv_heads, blocks, splits).sum(3).amax(2).to(torch.int32)
        return KVCacheResults(out, m, delta, support, pages)

    def warmup(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        value_dim: int,
        e: float | None,
        backward: bool,
        features: frozenset[str],
        *,
        heads: int = 8,
        kv_heads: int = 0,
        batch: int = 1,
        room: int = 4096,
        length: int = 1,
        page_size: int = TILE,
        bounds: bool = False,
    ) -> None:
        """Compile what calls need that append as many tokens as they have queries, by calling on an empty cache.

        Kernels are compiled for up to 1, 2, 4, ..., 128 splits, which room, batch and heads decide.

        Args:
            device, dtype, head_dim, value_dim, e: As for `AttentionOperator.warmup`.
            backward: Decoding has none.
            features: Of `diffmax.plugin.FEATURES`, what the calls have.
            heads, kv_heads: Of the queries and of the cache; 0 stands for one where features have "gqa", else for `heads`.
            batch, room, length: Sequences, tokens that each can have, and queries of each.
            page_size: Of a cache in pages, and of bounds.
            bounds: Whether page bounds are passed.
        """
        kv_heads = kv_heads or (1 if "gqa" in features else heads)
        paged = "paged" in features
        pages = -(-room // page_size)

        def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        def cache(size: int) -> Tensor:
            shape = (*((pages, page_size) if paged else (batch, room)), kv_heads, size)
            # where no stride's alignment differs, all tokens share their memory: a call touches the first ones only
            return zeros(*shape) if kv_heads * size % 16 else zeros(1, 1, kv_heads, size).expand(shape)

        low = zeros(*((pages,) if paged else (batch, pages)), kv_heads, head_dim)
        call = KVCacheCall(
            scale=1.0,
            e=torch.full((heads,), 0.5, device=device) if e is None or "tensor_alpha" in features else e,
            cache_seqlens=zeros(batch, kind=torch.int32),
            k=zeros(batch, length, kv_heads, head_dim),
            v=zeros(batch, length, kv_heads, value_dim),
            block_table=zeros(batch, pages, kind=torch.int32) if paged else None,
            low=low if bounds else None,
            high=low if bounds else None,
            page_size=page_size,
            left=page_size if "window" in features else -1,
            right=0 if "causal" in features else -1,
            softcap=1.0 if "softcap" in features else 0.0,
            alibi=zeros(1, heads, kind=torch.float32) if "alibi" in features else None,
            sink=zeros(heads, kind=torch.float32) if "sink" in features else None,
        )
        for stats in (False, True) if "attention_stats" in features else (False,):
            self.attention_kvcache(zeros(batch, length, heads, head_dim), cache(head_dim), cache(value_dim), call, stats)


def _places(call: KVCacheCall, none: Tensor) -> tuple[Tensor, int]:
    """Rows of the cache and starts of the sequences, and how they lie there: PLACES of `tiles.whose`."""
    rows, starts = call.cache_batch_idx, call.leftpad
    if starts is None:
        return (none, 0) if rows is None else (rows.contiguous(), 1)
    rows = torch.arange(starts.shape[0], dtype=torch.int32, device=starts.device) if rows is None else rows
    return torch.stack([rows, starts], 1), 2


def _strides(letter: str, t: Tensor) -> dict[str, int]:
    return {f"{letter}_{axis}": step for axis, step in zip("bshd", t.stride(), strict=True)}
