"""The launches of attention's forward kernels: results, scratch buffers, grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.tools import live_shape
from diffmax.kernels.triton.attention.call import Arguments, aligned, rows_of_entries, strides
from diffmax.kernels.triton.attention.evaluation import CHEAP, DIGITS, EITHER
from diffmax.kernels.triton.attention.output import attention_out_kernel
from diffmax.kernels.triton.attention.settings import Forward, Settings
from diffmax.kernels.triton.attention.solve import attention_solve_kernel
from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS, SOLVED, on_device, padded
from diffmax.kernels.triton.common.scores import ABSENT
from diffmax.operators.common.numerics import newton_steps
from diffmax.plugin import TILE, AttentionCall, AttentionResults

# Tolerance of the threshold when the output is computed, in units of the slope: see `steps.good_enough`
CUT = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2e-3}

# Tolerance of the sum of the weights, if the output is divided by it
SUM = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def attention_forward(
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
) -> AttentionResults:
    """Forward kernels; arguments and results as `diffmax.reference.attention.attention`.

    Args:
        query, key, value, call, keep, stats: The call.
        settings: Settings of the two kernels.
        processors: Number of multiprocessors (compute units) of the device.
        ptx: Whether the compiler accepts NVIDIA's assembly.
        precision: Precision of products.
    """
    rows, device = query.shape[:3], query.device
    out = value.new_empty((*rows, value.shape[3]))
    m = torch.empty(rows, dtype=torch.float32, device=device)
    delta, start, slope = (torch.empty_like(m) for _ in range(3))
    u = torch.empty_like(out) if keep else out.new_empty(0)
    live = torch.empty(live_shape(query, key, call), dtype=torch.int32, device=device)
    support = torch.empty(rows if stats else (0,), dtype=torch.int32, device=device)
    results = AttentionResults(out, m, delta, u, live if keep or stats else live.new_empty(0), support)
    if m.numel() == 0:
        return results

    query, key, value = (rows_of_entries(t) for t in (query, key, value))
    arguments = Arguments.of(query, key, call, ptx=ptx, precision=precision)
    n_blocks, most_tiles = arguments.blocks(query.shape[2], TILE), _most_tiles(key.shape[2], call)
    items = query.shape[0] * query.shape[1] * n_blocks
    tensors, seed = dict(arguments.tensors), arguments.tensors["seed_ptr"]
    del tensors["seed_ptr"]
    shared = {
        **arguments.scalars, **arguments.flags, **COMPILER_OPTIONS,
        "n_sequences": arguments.n_sequences, "n_blocks": n_blocks, "items": items, "n_words": live.shape[3],
        "most_tiles": most_tiles, "ALIGNED": all(aligned(t) for t in (query, key, value)), "SINK": call.sink is not None,
        "CUT": CUT[query.dtype], "SUM": SUM[query.dtype],
        **_arithmetic(arguments, query.dtype),
    }  # fmt: skip
    keys = call.max_seqlen_k if arguments.packed else key.shape[2]
    largest_e = 1.0 if isinstance(call.e, Tensor) else shared["e"]
    block_d, block_v = padded(query.shape[3]), padded(value.shape[3])

    def programs(of: Settings) -> int:
        return min(items, processors * of.programs)

    def scratch(of: Settings, per_tile: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(programs(of) * most_tiles * per_tile, dtype=dtype, device=device)

    with on_device(device):
        solve = settings.solve
        attention_solve_kernel[(programs(solve),)](
            query, key, m, start, slope, live, **tensors,
            tops_ptr=scratch(solve, TILE, torch.float32), list_ptr=scratch(solve, 1, torch.int32), **shared,
            newton_steps=newton_steps(200, keys + 1, largest_e, torch.float32), LINEAR=keep,
            CHUNK=min(solve.chunk, block_d), num_warps=solve.warps, num_stages=solve.stages,
        )  # fmt: skip
        output = settings.output_of(keep)
        attention_out_kernel[(programs(output),)](
            query, key, value, out, u if keep else out, m, start, slope, delta, live, support if stats else live,
            **tensors, list_ptr=scratch(output, 1, torch.int32), seed_ptr=seed,
            **strides("v", value), **shared, **arguments.dropout,
            VALUE_DIM=value.shape[3], BLOCK_V=min(output.values, block_v),
            KEEP=keep, SUPPORT=stats, SOLVED=SOLVED[query.dtype],
            KEYS=output.keys, PARTS=TILE // output.keys, CHUNK=min(output.chunk, block_d),
            num_warps=output.warps, num_stages=output.stages,
        )  # fmt: skip
    return results


def _arithmetic(arguments: Arguments, dtype: torch.dtype) -> dict[str, Any]:
    """How kernels compute weights: see `attention.evaluation`."""
    flags, options, scalars = arguments.flags, arguments.flags["OPTIONS"], arguments.scalars
    bent = options.SOFTCAP or options.ALIBI or int(ABSENT.value) != options.BIAS
    cheap, narrow = flags["K"] > 0 or flags["HARDWARE"] > 0, dtype.itemsize == 2
    power = CHEAP if cheap else EITHER if narrow and flags["E_TENSOR"] else DIGITS
    return {"FOLDED": not bent and scalars["scale"] > 0, "POWER": power.value, "EXACT": not narrow}


def _most_tiles(n_keys: int, call: AttentionCall) -> int:
    """The maximum number of key tiles in range of one block of queries."""
    tiles = -(-(call.max_seqlen_k if call.cu_seqlens_k is not None else n_keys) // TILE)
    if call.left >= 0 and call.right >= 0:
        tiles = min(tiles, (call.left + call.right + 2 * TILE - 2) // TILE + 1)
    return max(tiles, 1)
