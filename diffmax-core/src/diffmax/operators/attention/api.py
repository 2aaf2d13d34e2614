"""`attention` and `attention_varlen`: what they mean, and their arguments checked. Next: `operator`.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from diffmax.machine.dispatch import selected
from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention import operator as attention_operator
from diffmax.operators.attention.call import Options, build_call, build_packed_call
from diffmax.operators.attention.stats import AttentionStats, tile_sparsity
from diffmax.operators.attention.weights import SparseWeights, check_request, sparse_weights
from diffmax.operators.common import nested, watch
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_flag
from diffmax.operators.common.numerics import clamp_e
from diffmax.operators.common.parts import warn_of_part
from diffmax.operators.decoding.paged import from_pages
from diffmax.plugin import AttentionCall

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

Extra: TypeAlias = "AttentionStats | SparseWeights | None"


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | CausalBias | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    window_size: tuple[int, int] | None = None,
    causal_alignment: str = "upper_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    return_stats: Literal[False] = False,
    return_weights: None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | CausalBias | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    window_size: tuple[int, int] | None = None,
    causal_alignment: str = "upper_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    return_stats: Literal[True],
    return_weights: None = None,
    backend: str | None = None,
) -> tuple[Tensor, AttentionStats]: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | CausalBias | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    window_size: tuple[int, int] | None = None,
    causal_alignment: str = "upper_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    return_stats: Literal[False] = False,
    return_weights: Literal["sparse"],
    backend: str | None = None,
) -> tuple[Tensor, SparseWeights]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | CausalBias | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | Tensor = 0.9,
    window_size: tuple[int, int] | None = None,
    causal_alignment: str = "upper_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    return_stats: bool = False,
    return_weights: Literal["sparse"] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionStats] | tuple[Tensor, SparseWeights]:
    """Attention with diffmax weights: `torch.nn.functional.scaled_dot_product_attention` with an alpha.

    out_i = sum_j P_ij v_j,  P_i = diffmax(scale * (q_i . k_j) over the keys j that query i sees)   (Eq. 1, Eq. 5)

    Order: scale, softcap, additive terms (`attn_mask`, `alibi_slopes`), masking, normalization including the sink, dropout.

    Scores and weights are not held in memory (except by the `reference` backend), and work for zero weights is skipped.

    Args:
        query: (B, H, L, D), any strides. float16, bfloat16, float32 or float64. Under autocast it is converted as torch would.
        key, value: (B, H, S, D) and (B, H, S, D_v), of query's dtype. They may be the same tensor, also as query. As in
            torch there may be more dimensions before H, or fewer, down to (L, D), and dimensions before L broadcast. Or all
            three are nested tensors (B, H, j, D), without attn_mask: then each sequence attends to itself.
        attn_mask: Broadcasts to (B, H, L, S) and is combined with `is_causal` and `window_size`. Boolean: True where a key is
            visible. Floating, in query's dtype or float32: added to the scores, -inf masks; may require a gradient. Or
            one of torch.nn.attention.bias's `causal_upper_left(L, S)` and `causal_lower_right(L, S)`.
        dropout_p: Probability with which a weight is set to 0; the others are divided by 1 - dropout_p. The
            keep mask follows from a seed of torch's generator, and is the same on every backend. As in torch's attention,
            dropout is applied whenever it is not 0: pass 0.0 in evaluation.
        is_causal: Query i sees the keys 0 to i, or i + S - L with `causal_alignment="lower_right"`.
        scale: Factor of the scores; None: 1 / sqrt(D).
        enable_gqa: key and value may have H_kv heads, where H_kv divides H; query head h reads key/value head h // (H / H_kv).
        alpha: Shape parameter, 0 < alpha < 1; smaller is sparser. A float; or a tensor () or (H,), one per head, that may
            require a gradient and may hold 0 and 1 themselves (sparsemax and softmax). Under torch.compile every new float is a
            new graph: pass a tensor if it changes.
        window_size: (left, right): number of keys visible before and after the position of the query; -1: unlimited. The
            position is aligned as for causality. `is_causal` sets right to 0.
        causal_alignment: "upper_left": query i has position i, as in torch; or "lower_right": the last query has the position
            of the last key, as in flash-attn.
        alibi_slopes: (H,) or (B, H): subtracts slope * abs(i' - j) from the score of key j, where i' is the position of
            query i, aligned as for causality. No gradient: for learned slopes pass the bias as attn_mask.
        softcap: A score x becomes softcap * tanh(x / softcap), which lies in (-softcap, softcap); 0: off.
        sink: (H,): an extra score per head, whose weight is discarded (attention sink); may require a gradient. It is not
            scaled, capped or masked. A null sink is `torch.zeros(H)`.
        return_stats: Whether to return an `AttentionStats` too: thresholds, support sizes, the share of empty tiles.
        return_weights: "sparse": return the nonzero weights too, as `SparseWeights`, without gradients. They cost the scores
            once more, and memory for the weights and one block of scores. Not with dropout, return_stats or nested tensors.
        backend: A name from `diffmax.backends()`, which never falls back. None: what `use_backend` or DIFFMAX_BACKEND says,
            else the best one that can run the call.
    Returns:
        (B, H, L, D_v), contiguous, in query's dtype, or nested as the query; and the stats or the weights, if requested. A
        fully masked query returns zeros and propagates no gradient. A query with a visible score of NaN or +inf returns NaN. A
        NaN or an infinity in a key or a value that is hidden may reach results, since a backend may multiply it by 0.
    Raises:
        TypeError: An argument has the wrong type, or the dtypes differ.
        ValueError: Shapes, devices or values do not fit. The values of an alpha that lives on an accelerator, or under
            torch.compile, are not read: heads whose alpha lies outside [0, 1] are NaN.
        NoBackendError: No backend can run the call, or the named one cannot.
        NotImplementedError: return_weights under torch.func or a tracer, or of tensors that are not plain.
    Numerics: Scores, weights and sums are computed in float32, for float64 in float64, from inputs as they are. Gradients by
        Eq. 5, for a tensor alpha too. Second derivatives, forward mode, and gradients under torch.func are right, and computed
        with all scores in memory (docs/transforms.md). On the CPU the same input gives the same bits.
    Source: docs/attention.md, docs/theory.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> query, key, value = torch.randn(3, 2, 4, 100, 16).mul(3).unbind()
        >>> out, stats = diffmax.attention(query, key, value, is_causal=True, alpha=0.5, return_stats=True)
        >>> out.shape, stats.support_size.shape
        (torch.Size([2, 4, 100, 16]), torch.Size([2, 4, 100]))
    """
    options = Options(dropout_p, is_causal, scale, enable_gqa, alpha, window_size, alibi_slopes, softcap, sink)
    if is_captured(query, key, value, attn_mask, *options):
        more: dict[str, Any] = {"causal_alignment": causal_alignment, "return_stats": return_stats, "backend": backend}
        if return_weights is not None:
            more["return_weights"] = return_weights
        return captured(attention, query, key, value, attn_mask, **options._asdict(), **more)  # type: ignore[no-any-return]
    wants = return_weights is not None and check_request(
        "diffmax.attention", return_weights, return_stats, dropout_p, (query, key, value, alpha, sink)
    )
    warn_of_part("diffmax.attention")
    q, k, v, call = build_call(query, key, value, attn_mask, options, causal_alignment)
    out, extra = _attend(q, k, v, call, return_stats, wants, backend)
    if call.cu_seqlens_q is not None:
        out, extra = _as_nested(query, out, extra)
    elif not query.ndim == key.ndim == value.ndim == 4:
        out, extra = _as_given((query, key, value), out, extra)
    return out if extra is None else (out, extra)  # type: ignore[return-value]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    alpha: float | Tensor = 0.9,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    block_table: Tensor | None = None,
    return_stats: bool = False,
    return_weights: Literal["sparse"] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionStats] | tuple[Tensor, SparseWeights]:
    """`attention` over packed sequences, independently: flash-attn's `flash_attn_varlen_func` with an alpha.

    Args:
        query: (T_q, H, D): the tokens of all sequences, one after the other.
        key, value: (T_k, H_kv, D) and (T_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,), on query's device: the sequence starts and the end, that is 0 and the
            cumulative lengths. A sequence may have 0 tokens.
        max_seqlen_q, max_seqlen_k: At least the longest sequence's length. A larger number costs nothing but memory in
            `reference`.
        is_causal, window_size: As in `attention`, aligned at the lower right of each sequence.
        alibi_slopes: (H,), as in `attention`, with the same places; or (N, H), for each sequence its own, which are then
            computed one by one, after a look at cu_seqlens.
        block_table: int32 (N, pages): key and value are then (num_blocks, page_size, H_kv, D) and (num_blocks, page_size, H_kv,
            D_v), and row n has the pages of sequence n in order, of which cu_seqlens_k says how many tokens count. They are
            copied out of their pages. Entries after the last page of a sequence may be anything.
        return_weights: As in `attention`: weights of shape (H, T_q, T_k). Not with alibi_slopes (N, H).
        dropout_p, scale, enable_gqa, alpha, softcap, sink, return_stats, backend: As in `attention`.
    Returns:
        (T_q, H, D_v), contiguous; and the stats or the weights, if asked for.
    Raises:
        TypeError, ValueError, NoBackendError: As in `attention`; or cu_seqlens do not ascend from 0 to
            the number of tokens, which is looked at on the CPU alone.
    Numerics: As in `attention`.
    Source: docs/attention.md, docs/theory.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> tokens = torch.randn(12, 4, 16)  # sequences of 5 and 7 tokens, 4 heads
        >>> ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> diffmax.attention_varlen(tokens, tokens, tokens, ends, ends, 7, 7, is_causal=True).shape
        torch.Size([12, 4, 16])
    """
    packed = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = Options(dropout_p, is_causal, scale, enable_gqa, alpha, window_size, alibi_slopes, softcap, sink)
    if is_captured(*packed, *options):
        more: dict[str, Any] = {"block_table": block_table, "return_stats": return_stats, "backend": backend}
        if return_weights is not None:
            more["return_weights"] = return_weights
        return captured(attention_varlen, *packed, **options._asdict(), **more)  # type: ignore[no-any-return]
    wants = return_weights is not None and check_request(
        "diffmax.attention_varlen", return_weights, return_stats, dropout_p, (query, key, value, alpha, sink), alibi_slopes
    )
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.ndim == 2:
        return _one_by_one(*packed, alibi_slopes, options, block_table, return_stats, backend)
    query, key, value, call = build_packed_call(*packed, options, block_table)
    out, extra = _attend(query, key, value, call, return_stats, wants, backend)
    out, extra = _by_token(out, extra)
    return out if extra is None else (out, extra)  # type: ignore[return-value]


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    slopes: Tensor,
    options: Options,
    block_table: Tensor | None,
    return_stats: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """`attention_varlen` with slopes (N, H), which no kernel supports: one sequence at a time."""
    packed = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    build_packed_call(*packed, options, block_table, draws=False)
    if block_table is not None:
        key, value = from_pages("diffmax.attention_varlen", key, value, cu_seqlens_k, block_table)
    of_query, of_key, of_value = (
        torch.split(t, ends.diff().tolist()) for t, ends in ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k))
    )
    more = {"causal_alignment": "lower_right", "return_stats": return_stats, "backend": backend}
    alone: Any = attention  # with stats or without
    results: list[Any] = [
        alone(*(t.transpose(0, 1) for t in one), **options._replace(alibi_slopes=own)._asdict(), **more)
        for *one, own in zip(of_query, of_key, of_value, slopes, strict=True)
    ]
    if not return_stats:
        return torch.cat([out.transpose(0, 1) for out in results])
    outs, stats = zip(*results, strict=True)
    tau, support, _ = ([t.T if t.ndim == 2 else t for t in one] for one in zip(*stats, strict=True))
    unknown = torch.full(query.shape[1:2], torch.nan, device=query.device)  # how many tiles each had
    return torch.cat([out.transpose(0, 1) for out in outs]), AttentionStats(torch.cat(tau), torch.cat(support), unknown)


@alone_in_child
def _by_token(out: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
    """(1, H, T, D) as (T, H, D), and what comes with it likewise; weights (1, H, T_q, T_k) as (H, T_q, T_k)."""
    out = out.squeeze(0).transpose(0, 1).contiguous()  # `out[0]` would fill its gradient with zeros first
    if isinstance(extra, AttentionStats):
        return out, AttentionStats(extra.tau[0].T, extra.support_size[0].T, extra.tile_sparsity[0])
    return out, extra and extra.reshaped(extra.shape[1:])


def _as_nested(query: Tensor, out: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
    """(1, H, T, D) as the query is nested, and the stats likewise."""
    out, extra = _by_token(out, extra)
    if isinstance(extra, AttentionStats):
        tau, support = (nested.like(query, t.contiguous()) for t in (extra.tau, extra.support_size))
        extra = AttentionStats(tau, support, extra.tile_sparsity)
    return nested.like(query, out), extra


def _as_given(given: tuple[Tensor, ...], out: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
    """(B, H, L, D) with as many dimensions as the given tensors have, and what comes with it likewise."""
    batch: torch.Size = torch.broadcast_shapes(*(t.shape[:-3] for t in given))  # type: ignore[no-untyped-call]
    leading = (*batch, out.shape[1]) if any(t.ndim > 2 for t in given) else ()

    def shaped(t: Tensor) -> Tensor:
        return t.reshape((*leading, *t.shape[2:]))

    if isinstance(extra, SparseWeights):
        return shaped(out), extra.reshaped((*leading, *extra.shape[2:]))
    return shaped(out), extra and AttentionStats(*map(shaped, extra))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, return_stats: bool, wants: bool, backend: str | None
) -> tuple[Tensor, Extra]:
    check_flag("diffmax.attention", "return_stats", return_stats)
    out, m, delta, _, live, support = attention_operator.attention(query, key, value, return_stats, call, selected(backend))
    if not torch.compiler.is_compiling():
        for watcher in watch.watchers:
            watcher.saw_attention(query, key, value, call, delta)
    if wants:
        return out, sparse_weights(query, key, call, delta)
    if not return_stats:
        return out, None
    row_e = clamp_e(call.e.detach().unsqueeze(1) if isinstance(call.e, Tensor) else call.e)
    return out, AttentionStats(m - (1 - delta) / row_e, support, tile_sparsity(query, key, live, call))
