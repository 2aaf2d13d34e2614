"""The launcher of attention's backward kernels: memory, strides, tiles, grids.

Two launches; a bias that wants its gradient takes a third. Nothing here waits for the device. Kernels are compiled for a
bounded number of cases: dtype, head sizes, which features, five integer exponents; not for each length, stride, number of heads
or alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffmax.kernels.triton.attention.dbias import attention_bwd_dbias_kernel
from diffmax.kernels.triton.attention.dkv import attention_bwd_dkv_kernel
from diffmax.kernels.triton.attention.dq import attention_bwd_dq_kernel
from diffmax.kernels.triton.attention.tiles import ABSENT, ADJACENT_KEYS, ANY_STRIDES, NO_LIMIT, SHARED_BY_QUERIES
from diffmax.kernels.triton.attention.tuning_backward import Blocks
from diffmax.kernels.triton.common.launch import SERIES_TERMS, SMALLEST_E_FOR_HARDWARE, Exponent, on_device, padded
from diffmax.plugin import AttentionCall
from diffmax.reference.dropout import threshold

Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

VECTOR_BYTES = 16

# Offsets within a tile are int32: a tensor whose rows lie farther apart, in elements, is copied
FARTHEST_ROWS = 1 << 23


class Operator(Protocol):
    """What the launcher asks of a vendor's operator.

    Attributes:
        ptx: Whether the compiler takes NVIDIA's assembly.
    """

    ptx: bool

    def backward_blocks(self, device: torch.device, dtype: torch.dtype, size: int) -> Blocks:
        """The tiles for heads of `size` entries."""


def attention_backward(
    operator: Operator,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    m: Tensor,
    delta: Tensor,
    u: Tensor,
    live: Tensor,
    call: AttentionCall,
    needs_e: bool,
    needs_bias: bool = False,
    needs_sink: bool = False,
) -> Backward:
    """Backward kernel; arguments and results as `diffmax.reference.attention.attention_backward`."""
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    grad_e = torch.empty(m.shape if needs_e else (0,), dtype=m.dtype, device=m.device)
    grad_sink = torch.empty(m.shape if needs_sink else (0,), dtype=m.dtype, device=m.device)
    bias_shape = call.bias.shape if needs_bias and call.bias is not None else (0,)
    grad_bias = torch.empty(bias_shape, dtype=m.dtype, device=m.device)
    results = (grads[0], grads[1], grads[2], grad_e, grad_bias, grad_sink)
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        for result in results:
            result.zero_()
        return results

    launch = _Launch.of(operator, grad.to(value.dtype), query, key, value, (m, delta, u, live), call)
    mean = torch.empty_like(launch.m)
    with on_device(query.device):
        launch.queries(grads[0], grad_e, grad_sink, mean)
        launch.keys(grads[1], grads[2], mean)
        if needs_bias and call.bias is not None:
            launch.bias(grad_bias, call.bias, mean)
    return results


@dataclass(frozen=True)
class _Launch:
    """A call's tensors as the kernels take them, and the arguments that all launches share."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    m: Tensor
    delta: Tensor
    u: Tensor
    live: Tensor
    call: AttentionCall
    beside: dict[str, Tensor]
    scalars: dict[str, Any]
    flags: dict[str, Any]
    packed: dict[str, Any]
    blocks: Blocks

    @classmethod
    def of(
        cls,
        operator: Operator,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kept: Sequence[Tensor],
        call: AttentionCall,
    ) -> _Launch:
        m, delta, u, live = (t.contiguous() for t in kept)
        grad, query, key, value = (_rows_of_entries(t) for t in (grad, query, key, value))
        heads, length, n_keys = query.shape[1], query.shape[2], key.shape[2]
        exponent = Exponent.of(call.e, torch.float32)
        mask = None if call.mask is None else call.mask.view(torch.uint8)
        alibi = None if call.alibi is None else call.alibi.contiguous()
        cu_seqlens_q, cu_seqlens_k = call.cu_seqlens_q, call.cu_seqlens_k
        sizes = {
            "heads": heads, "group": heads // key.shape[1], "length": length, "n_keys": n_keys,
            "n_tiles": live.shape[2] if live.ndim == 4 else 0, "n_words": live.shape[3] if live.ndim == 4 else 0,
        }  # fmt: skip
        strides: dict[str, Any] = {}
        for letter, t in (("g", grad), ("q", query), ("k", key), ("v", value)):
            strides |= {f"{letter}_b": t.stride(0), f"{letter}_h": t.stride(1), f"{letter}_row": t.stride(2)}
        for name, beside_scores in (("mask", mask), ("bias", call.bias)):
            whole = None if beside_scores is None else beside_scores.expand(*query.shape[:3], n_keys)
            steps = (0, 0, 0, 0) if whole is None else whole.stride()
            strides |= dict(zip((f"{name}_b", f"{name}_h", f"{name}_row", f"{name}_key"), steps, strict=True))
        strides["alibi_b"] = alibi.stride(0) if alibi is not None and alibi.ndim == 2 else 0
        smallest = threshold(call.dropout_p)
        numbers = {
            "scale": call.scale, "e": exponent.e, "k": exponent.k, "softcap": call.softcap,
            "left": call.left if call.left >= 0 else NO_LIMIT.value, "right": call.right if call.right >= 0 else NO_LIMIT.value,
            "threshold": smallest - (1 << 32) if smallest >= 1 << 31 else smallest,
            "inverse_keep": 1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0.0,
        }  # fmt: skip
        flags = {
            "HEAD_DIM": query.shape[3], "VALUE_DIM": value.shape[3], "BLOCK_D": padded(query.shape[3]),
            "BLOCK_V": padded(value.shape[3]), "ALIGNED": all(_aligned(t) for t in (grad, query, key, value)),
            "LOWER_RIGHT": _lower_right(query, key, call), "WINDOW": call.left >= 0 or call.right >= 0,
            "MASK": _layout(mask), "BIAS": _layout(call.bias), "ALIBI": alibi is not None, "SOFTCAP": call.softcap > 0,
            "DROPOUT": call.dropout_p > 0, "LIVE": live.numel() > 0, "E_TENSOR": exponent.tensor, "K": exponent.integer,
            "HARDWARE": _hardware(exponent, query.dtype), "PTX": operator.ptx,
            "PRECISION": "ieee",
        }  # fmt: skip
        nothing = m
        beside = {
            "e_ptr": call.e if isinstance(call.e, Tensor) else nothing,
            "mask_ptr": nothing if mask is None else mask,
            "bias_ptr": nothing if call.bias is None else call.bias,
            "alibi_ptr": nothing if alibi is None else alibi,
            "seed_ptr": nothing if call.seed is None else call.seed,
        }
        packed = {
            "cu_q_ptr": nothing if cu_seqlens_q is None else cu_seqlens_q,
            "cu_k_ptr": nothing if cu_seqlens_k is None else cu_seqlens_k,
            "n_sequences": 0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
            "max_keys": call.max_seqlen_k,
            "PACKED": cu_seqlens_q is not None,
        }
        blocks = operator.backward_blocks(query.device, query.dtype, max(query.shape[3], value.shape[3]))
        if not operator.ptx and (mask is not None or call.dropout_p > 0):
            blocks = blocks.without_overlap()
        return cls((grad, query, key, value), m, delta, u, live, call, beside, sizes | strides | numbers, flags, packed, blocks)

    def queries(self, grad_query: Tensor, grad_e: Tensor, grad_sink: Tensor, mean: Tensor) -> None:
        """Gradients for query, e and sink, and the mean of dP that the other launches need."""
        block, sink = self.blocks.queries, self.call.sink
        n_blocks = self._blocks(grad_query.shape[2], block.rows)
        attention_bwd_dq_kernel[(grad_query.shape[0] * grad_query.shape[1] * n_blocks,)](
            *self.tensors, self.m, self.delta, self.u, self.live,
            **self.beside, sink_ptr=self.m if sink is None else sink, **self.packed,
            grad_q_ptr=grad_query, grad_e_ptr=grad_e, grad_sink_ptr=grad_sink, mean_ptr=mean,
            **self.scalars, n_blocks=n_blocks, **self.flags, SINK=sink is not None,
            NEEDS_E=grad_e.numel() > 0, NEEDS_SINK=grad_sink.numel() > 0, TERMS=SERIES_TERMS[torch.float32],
            **block.arguments(),
        )  # fmt: skip

    def keys(self, grad_key: Tensor, grad_value: Tensor, mean: Tensor) -> None:
        """Gradients for key and value."""
        block, call = self.blocks.keys, self.call
        silent = call.mask is not None or call.bias is not None or call.sink is not None
        n_blocks = self._blocks(grad_key.shape[2], block.keys)
        attention_bwd_dkv_kernel[(grad_key.shape[0] * grad_key.shape[1] * n_blocks,)](
            *self.tensors, self.m, self.delta, mean, self.live, **self.beside, **self.packed,
            grad_k_ptr=grad_key, grad_v_ptr=grad_value, **self.scalars, n_blocks=n_blocks, **self.flags, SILENT=silent,
            **block.arguments(),
        )  # fmt: skip

    def bias(self, grad_bias: Tensor, bias: Tensor, mean: Tensor) -> None:
        """Gradient for the bias."""
        block = self.blocks.bias
        batch, heads, length, _ = self.tensors[1].shape
        blocks = (-(-length // block.rows), -(-self.tensors[2].shape[2] // block.keys))
        whole = (batch, heads, *blocks)
        own = tuple(1 if size == 1 else count for size, count in zip(bias.shape, whole, strict=True))
        each = (full // mine for full, mine in zip(whole, own, strict=True))
        attention_bwd_dbias_kernel[(own[0] * own[1] * own[2] * own[3],)](
            *self.tensors, self.m, self.delta, mean, self.live, **self.beside, grad_bias_ptr=grad_bias,
            bias_heads=own[1], row_blocks=own[2], key_blocks=own[3],
            **dict(zip(("batches_each", "heads_each", "rows_each", "keys_each"), each, strict=True)),
            **self.scalars, **self.flags, ONE_ROW=bias.shape[2] == 1, ONE_KEY=bias.shape[3] == 1, **block.arguments(),
        )  # fmt: skip

    def _blocks(self, length: int, size: int) -> int:
        # of packed sequences: theirs, and what follows the last of them
        return length // size + self.packed["n_sequences"] + 1 if self.packed["PACKED"] else -(-length // size)


def _rows_of_entries(t: Tensor) -> Tensor:
    """t with the entries of a row side by side, and rows not so far apart that offsets in a tile would overflow."""
    if (t.stride(3) != 1 and t.shape[3] > 1) or t.stride(2) > FARTHEST_ROWS:
        return t.contiguous()
    return t


def _aligned(t: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    vector = VECTOR_BYTES // t.element_size()
    return t.data_ptr() % VECTOR_BYTES == 0 and not any(step % vector for step in t.stride()[:3])


def _layout(t: Tensor | None) -> int:
    """How a mask or a bias lies in memory, as `attention.tiles` numbers it."""
    if t is None:
        return int(ABSENT.value)
    adjacent = t.stride(3) == 1 and t.shape[3] > 1
    if not adjacent:
        return int(ANY_STRIDES.value)
    return int((SHARED_BY_QUERIES if t.shape[2] == 1 else ADJACENT_KEYS).value)


def _lower_right(query: Tensor, key: Tensor, call: AttentionCall) -> bool:
    """Whether a query's place depends on the number of keys, and anything on the place: else one binary serves both."""
    placed = call.left >= 0 or call.right >= 0 or call.alibi is not None
    return call.lower_right and placed and (call.cu_seqlens_q is not None or query.shape[2] != key.shape[2])


def _hardware(exponent: Exponent, dtype: torch.dtype) -> int:
    """Whether the hardware's logarithm serves: gradients in float16 and bfloat16 do not see its error."""
    return int(not exponent.tensor and exponent.e >= SMALLEST_E_FOR_HARDWARE and dtype.itemsize == 2)
