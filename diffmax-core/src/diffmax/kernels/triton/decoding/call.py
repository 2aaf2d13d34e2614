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
    """A call's part of the launches, by the names of the kernels' arguments.

    Attributes:
        shared: What every kernel takes.
        queries, keys, values: Of the tensors that a kernel reads.
        bounds: Of the pages.
        scores: Of the rules that act on scores.
        sink: Of the attention sink.
    """

    shared: Names
    queries: Names
    keys: Names
    values: Names
    bounds: Names
    scores: Names
    sink: Names

    @classmethod
    def of(cls, query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, *, ptx: bool) -> Arguments:
        """Where the call has no such tensor the kernels get the queries, and read nothing of them."""

        def given(t: Tensor | None) -> Tensor:
            return query if t is None else t

        exponent, length = Exponent.of(call.e, torch.float32), query.shape[1]
        table, alibi = (None if t is None else t.contiguous() for t in (call.block_table, call.alibi))
        places, kind = _places(call)
        options = Options(
            # without a left end only the keys after a query are hidden, and a sequence's last query has none
            WINDOW=call.left >= 0 or call.right > 0 or (call.right == 0 and length > 1),
            SOFTCAP=call.softcap > 0, ALIBI=alibi is not None,
        )  # fmt: skip
        shared = {
            "seqlens_ptr": call.cache_seqlens.contiguous(), "places_ptr": given(places), "table_ptr": given(table),
            "e_ptr": call.e.contiguous() if isinstance(call.e, Tensor) else query,
            "table_b": 0 if table is None else table.stride(0), "new": 0 if call.k is None else call.k.shape[1],
            "page_size": call.page_size, "kv_heads": k_cache.shape[2], "group": query.shape[2] // k_cache.shape[2],
            "length": length, "left": _limit(call.left), "e": exponent.e, "k": exponent.k,
            "PAGED": table is not None, "HAS_NEW": call.k is not None and call.k.shape[1] > 0, "PLACES": kind,
            "E_TENSOR": exponent.tensor, "K": exponent.integer, "PTX": ptx,
        }  # fmt: skip
        q_b, q_l, q_h, q_d = query.stride()
        sink = None if call.sink is None else call.sink.contiguous()
        return cls(
            shared=shared,
            queries={
                "q_ptr": query, "q_b": q_b, "q_l": q_l, "q_h": q_h, "q_d": q_d,
                "HEAD_DIM": query.shape[3], "BLOCK_D": padded(query.shape[3]),
            },
            keys={"k_ptr": k_cache, "kn_ptr": given(call.k), **_strides("k", k_cache), **_strides("kn", call.k)},
            values={"v_ptr": v_cache, "vn_ptr": given(call.v), **_strides("v", v_cache), **_strides("vn", call.v)},
            bounds={"low_ptr": given(call.low), "high_ptr": given(call.high)},
            scores={
                "alibi_ptr": given(alibi), "alibi_b": alibi.stride(0) if alibi is not None and alibi.shape[0] > 1 else 0,
                "right": _limit(call.right), "scale": call.scale, "softcap": call.softcap, "OPTIONS": options,
            },
            sink={"sink_ptr": given(sink), "HAS_SINK": sink is not None},
        )  # fmt: skip


def _limit(side: int) -> int:
    """An end of the window, as the kernels take it."""
    return side if side >= 0 else int(NO_LIMIT.value)


def _places(call: KVCacheCall) -> tuple[Tensor | None, int]:
    """Rows of the cache and starts of the sequences, and how they lie there."""
    rows, starts = call.cache_batch_idx, call.leftpad
    if starts is None:
        return (None, IN_ORDER) if rows is None else (rows.contiguous(), BY_ROW)
    rows = torch.arange(starts.shape[0], dtype=torch.int32, device=starts.device) if rows is None else rows
    return torch.stack([rows, starts], 1), BY_ROW_AND_START


def _strides(letter: str, t: Tensor | None) -> Names:
    """Of sequences or pages, tokens, heads and entries."""
    return dict(zip((f"{letter}_{axis}" for axis in "bshd"), (0, 0, 0, 0) if t is None else t.stride(), strict=True))
