"""The smallest calls of attention and decoding that need given features: what `warmup` functions run."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from diffmax._numerics import accumulation_dtype
from diffmax.plugin import AttentionCall, KVCacheCall

LENGTH = 16


def attention_example(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, e: float | None, features: Collection[str]
) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
    """Query, key, value and a call that needs `features`, and alpha as a tensor where e is None."""
    heads, packed = 1 + ("gqa" in features), "varlen" in features
    acc = accumulation_dtype(dtype)
    query = torch.zeros(1, heads, LENGTH, head_dim, dtype=dtype, device=device)
    key, value = (torch.zeros(1, 1, LENGTH, size, dtype=dtype, device=device) for size in (head_dim, value_dim))
    per_head = torch.full((heads,), 0.5, dtype=acc, device=device)
    ends = torch.tensor([0, LENGTH], dtype=torch.int32, device=device) if packed else None
    call = AttentionCall(
        scale=head_dim**-0.5,
        e=per_head if e is None else e,
        mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=device) if "mask" in features else None,
        left=8 if "window" in features else -1,
        right=0 if "causal" in features else -1,
        lower_right=packed,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=LENGTH if packed else 0,
        max_seqlen_k=LENGTH if packed else 0,
        bias=torch.zeros(1, heads, LENGTH, LENGTH, dtype=dtype, device=device) if "bias" in features else None,
        alibi=per_head if "alibi" in features else None,
        softcap=30.0 if "softcap" in features else 0.0,
        sink=per_head if "sink" in features else None,
        dropout_p=0.1 if "dropout" in features else 0.0,
        seed=torch.zeros(2, dtype=torch.int64, device=device) if "dropout" in features else None,
    )
    return query, key, value, call


def decoding_example(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, e: float | None, features: Collection[str]
) -> tuple[Tensor, Tensor, Tensor, KVCacheCall]:
    """Queries, caches and a call that appends one token and needs `features`, and alpha as a tensor where e is None."""
    heads, acc = 1 + ("gqa" in features), accumulation_dtype(dtype)
    query = torch.zeros(1, 1, heads, head_dim, dtype=dtype, device=device)
    k_cache, v_cache = (torch.zeros(1, LENGTH, 1, size, dtype=dtype, device=device) for size in (head_dim, value_dim))
    per_head = torch.full((heads,), 0.5, dtype=acc, device=device)
    paged = "paged" in features
    call = KVCacheCall(
        scale=head_dim**-0.5,
        e=per_head if e is None else e,
        cache_seqlens=torch.full((1,), 4, dtype=torch.int32, device=device),
        k=k_cache[:, :1].clone(),
        v=v_cache[:, :1].clone(),
        block_table=torch.zeros(1, 1, dtype=torch.int32, device=device) if paged else None,
        page_size=LENGTH,
        left=8 if "window" in features else -1,
        right=0 if "causal" in features else -1,
        softcap=30.0 if "softcap" in features else 0.0,
        alibi=per_head.unsqueeze(0) if "alibi" in features else None,
        sink=per_head if "sink" in features else None,
    )
    return query, k_cache, v_cache, call
