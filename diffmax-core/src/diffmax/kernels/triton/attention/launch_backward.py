"""The launches of attention's backward kernels: results and grids. The gradient for a bias takes a third launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffmax.kernels.triton.attention.call import Arguments, Names, aligned, rows_of_entries, strides, tensors_of
from diffmax.kernels.triton.attention.dbias import attention_bwd_dbias_kernel
from diffmax.kernels.triton.attention.dkv import attention_bwd_dkv_kernel
from diffmax.kernels.triton.attention.dq import attention_bwd_dq_kernel
from diffmax.kernels.triton.attention.gradient import ALWAYS, BY_E, NEVER
from diffmax.kernels.triton.attention.settings import Backward, Block
from diffmax.kernels.triton.common.launch import Launch, on_device, padded
from diffmax.plugin import TILE, AttentionCall, AttentionGradients, Saved, Wanted


class BackwardPlan(NamedTuple):
    """The launches of a call; that for the bias only if its gradient is wanted.

    Attributes:
        places: Entries of scratch memory for each of a head's three values per query.
    """

    dq: Launch
    dkv: Launch
    dbias: Launch | None
    places: int

    @classmethod
    def of(
        cls,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        saved: Saved,
        call: AttentionCall,
        wanted: Wanted,
        blocks: Backward,
        *,
        ptx: bool,
        partial: int,
    ) -> BackwardPlan:
        """Depends on the signature of the call only.

        Args:
            tensors: The gradient, query, key and value, as returned by `rows_of_entries`.
            saved, call, wanted: The call; the tensors of `saved` are contiguous.
            blocks: Settings of the three kernels.
            ptx: Whether the compiler accepts NVIDIA's assembly.
            partial: Partial sums of a row.
        """
        grad, query, key, value = tensors
        arguments = Arguments.of(query, key, call, ptx=ptx, precision="ieee")
        n_tiles, n_words = saved.live.shape[2:] if saved.live.ndim == 4 else (0, 0)
        places = TILE * arguments.blocks(query.shape[2], TILE)
        shared = {
            **arguments.scalars, **strides("g", grad), **strides("v", value), **arguments.dropout,
            "n_tiles": n_tiles, "n_words": n_words, "n_places": places,
            **arguments.flags, "VALUE_DIM": value.shape[3], "BLOCK_V": padded(value.shape[3]),
            "HARDWARE": _hardware(arguments, query.dtype),
            "ALIGNED": all(aligned(t) for t in tensors), "LIVE": saved.live.numel() > 0,
        }  # fmt: skip
        packed = {"n_sequences": arguments.n_sequences, "max_keys": call.max_seqlen_k}
        row_blocks = arguments.blocks(query.shape[2], blocks.dq.rows)
        dq = {
            **shared, **packed, "n_blocks": row_blocks, "SINK": call.sink is not None, "PARTIAL": partial,
            "NEEDS_E": wanted.e, "NEEDS_SINK": wanted.sink, **blocks.dq.arguments(),
        }  # fmt: skip
        silent = any(t is not None for t in (call.mask, call.bias, call.sink))
        key_blocks = arguments.blocks(key.shape[2], blocks.dkv.keys)
        dkv = {**shared, **packed, "n_blocks": key_blocks, "SILENT": silent, **blocks.dkv.arguments()}
        return cls(
            Launch(attention_bwd_dq_kernel, (query.shape[0] * query.shape[1] * row_blocks,), dq),
            Launch(attention_bwd_dkv_kernel, (key.shape[0] * key.shape[1] * key_blocks,), dkv),
            None if call.bias is None or not wanted.bias else _dbias(query, key, call.bias, shared, blocks.dbias),
            places,
        )


def _dbias(query: Tensor, key: Tensor, bias: Tensor, shared: Names, block: Block) -> Launch:
    """The launch for the gradient for the bias."""
    batch, heads, length, _ = query.shape
    every = (batch, heads, -(-length // block.rows), -(-key.shape[2] // block.keys))
    own = tuple(1 if size == 1 else count for size, count in zip(bias.shape, every, strict=True))
    each = (full // mine for full, mine in zip(every, own, strict=True))
    arguments = {
        **shared, "bias_heads": own[1], "row_blocks": own[2], "key_blocks": own[3],
        **dict(zip(("batches_each", "heads_each", "rows_each", "keys_each"), each, strict=True)),
        "ONE_ROW": bias.shape[2] == 1, "ONE_KEY": bias.shape[3] == 1, **block.arguments(),
    }  # fmt: skip
    return Launch(attention_bwd_dbias_kernel, (own[0] * own[1] * own[2] * own[3],), arguments)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    call: AttentionCall,
    wanted: Wanted,
    plan: Callable[[tuple[Tensor, Tensor, Tensor, Tensor], Saved], BackwardPlan],
) -> AttentionGradients:
    """Backward kernels; arguments and results as `diffmax.reference.attention.attention_backward`.

    Args:
        grad, query, key, value, saved, call, wanted: The call.
        plan: A function that returns the launch plan for tensors as `BackwardPlan.of` takes them.
    """
    m, bias = saved.m, call.bias if wanted.bias else None

    def empty(like: Tensor | None) -> Tensor:
        return m.new_empty(0 if like is None else like.shape)

    grad_query, grad_key, grad_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    grad_e, grad_sink = empty(m if wanted.e else None), empty(m if wanted.sink else None)
    grad_bias = empty(bias)
    results = AttentionGradients(grad_query, grad_key, grad_value, grad_e, grad_bias, grad_sink)
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        for result in results:
            result.zero_()
        return results

    saved = Saved(*(t.contiguous() for t in saved))
    grad = rows_of_entries(grad.to(value.dtype))
    query, key, value = rows_of_entries(query), rows_of_entries(key), rows_of_entries(value)
    planned = plan((grad, query, key, value), saved)
    values = m.new_empty(*m.shape[:2], 3, planned.places)
    tensors = {
        "g_ptr": grad, "q_ptr": query, "k_ptr": key, "v_ptr": value, "u_ptr": saved.u,
        "m_ptr": saved.m, "delta_ptr": saved.delta, "values_ptr": values, "live_ptr": saved.live, **tensors_of(call, query),
        **{f"grad_{name}_ptr": t for name, t in zip(("q", "k", "v", "e", "bias", "sink"), results, strict=True)},
    }  # fmt: skip
    with on_device(query.device):
        planned.dq(tensors)
        planned.dkv(tensors)
        if planned.dbias is not None:
            planned.dbias(tensors)
    return results


def _hardware(arguments: Arguments, dtype: torch.dtype) -> int:
    """The use of the hardware's logarithm, see `attention.gradient`."""
    if dtype.itemsize > 2:
        return int(NEVER.value)
    return int((ALWAYS if arguments.flags["HARDWARE"] else BY_E).value)
