"""What attention's launchers tell the kernels of a call, forward and backward alike: tensors, strides, scalars, flags."""

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

# Offsets within a tile are int32: a tensor whose rows lie farther apart, in elements, is copied
FARTHEST_ROWS = 1 << 23


@dataclass(frozen=True)
class Arguments:
    """A call's part of a launch.

    Attributes:
        tensors: By the names of the kernels' pointers; a placeholder where the call has none, which no kernel reads.
        scalars: Strides, sizes and numbers.
        flags: What the kernels are compiled for.
        dropout: The smallest random word that is kept, as the int32 with its bits; what weights are multiplied by; the flag.
        n_sequences: Of packed tensors, else 0.
    """

    tensors: dict[str, Tensor]
    scalars: Names
    flags: Names
    dropout: Names
    n_sequences: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, call: AttentionCall, *, ptx: bool, precision: str) -> Arguments:
        """From tensors that `rows_of_entries` returned."""
        exponent = Exponent.of(call.e, torch.float32)
        mask = None if call.mask is None else call.mask.view(torch.uint8)
        alibi = None if call.alibi is None else call.alibi.contiguous()
        given = {
            "e_ptr": call.e if isinstance(call.e, Tensor) else None, "alibi_ptr": alibi, "sink_ptr": call.sink,
            "mask_ptr": mask, "bias_ptr": call.bias, "seed_ptr": call.seed,
            "cu_q_ptr": call.cu_seqlens_q, "cu_k_ptr": call.cu_seqlens_k,
        }  # fmt: skip
        scalars = {
            **strides("q", query), **strides("k", key), **_score_strides("mask", mask), **_score_strides("bias", call.bias),
            "alibi_b": alibi.stride(0) if alibi is not None and alibi.ndim == 2 else 0,
            "heads": query.shape[1], "group": query.shape[1] // key.shape[1], "length": query.shape[2], "n_keys": key.shape[2],
            "left": call.left if call.left >= 0 else NO_LIMIT.value, "right": call.right if call.right >= 0 else NO_LIMIT.value,
            "scale": call.scale, "softcap": call.softcap, "e": exponent.e, "k": exponent.k,
        }  # fmt: skip
        options = Options(
            WINDOW=call.left >= 0 or call.right >= 0, MASK=_layout(mask), SOFTCAP=call.softcap > 0, ALIBI=alibi is not None,
            BIAS=_layout(call.bias), PACKED=call.cu_seqlens_q is not None, LOWER_RIGHT=_lower_right(query, key, call),
            PRECISION=precision,
        )  # fmt: skip
        flags = {
            "HEAD_DIM": query.shape[3], "BLOCK_D": padded(query.shape[3]), "OPTIONS": options,
            "E_TENSOR": exponent.tensor, "K": exponent.integer, "HARDWARE": _hardware(exponent, query.dtype), "PTX": ptx,
        }  # fmt: skip
        n_sequences = 0 if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
        tensors = {name: query if t is None else t for name, t in given.items()}
        return cls(tensors, scalars, flags, _dropout(call), n_sequences)

    @property
    def packed(self) -> bool:
        """Whether sequences lie one after the other."""
        return bool(self.flags["OPTIONS"].PACKED)

    def blocks(self, length: int, size: int) -> int:
        """How many blocks of `size` rows there are; of packed sequences theirs, and those of what follows the last one."""
        return length // size + self.n_sequences + 1 if self.packed else -(-length // size)


def rows_of_entries(t: Tensor) -> Tensor:
    """t with the entries of a row side by side, and rows not so far apart that offsets in a tile would overflow."""
    if (t.stride(3) != 1 and t.shape[3] > 1) or t.stride(2) > FARTHEST_ROWS:
        return t.contiguous()
    return t


def strides(letter: str, t: Tensor) -> Names:
    """Of batch entries, heads and rows."""
    return {f"{letter}_b": t.stride(0), f"{letter}_h": t.stride(1), f"{letter}_row": t.stride(2)}


def aligned(t: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    vector = VECTOR_BYTES // t.element_size()
    return t.data_ptr() % VECTOR_BYTES == 0 and not any(step % vector for step in t.stride()[:3])


def _score_strides(name: str, t: Tensor | None) -> Names:
    """A mask's or a bias's, 0 where it is broadcast."""
    steps = (0, 0, 0, 0) if t is None else (0 if size == 1 else t.stride(axis) for axis, size in enumerate(t.shape))
    return dict(zip((f"{name}_{axis}" for axis in ("b", "h", "row", "key")), steps, strict=True))


def _layout(t: Tensor | None) -> int:
    """How a mask or a bias lies in memory, as `common.scores` numbers it."""
    if t is None:
        return int(ABSENT.value)
    adjacent = t.stride(3) == 1 and t.shape[3] > 1
    if not adjacent:
        return int(ANY_STRIDES.value)
    return int((SHARED_BY_QUERIES if t.shape[2] == 1 else ADJACENT_KEYS).value)


def _lower_right(query: Tensor, key: Tensor, call: AttentionCall) -> bool:
    """Whether a query's position depends on the number of keys, and anything on the position: else one binary serves both."""
    placed = call.left >= 0 or call.right >= 0 or call.alibi is not None
    return call.lower_right and placed and (call.cu_seqlens_q is not None or query.shape[2] != key.shape[2])


def _hardware(exponent: Exponent, dtype: torch.dtype) -> int:
    """Whether the hardware's logarithm serves: gradients in float16 and bfloat16 do not see its error."""
    return int(not exponent.tensor and exponent.e >= SMALLEST_E_FOR_HARDWARE and dtype.itemsize == 2)


def _dropout(call: AttentionCall) -> Names:
    smallest = threshold(call.dropout_p)
    return {
        "threshold": smallest - (1 << 32) if smallest >= 1 << 31 else smallest,
        "inverse_keep": 1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0.0,
        "DROPOUT": call.dropout_p > 0,
    }
