"""The launches of attention's forward kernels: results, scratch buffers, grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.kernels.tools import live_shape
from diffmax.kernels.triton.attention.call import Arguments, aligned, rows_of_entries, strides, tensors_of
from diffmax.kernels.triton.attention.evaluation import CHEAP, DIGITS, EITHER
from diffmax.kernels.triton.attention.output import attention_out_kernel
from diffmax.kernels.triton.attention.settings import Forward, Settings, compiled_with
from diffmax.kernels.triton.attention.solve import attention_solve_kernel
from diffmax.kernels.triton.common.launch import SOLVED, Launch, on_device, padded
from diffmax.kernels.triton.common.scores import ABSENT
from diffmax.operators.common.numerics import newton_steps
from diffmax.plugin import TILE, AttentionCall, AttentionResults

# Tolerance of the threshold when the output is computed, in units of the slope: see `steps.good_enough`
CUT = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2e-3}

# Tolerance of the sum of the weights, if the output is divided by it
SUM = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 4e-3}


class ForwardPlan(NamedTuple):
    """The launches of a call, and the sizes of the memory that it takes.

    Attributes:
        solve, output: The two launches.
        tops, lists: Entries of scratch memory: the tops of tiles, and a list for each launch.
        live: Shape of the live tiles.
    """

    solve: Launch
    output: Launch
    tops: int
    lists: tuple[int, int]
    live: tuple[int, ...]

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: AttentionCall,
        keep: bool,
        stats: bool,
        settings: Forward,
        *,
        processors: int,
        ptx: bool,
        precision: str,
        partial: int,
    ) -> ForwardPlan:
        """Depends on the signature of the call only.

        Args:
            query, key, value: As returned by `rows_of_entries`.
            call, keep, stats: As for `attention_forward`.
            settings: Settings of the two kernels.
            processors: Number of multiprocessors (compute units) of the device.
            ptx: Whether the compiler accepts NVIDIA's assembly.
            precision: Precision of products.
            partial: Partial sums of a row.
        """
        arguments = Arguments.of(query, key, call, ptx=ptx, precision=precision)
        n_blocks, most_tiles = (
            arguments.blocks(query.shape[2], TILE),
            _most_tiles(key.shape[2], call, TILE, settings.solve.keys),
        )
        heads = query.shape[0] * query.shape[1]
        live = live_shape(query, key, call)
        shared = {
            **arguments.scalars, **arguments.flags,
            "n_sequences": arguments.n_sequences, "n_words": live[3],
            "ALIGNED": all(aligned(t) for t in (query, key, value)), "SINK": call.sink is not None,
            "PARTIAL": partial, "CUT": CUT[query.dtype], "SUM": SUM[query.dtype], **_arithmetic(arguments, query.dtype),
        }  # fmt: skip
        keys = call.max_seqlen_k if arguments.packed else key.shape[2]
        largest_e = 1.0 if isinstance(call.e, Tensor) else shared["e"]
        block_d, block_v = padded(query.shape[3]), padded(value.shape[3])

        def programs(of: Settings, items: int) -> int:
            return min(items, processors * of.programs)

        solve, output = settings.solve, settings.output_of(keep)
        if arguments.packed:
            output = output.with_few_rows()  # blocks of sequences are numbered as rows of `live`
        n_wide = arguments.blocks(query.shape[2], output.rows)
        items, wide_items = heads * n_blocks, heads * n_wide
        wide_tiles = _most_tiles(key.shape[2], call, output.rows, TILE)
        if solve.keys not in (TILE, 2 * TILE):
            raise ValueError(
                f"the first kernel of attention takes {TILE} or {2 * TILE} keys a turn, and its settings have {solve.keys}: "
                "mend attention_solve in the vendor's table"
            )
        solving = {
            **shared, "n_blocks": n_blocks, "items": items, "most_tiles": most_tiles,
            "newton_steps": newton_steps(200, keys + 1, largest_e, torch.float32), "LINEAR": keep,
            "CHUNK": min(solve.chunk, block_d), "AT_ONCE": solve.keys // TILE,
            **compiled_with(solve),
        }  # fmt: skip
        writing = {
            **strides("v", value), **shared, **arguments.dropout, "n_blocks": n_wide, "items": wide_items,
            "most_tiles": wide_tiles, "ROWS": output.rows,
            "VALUE_DIM": value.shape[3], "BLOCK_V": min(output.values, block_v),
            "KEEP": keep, "SUPPORT": stats, "SOLVED": SOLVED[query.dtype],
            "KEYS": output.keys, "PARTS": TILE // output.keys, "CHUNK": min(output.chunk, block_d),
            **compiled_with(output),
        }  # fmt: skip
        return cls(
            Launch(attention_solve_kernel, (programs(solve, items),), solving),
            Launch(attention_out_kernel, (programs(output, wide_items),), writing),
            programs(solve, items) * most_tiles * TILE,
            (programs(solve, items) * most_tiles, programs(output, wide_items) * wide_tiles),
            live,
        )


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    keep: bool,
    stats: bool,
    plan: Callable[[Tensor, Tensor, Tensor], ForwardPlan],
) -> AttentionResults:
    """Forward kernels; arguments and results as `diffmax.reference.attention.attention`.

    Args:
        query, key, value, call, keep, stats: The call.
        plan: A function that returns the launch plan for tensors returned by `rows_of_entries`.
    """
    rows, device = query.shape[:3], query.device
    out = value.new_empty((*rows, value.shape[3]))
    m = torch.empty(rows, dtype=torch.float32, device=device)
    delta = torch.empty_like(m)
    u = torch.empty_like(out) if keep else out.new_empty(0)
    support = torch.empty(rows if stats else (0,), dtype=torch.int32, device=device)
    if m.numel() == 0:
        live = torch.empty(live_shape(query, key, call) if keep or stats else (0,), dtype=torch.int32, device=device)
        return AttentionResults(out, m, delta, u, live, support)

    query, key, value = rows_of_entries(query), rows_of_entries(key), rows_of_entries(value)
    planned = plan(query, key, value)
    live = torch.empty(planned.live, dtype=torch.int32, device=device)
    start, slope = torch.empty_like(m), torch.empty_like(m)
    tops = torch.empty(planned.tops, dtype=torch.float32, device=device)
    lists = [torch.empty(size, dtype=torch.int32, device=device) for size in planned.lists]
    tensors = {
        "q_ptr": query, "k_ptr": key, "v_ptr": value, "m_ptr": m, "live_ptr": live, "tops_ptr": tops,
        "start_ptr": start, "slope_ptr": slope, "out_ptr": out, "u_ptr": u if keep else out,
        "support_ptr": support if stats else live, **tensors_of(call, query),
    }  # fmt: skip
    with on_device(device):
        planned.solve({**tensors, "delta_ptr": start, "list_ptr": lists[0]})
        planned.output({**tensors, "delta_ptr": delta, "list_ptr": lists[1]})
    return AttentionResults(out, m, delta, u, live if keep or stats else live.new_empty(0), support)


def _arithmetic(arguments: Arguments, dtype: torch.dtype) -> dict[str, Any]:
    """How kernels compute weights: see `attention.evaluation`."""
    flags, options, scalars = arguments.flags, arguments.flags["OPTIONS"], arguments.scalars
    bent = options.SOFTCAP or options.ALIBI or int(ABSENT.value) != options.BIAS
    cheap, narrow = flags["K"] > 0 or flags["HARDWARE"] > 0, dtype.itemsize == 2
    power = CHEAP if cheap else EITHER if narrow and flags["E_TENSOR"] else DIGITS
    return {"FOLDED": not bent and scalars["scale"] > 0, "POWER": power.value, "EXACT": not narrow}


def _most_tiles(n_keys: int, call: AttentionCall, rows: int, keys: int) -> int:
    """The maximum number of key tiles in range of a block of `rows` queries, in multiples of `keys` keys."""
    tiles = -(-(call.max_seqlen_k if call.cu_seqlens_k is not None else n_keys) // TILE)
    if call.left >= 0 and call.right >= 0:
        tiles = min(tiles, (call.left + call.right + rows + TILE - 2) // TILE + 1)
    return -(-max(tiles, 1) * TILE // keys) * (keys // TILE)
