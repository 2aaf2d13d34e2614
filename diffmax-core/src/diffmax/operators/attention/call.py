"""The call that the arguments of `attention` and `attention_varlen` mean, checked before any backend is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.attention import checks
from diffmax.operators.common import nested
from diffmax.operators.common.autocast import autocast
from diffmax.operators.common.checks import check_flag
from diffmax.operators.decoding.paged import from_pages
from diffmax.plugin import AttentionCall

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias


class Options(NamedTuple):
    """What `attention` and `attention_varlen` both take besides their tensors and masks, in the words of the former."""

    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    alpha: float | Tensor
    window_size: tuple[int, int] | None
    alibi_slopes: Tensor | None
    softcap: float
    sink: Tensor | None


def build_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | CausalBias | None,
    options: Options,
    causal_alignment: str,
    draws: bool = True,
) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
    """The tensors and the call that `attention`'s arguments mean. `draws`: whether dropout's seed is drawn."""
    name = "diffmax.attention"
    if any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
        nested.check_all(name, query, key, value, attn_mask)
        queries, keys, values = (nested.pack(name, what, t) for what, t in (("query", query), ("key", key), ("value", value)))
        nested.check_same_lengths(name, keys, values)
        return build_packed_call(
            *(queries.tokens, keys.tokens, values.tokens, queries.ends, keys.ends, queries.longest, keys.longest),
            options,
            draws=draws,
            lower_right=checks.check_alignment(name, causal_alignment),
            name=name,
        )
    dropout_p, is_causal, scale, enable_gqa, alpha, window_size, alibi_slopes, softcap, sink = options
    query, key, value = autocast(query, key, value)
    enable_gqa = check_flag(name, "enable_gqa", enable_gqa)
    query, key, value, attn_mask = checks.as_heads(name, query, key, value, attn_mask, enable_gqa)
    checks.check_tensors(name, query, key, value, "BHLD")
    query, key, value, dropout_p, scale = checks.served(name, query, key, value, dropout_p, scale)
    checks.check_heads(name, query.shape[1], key.shape[1], enable_gqa or key.shape[1] == 1)
    e, e_tensor = checks.check_alpha(name, query, alpha, query.shape[1])
    lower_right = checks.check_alignment(name, causal_alignment)
    # of torch's CausalBias, a Tensor that must not be looked into; torch 2.4 cannot trace this question to others
    variant = None if type(attn_mask) is Tensor else getattr(attn_mask, "variant", None)
    if attn_mask is not None and variant is not None:
        if is_causal:
            raise ValueError(f"{name}: is_causal=True and a CausalBias as attn_mask exclude each other\npass one of them")
        if lower_right and variant.name != "LOWER_RIGHT":
            raise ValueError(
                f'{name}: causal_alignment="lower_right" contradicts attn_mask, a causal_upper_left\n'
                "pass torch.nn.attention.bias.causal_lower_right, or is_causal=True"
            )
        is_causal, lower_right, attn_mask = True, variant.name == "LOWER_RIGHT", None
    left, right = checks.check_window(name, window_size, is_causal)
    mask = None if attn_mask is None else checks.check_mask(name, query, key, attn_mask)
    boolean = mask is not None and mask.dtype == torch.bool
    call = AttentionCall(
        scale=checks.check_scale(name, query, scale),
        e=e if e_tensor is None else e_tensor,
        mask=mask if boolean else None,
        lower_right=lower_right,
        left=left,
        right=right,
        bias=None if boolean else mask,
        alibi=checks.check_alibi(name, query, alibi_slopes, (query.shape[0], query.shape[1])),
        softcap=checks.check_softcap(name, softcap),
        sink=checks.check_sink(name, query, sink, query.shape[1]),
        dropout_p=dropout_p,
        seed=draw_seed(dropout_p, query.device) if draws else None,
    )
    return query, key, value, call


def build_packed_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
    block_table: Tensor | None = None,
    draws: bool = True,
    lower_right: bool = True,
    name: str = "diffmax.attention_varlen",
) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
    """As `build_call`, of `attention_varlen`'s; the tensors are (1, H, T, D)."""
    dropout_p, is_causal, scale, enable_gqa, alpha, window_size, alibi_slopes, softcap, sink = options
    if block_table is not None:
        key, value = from_pages(name, key, value, cu_seqlens_k, block_table)
    query, key, value = autocast(query, key, value)
    checks.check_tensors(name, query, key, value, "THD")
    query, key, value, dropout_p, scale = checks.served(name, query, key, value, dropout_p, scale)
    enable_gqa = check_flag(name, "enable_gqa", enable_gqa)
    checks.check_heads(name, query.shape[1], key.shape[1], enable_gqa)
    e, e_tensor = checks.check_alpha(name, query, alpha, query.shape[1])
    left, right = checks.check_window(name, window_size, is_causal)
    max_seqlen_q, max_seqlen_k = (
        checks.check_longest(name, what, longest) for what, longest in (("q", max_seqlen_q), ("k", max_seqlen_k))
    )
    cu_seqlens_q = checks.check_packing(name, "q", cu_seqlens_q, max_seqlen_q, query.shape[0], query.device)
    cu_seqlens_k = checks.check_packing(name, "k", cu_seqlens_k, max_seqlen_k, key.shape[0], query.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{name}: cu_seqlens_q and cu_seqlens_k must count the same sequences, got {cu_seqlens_q.shape[0] - 1} and "
            f"{cu_seqlens_k.shape[0] - 1}"
        )
    call = AttentionCall(
        scale=checks.check_scale(name, query, scale),
        e=e if e_tensor is None else e_tensor,
        lower_right=lower_right,
        left=left,
        right=right,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        alibi=checks.check_alibi(name, query, alibi_slopes, (cu_seqlens_q.shape[0] - 1, query.shape[1])),
        softcap=checks.check_softcap(name, softcap),
        sink=checks.check_sink(name, query, sink, query.shape[1]),
        dropout_p=dropout_p,
        seed=draw_seed(dropout_p, query.device) if draws else None,
    )
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    return query, key, value, call


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """What decides which weights are dropped, from torch's generator of the device."""
    return torch.randint(2**32, (2,), dtype=torch.int64, device=device) if dropout_p > 0 else None
