"""What decoding's launcher tells the kernels of a call: tensors, strides, scalars, flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.common.launch import Exponent, padded
from diffmax.kernels.triton.common.scores import NO_LIMIT, Options
from diffmax.plugin import KVCacheCall

Names = dict[str, Any]

# How sequences lie in the cache: PLACES of `tiles.whose`
IN_ORDER, BY_ROW, BY_ROW_AND_START = 0, 1, 2


@dataclass(frozen=True)
class Arguments:
    """A call's part of the launches but the tensors, by the names of the kernels' arguments.

    Attributes:
        shared: What every kernel takes.
        pages: Which tiles there are.
        table: Where their pages are.
        queries, keys, values: Of the queries and the caches.
        fresh: Of the new tokens.
        scores: Of the rules that act on scores.
    """

    shared: Names
    pages: Names
    table: Names
    queries: Names
    keys: Names
    values: Names
    fresh: Names
    scores: Names

    @classmethod
    def of(cls, query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, *, ptx: bool) -> Arguments:
        """Depends on the signature of the call only."""
        exponent, length = Exponent.of(call.e, torch.float32), query.shape[1]
        table, alibi = call.block_table, call.alibi
        options = Options(
            # without a left end only the keys after a query are hidden, and a sequence's last query has none
            WINDOW=call.left >= 0 or call.right > 0 or (call.right == 0 and length > 1),
            SOFTCAP=call.softcap > 0, ALIBI=alibi is not None,
        )  # fmt: skip
        shared = {
            "new": 0 if call.k is None else call.k.shape[1], "kv_heads": k_cache.shape[2],
            "group": query.shape[2] // k_cache.shape[2], "length": length, "e": exponent.e, "k": exponent.k,
            "PLACES": _kind(call), "E_TENSOR": exponent.tensor, "K": exponent.integer, "PTX": ptx,
        }  # fmt: skip
        q_b, q_l, q_h, q_d = query.stride()
        return cls(
            shared=shared,
            pages={
                "page_size": call.page_size, "left": _limit(call.left),
                "HAS_NEW": call.k is not None and call.k.shape[1] > 0,
            },
            table={"table_b": 0 if table is None else table.shape[1], "PAGED": table is not None},
            queries={
                "q_b": q_b, "q_l": q_l, "q_h": q_h, "q_d": q_d, "HEAD_DIM": query.shape[3], "BLOCK_D": padded(query.shape[3]),
            },
            keys=_strides("k", k_cache),
            values=_strides("v", v_cache),
            fresh={**_strides("kn", call.k), **_strides("vn", call.v)},
            scores={
                "alibi_b": alibi.shape[1] if alibi is not None and alibi.shape[0] > 1 else 0,
                "right": _limit(call.right), "scale": call.scale, "softcap": call.softcap, "OPTIONS": options,
            },
        )  # fmt: skip


def tensors_of(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall) -> dict[str, Tensor]:
    """The call's tensors by the names of kernel pointers. The queries stand for a missing one, which no kernel reads."""

    def contiguous(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous()

    given = {
        "q_ptr": query, "k_ptr": k_cache, "v_ptr": v_cache, "kn_ptr": call.k, "vn_ptr": call.v,
        "low_ptr": call.low, "high_ptr": call.high, "seqlens_ptr": call.cache_seqlens.contiguous(),
        "places_ptr": _places(call), "table_ptr": contiguous(call.block_table),
        "e_ptr": call.e.contiguous() if isinstance(call.e, Tensor) else None,
        "alibi_ptr": contiguous(call.alibi), "sink_ptr": contiguous(call.sink),
    }  # fmt: skip
    return {name: query if t is None else t for name, t in given.items()}


def _limit(side: int) -> int:
    """An end of the window, as the kernels take it."""
    return side if side >= 0 else int(NO_LIMIT.value)


def _kind(call: KVCacheCall) -> int:
    """How rows of the cache and starts of the sequences lie in `_places`."""
    if call.leftpad is not None:
        return BY_ROW_AND_START
    return IN_ORDER if call.cache_batch_idx is None else BY_ROW


def _places(call: KVCacheCall) -> Tensor | None:
    """Rows of the cache and starts of the sequences."""
    rows, starts = call.cache_batch_idx, call.leftpad
    if starts is None:
        return None if rows is None else rows.contiguous()
    rows = torch.arange(starts.shape[0], dtype=torch.int32, device=starts.device) if rows is None else rows
    return torch.stack([rows, starts], 1)


def _strides(letter: str, t: Tensor | None) -> Names:
    """Of sequences or pages, tokens, heads and entries."""
    return dict(zip((f"{letter}_{axis}" for axis in "bshd"), (0, 0, 0, 0) if t is None else t.stride(), strict=True))
