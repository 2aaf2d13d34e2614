"""flash-attn compatibility: its names and signatures on diffmax. Use `from diffmax.compat import flash_attn` in existing code.

The layout is (B, L, H, D), or packed (T, H, D); there may be fewer key/value heads than query heads; causality and windows are
aligned at the lower right. Every function has the keyword-only arguments `alpha`, a float or a tensor () or (H,), and
`backend`, as in `diffmax.attention`. The log-sum-exp is replaced by tau, of the same shape, and the weights by None.
`deterministic` and `num_splits` have no effect. docs/arguments.md lists every argument.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention.api import attention, attention_varlen
from diffmax.operators.common.checks import _shape
from diffmax.operators.decoding.api import attention_with_kvcache
from diffmax.operators.decoding.checks import check_cache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result: TypeAlias = "Tensor | tuple[Tensor, Tensor, None]"


@alone_in_child
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    backend: str | None = None,
) -> Result:
    """`diffmax.attention` in the layout (B, L, H, D), with flash-attn's argument names.

    Args:
        q: (B, L, H, D).
        k, v: (B, S, H_kv, D) and (B, S, H_kv, D_v), where H is a multiple of H_kv.
        dropout_p, softcap, alibi_slopes, alpha, backend: As for `diffmax.attention`.
        softmax_scale: Factor of the scores; None: 1 / sqrt(D).
        causal, window_size: Aligned at the lower right: the last query has the position of the last key.
        deterministic: No effect: the backward is deterministic if its backend claims it.
        return_attn_probs: Whether to return a triple: the result, tau (B, H, L), and None.
    Returns:
        (B, L, H, D_v), contiguous.
    Raises:
        TypeError, ValueError, NoBackendError: As `diffmax.attention`.
    Source: the signature is flash-attn's (BSD-3-Clause). Written for diffmax.
    Example:
        >>> x = torch.randn(2, 10, 4, 16)
        >>> flash_attn_func(x, x, x, causal=True, alpha=0.5).shape
        torch.Size([2, 10, 4, 16])
    """
    name = "flash_attn_func"
    for what, t in (("q", q), ("k", k), ("v", v)):
        check_cache(name, what, t)
    out: Any = attention(  # type: ignore[call-overload]  # return_stats may be either
        *(t.transpose(1, 2) for t in (q, k, v)),
        dropout_p=dropout_p,
        is_causal=causal,
        scale=softmax_scale,
        enable_gqa=True,
        alpha=alpha,
        window_size=window_size,
        causal_alignment="lower_right",
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        return_stats=return_attn_probs,
        backend=backend,
    )
    if not return_attn_probs:
        result: Tensor = out.transpose(1, 2).contiguous()
        return result
    return out[0].transpose(1, 2).contiguous(), out[1].tau, None


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    backend: str | None = None,
) -> Result:
    """`flash_attn_func` with keys and values in one tensor.

    Args:
        q: (B, L, H, D).
        kv: (B, S, 2, H_kv, D).
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, alpha, backend:
            As for `flash_attn_func`.
    Example:
        >>> flash_attn_kvpacked_func(torch.randn(2, 10, 4, 16), torch.randn(2, 12, 2, 2, 16)).shape
        torch.Size([2, 10, 4, 16])
    """
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    options: list[Any] = [
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    ]
    return flash_attn_func(q, k, v, *options, alpha=alpha, backend=backend)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    backend: str | None = None,
) -> Result:
    """`flash_attn_func` with queries, keys and values in one tensor.

    Args:
        qkv: (B, L, 3, H, D).
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, alpha, backend:
            As for `flash_attn_func`.
    Example:
        >>> flash_attn_qkvpacked_func(torch.randn(2, 10, 3, 4, 16)).shape
        torch.Size([2, 10, 4, 16])
    """
    q, k, v = _parts("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    options: list[Any] = [
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    ]
    return flash_attn_func(q, k, v, *options, alpha=alpha, backend=backend)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.9,
    backend: str | None = None,
) -> Result:
    """`diffmax.attention_varlen` with flash-attn's argument names.

    Args:
        q: (T_q, H, D).
        k, v: (T_k, H_kv, D) and (T_k, H_kv, D_v); with block_table (num_blocks, page_size, H_kv, D) and likewise.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table: As for `diffmax.attention_varlen`.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, alpha, backend: As for `flash_attn_func`.
        alibi_slopes: (H,), or (N, H), one row per sequence.
        return_attn_probs: Whether to return a triple: the result, tau (H, T_q), and None.
    Returns:
        (T_q, H, D_v), contiguous.
    Example:
        >>> tokens, ends = torch.randn(12, 4, 16), torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_func(tokens, tokens, tokens, ends, ends, 7, 7, causal=True).shape
        torch.Size([12, 4, 16])
    """
    out: Any = attention_varlen(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        dropout_p=dropout_p,
        is_causal=causal,
        scale=softmax_scale,
        enable_gqa=True,
        alpha=alpha,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        block_table=block_table,
        return_stats=return_attn_probs,
        backend=backend,
    )
    result: Result = (out[0], out[1].tau.T, None) if return_attn_probs else out
    return result


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    backend: str | None = None,
) -> Result:
    """`flash_attn_varlen_func` with keys and values in one tensor.

    Args:
        q: (T_q, H, D).
        kv: (T_k, 2, H_kv, D).
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: As for `diffmax.attention_varlen`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, alpha, backend:
            As for `flash_attn_varlen_func`.
    Example:
        >>> ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_kvpacked_func(torch.randn(12, 4, 16), torch.randn(12, 2, 2, 16), ends, ends, 7, 7).shape
        torch.Size([12, 4, 16])
    """
    k, v = _parts("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options: list[Any] = [
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    ]
    return flash_attn_varlen_func(q, k, v, *lengths, *options, alpha=alpha, backend=backend)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    backend: str | None = None,
) -> Result:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor.

    Args:
        qkv: (T, 3, H, D).
        cu_seqlens, max_seqlen: As cu_seqlens_q and max_seqlen_q for `diffmax.attention_varlen`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, alpha, backend:
            As for `flash_attn_varlen_func`.
    Example:
        >>> ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> flash_attn_varlen_qkvpacked_func(torch.randn(12, 3, 4, 16), ends, 7).shape
        torch.Size([12, 4, 16])
    """
    q, k, v = _parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options: list[Any] = [
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    ]
    return flash_attn_varlen_func(q, k, v, *lengths, *options, alpha=alpha, backend=backend)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`diffmax.attention_with_kvcache` with flash-attn's argument order.

    Args:
        q, k_cache, v_cache, k, v: As for `diffmax.attention_with_kvcache`, which has all other arguments under the same names.
    Returns:
        (B, L, H, D_v), contiguous; and tau (B, H, L), if requested.
    Example:
        >>> caches = torch.zeros(2, 2, 32, 4, 16).unbind()
        >>> flash_attn_with_kvcache(torch.randn(2, 1, 8, 16), *caches, cache_seqlens=7, causal=True).shape
        torch.Size([2, 1, 8, 16])
    """
    result: Tensor | tuple[Tensor, Tensor] = attention_with_kvcache(  # type: ignore[assignment]  # without stats
        *(q, k_cache, v_cache, k, v),
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        return_softmax_lse=return_softmax_lse,
        alpha=alpha,
        backend=backend,
    )
    return result


def _parts(name: str, what: str, packed: Tensor, ndim: int, count: int) -> tuple[Tensor, ...]:
    """The `count` tensors that are packed along the third dimension from the end."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name}: {what} must be a torch.Tensor, got {type(packed).__name__}")
    if packed.ndim != ndim or packed.shape[-3] != count:
        axes = f"(B, L, {count}, H, D)" if ndim == 5 else f"(T, {count}, H, D)"
        raise ValueError(f"{name}: {what} must have shape {axes}, got {_shape(packed)}")
    return torch.unbind(packed, -3)
