"""Kernel arguments of a call, shared by attention's forward and backward launchers: tensors, strides, scalars, flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.common.geometry import VECTOR_BYTES
from diffmax.kernels.triton.common.launch import SMALLEST_E_FOR_HARDWARE, Exponent, padded
from diffmax.kernels.triton.common.scores import ABSENT, ADJACENT_KEYS, ANY_STRIDES, NO_LIMIT, SHARED_BY_QUERIES, Options
from diffmax.plugin import AttentionCall
from diffmax.reference.dropout import threshold

Names = dict[str, Any]

# Offsets within a tile are int32: a tensor with a larger row stride, in elements, is copied
FARTHEST_ROWS = 1 << 23


@dataclass(frozen=True)
class Arguments:
    """The launch arguments that depend on the call.

    Attributes:
        scalars: Strides, sizes and numbers.
        flags: Compile-time arguments.
        dropout: The threshold as an int32 with its bits, the factor of kept weights, and the flag.
        n_sequences: Number of packed sequences, else 0.
    """

    scalars: Names
    flags: Names
    dropout: Names
    n_sequences: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, call: AttentionCall, *, ptx: bool, precision: str) -> Arguments:
        """The arguments for tensors returned by `rows_of_entries`."""
        exponent = Exponent.of(call.e, torch.float32)
        mask, alibi = call.mask, call.alibi
        scalars = {
            **strides("q", query), **strides("k", key), **score_strides("mask", mask), **score_strides("bias", call.bias),
            "alibi_b": alibi.shape[1] if alibi is not None and alibi.ndim == 2 else 0,
            "heads": query.shape[1], "group": query.shape[1] // key.shape[1], "length": query.shape[2], "n_keys": key.shape[2],
            "left": call.left if call.left >= 0 else NO_LIMIT.value, "right": call.right if call.right >= 0 else NO_LIMIT.value,
            "scale": call.scale, "softcap": call.softcap, "e": exponent.e, "k": exponent.k,
        }  # fmt: skip
        options = Options(
            WINDOW=call.left >= 0 or call.right >= 0, MASK=layout_of(mask), SOFTCAP=call.softcap > 0, ALIBI=alibi is not None,
            BIAS=layout_of(call.bias), PACKED=call.cu_seqlens_q is not None, LOWER_RIGHT=_lower_right(query, key, call),
            PRECISION=precision,
        )  # fmt: skip
        flags = {
            "HEAD_DIM": query.shape[3], "BLOCK_D": padded(query.shape[3]), "OPTIONS": options,
            "E_TENSOR": exponent.tensor, "K": exponent.integer, "HARDWARE": _hardware(exponent, query.dtype), "PTX": ptx,
        }  # fmt: skip
        n_sequences = 0 if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
        return cls(scalars, flags, _dropout(call), n_sequences)

    @property
    def packed(self) -> bool:
        """Whether the call has packed sequences."""
        return bool(self.flags["OPTIONS"].PACKED)

    def blocks(self, length: int, size: int) -> int:
        """The number of blocks of `size` rows; with packed sequences including those for rows after the last sequence."""
        return length // size + self.n_sequences + 1 if self.packed else -(-length // size)


def tensors_of(call: AttentionCall, query: Tensor) -> dict[str, Tensor]:
    """The call's tensors by the names of kernel pointers. The queries stand for a missing one, which no kernel reads."""
    mask, alibi = call.mask, call.alibi
    given = {
        "e_ptr": call.e if isinstance(call.e, Tensor) else None, "alibi_ptr": None if alibi is None else alibi.contiguous(),
        "mask_ptr": None if mask is None else mask.view(torch.uint8), "bias_ptr": call.bias, "sink_ptr": call.sink,
        "seed_ptr": call.seed, "cu_q_ptr": call.cu_seqlens_q, "cu_k_ptr": call.cu_seqlens_k,
    }  # fmt: skip
    return {name: query if t is None else t for name, t in given.items()}


def rows_of_entries(t: Tensor) -> Tensor:
    """t, copied unless the entries of a row are adjacent and the row stride keeps offsets in a tile from overflowing."""
    if (t.stride(3) != 1 and t.shape[3] > 1) or t.stride(2) > FARTHEST_ROWS:
        return t.contiguous()
    return t


def strides(letter: str, t: Tensor) -> Names:
    """Strides of batch entries, heads and rows."""
    return {f"{letter}_b": t.stride(0), f"{letter}_h": t.stride(1), f"{letter}_row": t.stride(2)}


def aligned(t: Tensor) -> bool:
    """Whether every row is aligned to 16 bytes."""
    vector = VECTOR_BYTES // t.element_size()
    return t.data_ptr() % VECTOR_BYTES == 0 and not any(step % vector for step in t.stride()[:3])


def score_strides(name: str, t: Tensor | None) -> Names:
    """Strides of a mask or a bias, 0 where it is broadcast."""
    steps = (0, 0, 0, 0) if t is None else (0 if size == 1 else t.stride(axis) for axis, size in enumerate(t.shape))
    return dict(zip((f"{name}_{axis}" for axis in ("b", "h", "row", "key")), steps, strict=True))


def layout_of(t: Tensor | None) -> int:
    """Memory layout of a mask or a bias, as numbered in `common.scores`."""
    if t is None:
        return int(ABSENT.value)
    adjacent = t.stride(3) == 1 and t.shape[3] > 1
    if not adjacent:
        return int(ANY_STRIDES.value)
    return int((SHARED_BY_QUERIES if t.shape[2] == 1 else ADJACENT_KEYS).value)


def _lower_right(query: Tensor, key: Tensor, call: AttentionCall) -> bool:
    """Whether positions depend on the number of keys and matter for the call; if not, one binary serves both alignments."""
    placed = call.left >= 0 or call.right >= 0 or call.alibi is not None
    return call.lower_right and placed and (call.cu_seqlens_q is not None or query.shape[2] != key.shape[2])


def _hardware(exponent: Exponent, dtype: torch.dtype) -> int:
    """Whether to use the hardware logarithm: its error does not show in float16 and bfloat16 gradients."""
    return int(not exponent.tensor and exponent.e >= SMALLEST_E_FOR_HARDWARE and dtype.itemsize == 2)


def _dropout(call: AttentionCall) -> Names:
    smallest = threshold(call.dropout_p)
    return {
        "threshold": smallest - (1 << 32) if smallest >= 1 << 31 else smallest,
        "inverse_keep": 1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0.0,
        "DROPOUT": call.dropout_p > 0,
    }
