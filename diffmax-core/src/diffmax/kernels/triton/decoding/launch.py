"""Decoding's launcher: memory, splits, six launches. A vendor's distribution makes one `Decoder`.

Nothing here waits for the device or reads a length, so that a call can be captured into a CUDA graph. The grid is that of a
full cache; where a sequence is shorter its tiles are shared among the same programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffmax.kernels.triton.common.launch import (
    COMPILER_OPTIONS,
    SOLVED,
    Launch,
    Plans,
    on_device,
    padded,
    power_of_two,
    signature,
)
from diffmax.kernels.triton.common.tuning import Decode, Table, Tunable, no_table
from diffmax.kernels.triton.decoding.call import Arguments, tensors_of
from diffmax.kernels.triton.decoding.finish import kvcache_finish_kernel
from diffmax.kernels.triton.decoding.list import kvcache_list_kernel
from diffmax.kernels.triton.decoding.read import kvcache_read_kernel
from diffmax.kernels.triton.decoding.solve import kvcache_solve_kernel
from diffmax.kernels.triton.decoding.start import kvcache_start_kernel
from diffmax.kernels.triton.decoding.tiles import LISTED, SLOTS
from diffmax.kernels.triton.decoding.values import kvcache_values_kernel
from diffmax.operators.common.numerics import newton_steps
from diffmax.plugin import TILE, KVCacheCall, KVCacheResults
from diffmax.reference.decoding import append, capacity

# Bytes of a key that four warps cannot hold with a tile's products
WIDE_ROW = 1024
MOST_SPLITS = 128
# Numbers of the splits' parts that a program of the last launch holds, of values and again of slopes
MOST_SUMMED = 4096
SOLVE_WARPS = FINISH_WARPS = 4


@dataclass(frozen=True)
class Grid:
    """How a call is divided among programs.

    Attributes:
        block_m, block_n: Rows of a program, a power of two, and tokens of a tile.
        rows: How many of a program's rows there can be.
        blocks: Of rows, for each sequence and key head.
        parts: Tiles of a page.
        most_tiles: Of a sequence that fills the cache.
        programs, splits: The grid: blocks of all sequences and key heads, by shares of a sequence's tiles.
    """

    block_m: int
    block_n: int
    rows: int
    blocks: int
    parts: int
    most_tiles: int
    programs: int
    splits: int

    @classmethod
    def of(cls, query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, settings: Decode, processors: int) -> Grid:
        """As many splits as fill the device, if each has tiles enough."""
        rows, pages = query.shape[2] // k_cache.shape[2] * query.shape[1], -(-capacity(k_cache, call) // call.page_size)
        widest = padded(max(query.shape[3], v_cache.shape[3]))
        block_m = min(padded(rows), 32 if widest <= 64 else 16)
        block_n = min(padded(call.page_size), max(16, settings.tile_bytes // (widest * query.element_size())), 64)
        blocks, parts = -(-rows // block_m), -(-call.page_size // block_n)
        programs = query.shape[0] * k_cache.shape[2] * blocks
        splits = min(MOST_SPLITS, -(-pages * parts // settings.tiles_per_split))
        splits = min(splits, max(1, -(-settings.programs * processors // programs)))
        return cls(block_m, block_n, min(rows, block_m), blocks, parts, pages * parts, programs, splits)


class _Plan(NamedTuple):
    """The launches of a call, and the memory that it takes.

    Attributes:
        launches: One after the other.
        grid: How the call is divided among programs.
        scratch: Entries of each scratch buffer: tops, scores, work, lists, state, partial, filled, pages.
    """

    launches: tuple[Launch, ...]
    grid: Grid
    scratch: tuple[int, ...]

    @classmethod
    def of(
        cls,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        call: KVCacheCall,
        stats: bool,
        settings: Decode,
        *,
        processors: int,
        ptx: bool,
    ) -> _Plan:
        """Depends on the signature of the call only."""
        arguments = Arguments.of(query, k_cache, v_cache, call, ptx=ptx)
        grid, room = Grid.of(query, k_cache, v_cache, call, settings, processors), capacity(k_cache, call)
        lanes, block_v = power_of_two(grid.splits), padded(v_cache.shape[3])
        common = {
            **arguments.shared, **COMPILER_OPTIONS, "room": room, "blocks": grid.blocks, "splits": grid.splits,
            "BLOCK_M": grid.block_m, "SPLITS": lanes,
        }  # fmt: skip
        tiles = {
            **common, **arguments.pages, "parts": grid.parts, "most_tiles": grid.most_tiles, "BLOCK_N": grid.block_n,
        }  # fmt: skip
        of_values = {**arguments.table, **arguments.values, "VALUE_DIM": v_cache.shape[3], "BLOCK_V": block_v}
        sink, has_bounds = {"HAS_SINK": call.sink is not None}, call.low is not None
        largest_e = 1.0 if isinstance(call.e, Tensor) else common["e"]
        solving = {"CUT": SOLVED[torch.float32], "steps": 8 + newton_steps(200, room + 1, largest_e, torch.float32)}
        reading = {
            **tiles,
            **arguments.table,
            **arguments.queries,
            **arguments.keys,
            **arguments.scores,
            "HAS_BOUNDS": has_bounds,
        }
        start = {
            **reading,
            **of_values,
            **arguments.fresh,
            "pages": -(-room // call.page_size),
            "num_warps": settings.start_warps,
        }
        wide = padded(query.shape[3]) * query.element_size() >= WIDE_ROW
        read = {**reading, **sink, "num_warps": max(settings.read_warps, 8) if wide else settings.read_warps}
        solve = {**common, **sink, **solving, "num_warps": SOLVE_WARPS}
        window = {"WINDOW": arguments.scores["OPTIONS"].WINDOW}
        listing = {**tiles, **window, **sink, "num_warps": settings.values_warps}
        values = {**tiles, **of_values, **window, "num_warps": settings.values_warps}
        rows, columns = _piece(grid, lanes, block_v)
        finish = {
            **tiles, **of_values, **window, **sink, **solving, "STATS": stats, "ROWS": rows, "SLICE": columns,
            "num_warps": FINISH_WARPS,
        }  # fmt: skip
        programs, every = (grid.programs, grid.splits), grid.programs * grid.block_m
        launches = (
            Launch(kvcache_start_kernel, programs, start),
            Launch(kvcache_read_kernel, programs, read),
            Launch(kvcache_list_kernel, programs, listing),
            Launch(kvcache_solve_kernel, (grid.programs, grid.rows), solve),
            Launch(kvcache_values_kernel, programs, values),
            Launch(kvcache_finish_kernel, (grid.programs, -(-grid.rows // rows) * (block_v // columns)), finish),
        )
        whole = -(-grid.programs * grid.splits // 4) * 4  # so that every buffer is aligned to 16 bytes
        scratch = (
            every * grid.most_tiles, every * grid.most_tiles * grid.block_n,
            every * int(SLOTS) * lanes, every * int(LISTED) * lanes, every * 2, every * grid.splits * 2 * block_v,
            whole, grid.programs * grid.splits,
        )  # fmt: skip
        return cls(launches, grid, scratch)


def _piece(grid: Grid, lanes: int, block_v: int) -> tuple[int, int]:
    """Rows and columns of the output that a program adds up, from all splits at once."""
    rows, columns = grid.block_m, block_v
    while rows * columns * lanes > MOST_SUMMED and rows > 1:
        rows //= 2
    while rows * columns * lanes > MOST_SUMMED and columns > 16:
        columns //= 2
    return rows, columns


class Decoder(Tunable):
    """`attention_kvcache` for one vendor, with the signature of `diffmax.reference.decoding`, for dtypes up to float32.

    Args:
        processors: How many multiprocessors (compute units) a device has.
        ptx: Whether the compiler takes NVIDIA's assembly.
        table: The tuning table of a device's own architecture, if there is one.
    Attributes:
        plans: The launch plans of earlier calls.
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
        self.plans = Plans()

    def attention_kvcache(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool
    ) -> KVCacheResults:
        """Kernel; arguments and results as `diffmax.reference.decoding.attention_kvcache`."""
        device, (batch, length, heads, _) = query.device, query.shape
        kv_heads, value_size, room = k_cache.shape[2], v_cache.shape[3], capacity(k_cache, call)
        out = torch.empty((batch, length, heads, value_size), dtype=query.dtype, device=device)
        m, delta = (torch.empty((batch, heads, length), dtype=torch.float32, device=device) for _ in range(2))
        support = torch.empty(m.shape if stats else (0,), dtype=torch.int32, device=device)
        if m.numel() == 0 or room == 0 or value_size == 0:
            append(k_cache, v_cache, call)
            pages = torch.zeros((batch, kv_heads) if stats else (0,), dtype=torch.int32, device=device)
            return KVCacheResults(out.zero_(), m.fill_(-torch.inf), delta.zero_(), support.zero_(), pages)

        plan = self._plan(query, k_cache, v_cache, call, stats)
        scratch = torch.empty(sum(plan.scratch), dtype=torch.float32, device=device).split_with_sizes(plan.scratch)
        tops, scores, work, lists, state, partial, filled, read = scratch
        tensors = {
            **tensors_of(query, k_cache, v_cache, call), "out_ptr": out, "m_ptr": m, "delta_ptr": delta,
            "support_ptr": support if stats else filled,
            "tops_ptr": tops, "scores_ptr": scores, "work_ptr": work, "lists_ptr": lists,
            "state_ptr": state, "partial_ptr": partial, "filled_ptr": filled, "pages_ptr": read,
        }  # fmt: skip
        with on_device(device):
            for launch in plan.launches:
                launch(tensors)
        pages = torch.empty(0, dtype=torch.int32, device=device)
        if stats:
            pages = read.view(batch, kv_heads, plan.grid.blocks, plan.grid.splits).sum(3).amax(2).to(torch.int32)
        return KVCacheResults(out, m, delta, support, pages)

    def _plan(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool) -> _Plan:
        device, size = query.device, max(query.shape[3], v_cache.shape[3])
        return self.plans.get(
            signature(query, k_cache, v_cache, *vars(call).values(), stats, device, *self.forced.items()),
            lambda: _Plan.of(
                query, k_cache, v_cache, call, stats,
                self.tuned(self.table(device), "decode", query.dtype, size) or Decode(),
                processors=self.processors(device), ptx=self.ptx,
            ),
        )  # fmt: skip

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
