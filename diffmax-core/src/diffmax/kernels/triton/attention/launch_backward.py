"""The launches of attention's backward kernels: results and grids. The gradient for a bias takes a third launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.attention.call import Arguments, aligned, rows_of_entries, strides
from diffmax.kernels.triton.attention.dbias import attention_bwd_dbias_kernel
from diffmax.kernels.triton.attention.dkv import attention_bwd_dkv_kernel
from diffmax.kernels.triton.attention.dq import attention_bwd_dq_kernel
from diffmax.kernels.triton.attention.gradient import ALWAYS, BY_E, NEVER
from diffmax.kernels.triton.attention.settings import Backward
from diffmax.kernels.triton.common.launch import on_device, padded
from diffmax.plugin import TILE, AttentionCall, AttentionGradients, Saved, Wanted


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    call: AttentionCall,
    wanted: Wanted,
    blocks: Backward,
    *,
    ptx: bool,
) -> AttentionGradients:
    """Backward kernels; arguments and results as `diffmax.reference.attention.attention_backward`.

    Args:
        grad, query, key, value, saved, call, wanted: The call.
        blocks: Settings of the three kernels.
        ptx: Whether the compiler accepts NVIDIA's assembly.
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

    launch = _Launch.of(grad.to(value.dtype), query, key, value, saved, call, blocks, ptx)
    values = m.new_empty(*m.shape[:2], 3, launch.shared["n_places"])
    with on_device(query.device):
        launch.dq(grad_query, grad_e, grad_sink, values)
        launch.dkv(grad_key, grad_value, values)
        if bias is not None:
            launch.dbias(grad_bias, bias, values)
    return results


@dataclass(frozen=True)
class _Launch:
    """The tensors of a call in the layout of the kernels, and the arguments shared by all launches."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    saved: Saved
    call: AttentionCall
    arguments: Arguments
    shared: dict[str, Any]
    blocks: Backward

    @classmethod
    def of(
        cls,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        saved: Saved,
        call: AttentionCall,
        blocks: Backward,
        ptx: bool,
    ) -> _Launch:
        saved = Saved(*(t.contiguous() for t in saved))
        grad, query, key, value = (rows_of_entries(t) for t in (grad, query, key, value))
        arguments = Arguments.of(query, key, call, ptx=ptx, precision="ieee")
        n_tiles, n_words = saved.live.shape[2:] if saved.live.ndim == 4 else (0, 0)
        shared = {
            **arguments.scalars, **strides("g", grad), **strides("v", value), **arguments.dropout,
            "n_tiles": n_tiles, "n_words": n_words, "n_places": TILE * arguments.blocks(query.shape[2], TILE),
            **arguments.flags, "VALUE_DIM": value.shape[3], "BLOCK_V": padded(value.shape[3]),
            "HARDWARE": _hardware(arguments, query.dtype),
            "ALIGNED": all(aligned(t) for t in (grad, query, key, value)), "LIVE": saved.live.numel() > 0,
        }  # fmt: skip
        return cls((grad, query, key, value), saved, call, arguments, shared, blocks)

    def dq(self, grad_query: Tensor, grad_e: Tensor, grad_sink: Tensor, values: Tensor) -> None:
        """Gradients for query, e and sink, and the queries' values for the other launches."""
        n_blocks = self.arguments.blocks(grad_query.shape[2], self.blocks.dq.rows)
        attention_bwd_dq_kernel[(grad_query.shape[0] * grad_query.shape[1] * n_blocks,)](
            *self.tensors, *self.saved, **self._given("e", "mask", "bias", "alibi", "seed", "sink", "cu_q", "cu_k"),
            grad_q_ptr=grad_query, grad_e_ptr=grad_e, grad_sink_ptr=grad_sink, values_ptr=values,
            **self.shared, **self._packed(), n_blocks=n_blocks, SINK=self.call.sink is not None,
            NEEDS_E=grad_e.numel() > 0, NEEDS_SINK=grad_sink.numel() > 0,
            **self.blocks.dq.arguments(),
        )  # fmt: skip

    def dkv(self, grad_key: Tensor, grad_value: Tensor, values: Tensor) -> None:
        """Gradients for key and value."""
        silent = any(t is not None for t in (self.call.mask, self.call.bias, self.call.sink))
        n_blocks = self.arguments.blocks(grad_key.shape[2], self.blocks.dkv.keys)
        attention_bwd_dkv_kernel[(grad_key.shape[0] * grad_key.shape[1] * n_blocks,)](
            *self.tensors, values, self.saved.live,
            **self._given("e", "mask", "bias", "alibi", "seed", "cu_q", "cu_k"), grad_k_ptr=grad_key, grad_v_ptr=grad_value,
            **self.shared, **self._packed(), n_blocks=n_blocks, SILENT=silent, **self.blocks.dkv.arguments(),
        )  # fmt: skip

    def dbias(self, grad_bias: Tensor, bias: Tensor, values: Tensor) -> None:
        """Gradient for the bias."""
        block = self.blocks.dbias
        batch, heads, length, _ = self.tensors[1].shape
        every = (batch, heads, -(-length // block.rows), -(-self.tensors[2].shape[2] // block.keys))
        own = tuple(1 if size == 1 else count for size, count in zip(bias.shape, every, strict=True))
        each = (full // mine for full, mine in zip(every, own, strict=True))
        attention_bwd_dbias_kernel[(own[0] * own[1] * own[2] * own[3],)](
            *self.tensors, values, self.saved.live,
            **self._given("e", "mask", "bias", "alibi", "seed"), grad_bias_ptr=grad_bias, **self.shared,
            bias_heads=own[1], row_blocks=own[2], key_blocks=own[3],
            **dict(zip(("batches_each", "heads_each", "rows_each", "keys_each"), each, strict=True)),
            ONE_ROW=bias.shape[2] == 1, ONE_KEY=bias.shape[3] == 1, **block.arguments(),
        )  # fmt: skip

    def _given(self, *names: str) -> dict[str, Tensor]:
        return {f"{name}_ptr": self.arguments.tensors[f"{name}_ptr"] for name in names}

    def _packed(self) -> dict[str, int]:
        return {"n_sequences": self.arguments.n_sequences, "max_keys": self.call.max_seqlen_k}


def _hardware(arguments: Arguments, dtype: torch.dtype) -> int:
    """The use of the hardware's logarithm, see `attention.gradient`."""
    if dtype.itemsize > 2:
        return int(NEVER.value)
    return int((ALWAYS if arguments.flags["HARDWARE"] else BY_E).value)
