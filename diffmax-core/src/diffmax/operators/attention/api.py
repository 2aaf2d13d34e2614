"""`attention` and `attention_varlen`: what they mean, and their arguments checked. Next: `operator`.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from diffmax.machine.dispatch import selected
from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention import checks
from diffmax.operators.attention import operator as attention_operator
from diffmax.operators.common import nested, watch
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.numerics import clamp_e
from diffmax.operators.decoding.paged import from_pages
from diffmax.plugin import TILE, AttentionCall
from diffmax.reference.attention import live_shape, unpacked_bits

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias


class AttentionStats(NamedTuple):
    """What an attention call found on its way. None of it has a gradient.

    Attributes:
        tau: (B, H, L), each query's threshold (Eq. 1), in the accumulation dtype; -inf where nothing is seen. For packed
            sequences (T, H).
        support_size: Like tau, int32: how many keys have a score above tau.
        tile_sparsity: (B, H), for packed sequences (H,), float32: of the 64 x 64 tiles of queries and keys that causality and
            window leave, the share without a single weight. Tiles that a mask hides count as such.
    """

    tau: Tensor
    support_size: Tensor
    tile_sparsity: Tensor


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
    backend: str | None = None,
) -> tuple[Tensor, AttentionStats]: ...


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Attention with diffmax weights: `torch.nn.functional.scaled_dot_product_attention`, and alpha.

    out_i = sum_j P_ij v_j,  P_i = diffmax(scale * (q_i . k_j) over the keys j that query i sees)   (Eq. 1, Eq. 5)

    Scores are scaled, then capped, then added to (`attn_mask`, `alibi_slopes`), then hidden. The weights are solved, the sink
    among them, and dropped last.

    Scores and weights are not held in memory (the `reference` backend does), and where weights are zero work is skipped.

    Args:
        query: (B, H, L, D), any strides. float16, bfloat16, float32 or float64. Under autocast it is converted as torch would.
        key, value: (B, H, S, D) and (B, H, S, D_v), of query's dtype. They may be one tensor, and the query too. As in torch
            there may be more dimensions before H, or fewer, down to (L, D); and sizes of 1 before L, which the others share. Or
            all three are nested tensors (B, H, j, D), without attn_mask: then each sequence is on its own.
        attn_mask: Broadcasts to (B, H, L, S) and holds together with `is_causal` and `window_size`. Boolean: True where a key
            is seen. Floating, in query's dtype or float32: added to the scores, where -inf hides; may require a gradient. Or
            one of torch.nn.attention.bias's `causal_upper_left(L, S)` and `causal_lower_right(L, S)`.
        dropout_p: Probability with which a weight is set to 0; the others are divided by 1 - dropout_p. Which
            ones follows from two numbers that torch's generator draws, and is the same on every backend. Like torch's own
            attention this drops whenever it is not 0: pass 0.0 in evaluation.
        is_causal: Query i sees the keys 0 to i, or i + S - L with `causal_alignment="lower_right"`.
        scale: Factor of the scores; None: 1 / sqrt(D).
        enable_gqa: key and value may have H_kv heads, of which H is a multiple; query head h reads head h // (H / H_kv).
        alpha: Shape parameter, 0 < alpha < 1; smaller is sparser. A float; or a tensor () or (H,), one per head, that may
            require a gradient and may hold 0 and 1 themselves (sparsemax and softmax). Under torch.compile every new float is a
            new graph: pass a tensor if it changes.
        window_size: (left, right): how many keys before and after its own place a query sees, -1 for all. Its place is
            aligned like causality's. `is_causal` makes right 0.
        causal_alignment: "upper_left", where query i stands at key i, as in torch; or "lower_right", where the last query
            stands at the last key, as in flash-attn.
        alibi_slopes: (H,) or (B, H): key j loses slope * abs(i' - j) of its score, where i' is query i's place, aligned like
            causality's. No gradient: for slopes that learn pass the bias as attn_mask.
        softcap: A score x becomes softcap * tanh(x / softcap), which lies between the two signs of softcap; 0: off.
        sink: (H,): a score that every query of a head sees besides the keys', and whose weight goes to no value; may require a
            gradient. It is not scaled, capped or masked. A null slot is `torch.zeros(H)`.
        return_stats: Whether to return an `AttentionStats` too: thresholds, support sizes, the share of empty tiles.
        backend: A name from `diffmax.backends()`, which never falls back. None: what `use_backend` or DIFFMAX_BACKEND says,
            else the best one that can run the call.
    Returns:
        (B, H, L, D_v), contiguous, in query's dtype, or nested as the query; and the stats, if asked for. A query that sees no
        key gets zeros, and passes no gradient on. A query with NaN or +inf among the scores that it sees gets NaN.
    Raises:
        TypeError: An argument has the wrong type, or the dtypes differ.
        ValueError: Shapes, devices or values do not fit. The values of an alpha that lives on an accelerator, or under
            torch.compile, are not read: heads whose alpha lies outside [0, 1] are NaN.
        NoBackendError: No backend can run the call, or the named one cannot.
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
    if is_captured(query, key, value, attn_mask, alpha, alibi_slopes, sink):
        return captured(  # type: ignore[no-any-return]
            attention,
            *(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa),
            alpha=alpha,
            window_size=window_size,
            causal_alignment=causal_alignment,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            sink=sink,
            return_stats=return_stats,
            backend=backend,
        )
    q, k, v, call = checked(
        *(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa),
        alpha=alpha,
        window_size=window_size,
        causal_alignment=causal_alignment,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sink=sink,
    )
    out, stats = _attend(q, k, v, call, return_stats, backend)
    if call.cu_seqlens_q is not None:
        out, stats = _as_nested(query, out, stats)
    elif not query.ndim == key.ndim == value.ndim == 4:
        out, stats = _as_given((query, key, value), out, stats)
    return out if stats is None else (out, stats)


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """`attention` over packed sequences, each on its own: flash-attn's `flash_attn_varlen_func`, and alpha.

    Args:
        query: (T_q, H, D): the tokens of all sequences, one after the other.
        key, value: (T_k, H_kv, D) and (T_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,), on query's device: where each sequence begins, and the end: 0, then sums of
            lengths. A sequence may have 0 tokens.
        max_seqlen_q, max_seqlen_k: At least the longest sequence's length. A larger number costs nothing but memory in
            `reference`.
        is_causal, window_size: As in `attention`, where the last query stands at the last key of its sequence.
        alibi_slopes: (H,), as in `attention`, with the same places; or (N, H), for each sequence its own, which are then
            computed one by one, after a look at cu_seqlens.
        block_table: int32 (N, pages): key and value are then (num_blocks, page_size, H_kv, D) and (num_blocks, page_size, H_kv,
            D_v), and row n has the pages of sequence n in order, of which cu_seqlens_k says how many tokens count. They are
            copied out of their pages. Entries behind a sequence's last page may be anything.
        dropout_p, scale, enable_gqa, alpha, softcap, sink, return_stats, backend: As in `attention`.
    Returns:
        (T_q, H, D_v), contiguous; and the stats, if asked for.
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
    if is_captured(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alpha, alibi_slopes, sink):
        return captured(  # type: ignore[no-any-return]
            attention_varlen,
            *(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            alpha=alpha,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            sink=sink,
            block_table=block_table,
            return_stats=return_stats,
            backend=backend,
        )
    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "alpha": alpha,
        "window_size": window_size,
        "softcap": softcap,
        "sink": sink,
        "block_table": block_table,
    }
    packed = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.ndim == 2:
        return _one_by_one(*packed, alibi_slopes, options | {"return_stats": return_stats, "backend": backend})
    query, key, value, call = checked_varlen(*packed, alibi_slopes=alibi_slopes, **options)
    out, stats = _attend(query, key, value, call, return_stats, backend)
    out, stats = _by_token(out, stats)
    return out if stats is None else (out, stats)


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    slopes: Tensor,
    options: dict[str, Any],
) -> Tensor | tuple[Tensor, AttentionStats]:
    """`attention_varlen` with slopes (N, H), for which no kernel has a place: each sequence alone."""
    how = {"return_stats": options.pop("return_stats"), "backend": options.pop("backend")}
    packed = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checked_varlen(*packed, alibi_slopes=slopes, draws=False, **options)
    if (table := options.pop("block_table")) is not None:
        key, value = from_pages("diffmax.attention_varlen", key, value, cu_seqlens_k, table)
    of_query, of_key, of_value = (
        torch.split(t, ends.diff().tolist()) for t, ends in ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k))
    )
    alone: Any = attention  # with stats or without
    results: list[Any] = [
        alone(*(t.transpose(0, 1) for t in one), causal_alignment="lower_right", alibi_slopes=own, **options, **how)
        for *one, own in zip(of_query, of_key, of_value, slopes, strict=True)
    ]
    if not how["return_stats"]:
        return torch.cat([out.transpose(0, 1) for out in results])
    outs, stats = zip(*results, strict=True)
    tau, support, _ = ([t.T if t.ndim == 2 else t for t in one] for one in zip(*stats, strict=True))
    unknown = torch.full(query.shape[1:2], torch.nan, device=query.device)  # how many tiles each had
    return torch.cat([out.transpose(0, 1) for out in outs]), AttentionStats(torch.cat(tau), torch.cat(support), unknown)


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | CausalBias | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    alpha: float | Tensor,
    window_size: tuple[int, int] | None,
    causal_alignment: str,
    alibi_slopes: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    draws: bool = True,
) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
    """The tensors and the call that `attention`'s arguments mean. `draws`: whether dropout's seed is drawn."""
    name = "diffmax.attention"
    if any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
        nested.check_all(name, query, key, value, attn_mask)
        queries, keys, values = (nested.pack(name, what, t) for what, t in (("query", query), ("key", key), ("value", value)))
        nested.check_same_lengths(name, keys, values)
        return checked_varlen(
            *(queries.tokens, keys.tokens, values.tokens, queries.ends, keys.ends, queries.longest, keys.longest),
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            alpha=alpha,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            sink=sink,
            draws=draws,
            lower_right=checks.check_alignment(name, causal_alignment),
            name=name,
        )
    query, key, value = _autocast(query, key, value)
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
        seed=_seed(dropout_p, query.device) if draws else None,
    )
    return query, key, value, call


def checked_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    alpha: float | Tensor,
    window_size: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    softcap: float,
    sink: Tensor | None,
    block_table: Tensor | None = None,
    draws: bool = True,
    lower_right: bool = True,
    name: str = "diffmax.attention_varlen",
) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
    """As `checked`, of `attention_varlen`'s; the tensors are (1, H, T, D)."""
    if block_table is not None:
        key, value = from_pages(name, key, value, cu_seqlens_k, block_table)
    query, key, value = _autocast(query, key, value)
    checks.check_tensors(name, query, key, value, "THD")
    query, key, value, dropout_p, scale = checks.served(name, query, key, value, dropout_p, scale)
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
        seed=_seed(dropout_p, query.device) if draws else None,
    )
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    return query, key, value, call


@alone_in_child
def _by_token(out: Tensor, stats: AttentionStats | None) -> tuple[Tensor, AttentionStats | None]:
    """(1, H, T, D) as (T, H, D), and the stats likewise."""
    out = out[0].transpose(0, 1).contiguous()
    return out, stats and AttentionStats(stats.tau[0].T, stats.support_size[0].T, stats.tile_sparsity[0])


def _as_nested(query: Tensor, out: Tensor, stats: AttentionStats | None) -> tuple[Tensor, AttentionStats | None]:
    """(1, H, T, D) as the query is nested, and the stats likewise."""
    out, stats = _by_token(out, stats)
    if stats is not None:
        tau, support = (nested.like(query, t.contiguous()) for t in (stats.tau, stats.support_size))
        stats = AttentionStats(tau, support, stats.tile_sparsity)
    return nested.like(query, out), stats


def _as_given(given: tuple[Tensor, ...], out: Tensor, stats: AttentionStats | None) -> tuple[Tensor, AttentionStats | None]:
    """(B, H, L, D) with as many dimensions as the given tensors have, and the stats likewise."""
    batch: torch.Size = torch.broadcast_shapes(*(t.shape[:-3] for t in given))  # type: ignore[no-untyped-call]
    leading = (*batch, out.shape[1]) if any(t.ndim > 2 for t in given) else ()

    def shaped(t: Tensor) -> Tensor:
        return t.reshape((*leading, *t.shape[2:]))

    return shaped(out), stats and AttentionStats(*map(shaped, stats))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, return_stats: bool, backend: str | None
) -> tuple[Tensor, AttentionStats | None]:
    out, m, delta, _, live, support = attention_operator.attention(
        query, key, value, bool(return_stats), call, selected(backend)
    )
    if not torch.compiler.is_compiling():
        for watcher in watch.watchers:
            watcher.saw_attention(query, key, value, call)
    if not return_stats:
        return out, None
    row_e = clamp_e(call.e.detach().unsqueeze(1) if isinstance(call.e, Tensor) else call.e)
    return out, AttentionStats(m - (1 - delta) / row_e, support, _tile_sparsity(query, key, live, call))


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """What decides which weights are dropped, from torch's generator of the device."""
    return torch.randint(2**32, (2,), dtype=torch.int64, device=device) if dropout_p > 0 else None


def _tile_sparsity(query: Tensor, key: Tensor, live: Tensor, call: AttentionCall) -> Tensor:
    """The share of empty tiles, by head, of those that causality and window leave."""
    if live.ndim == 1:
        return torch.full(query.shape[:2], torch.nan, device=query.device)  # this backend does not know
    tiles = torch.sym_max(2, live_shape(query, key, call)[2])  # type: ignore[no-untyped-call]  # one too many counts nothing
    row = torch.arange(tiles, device=query.device)
    if call.cu_seqlens_q is None:
        length, keys, tile = torch.full_like(row, query.shape[2]), torch.full_like(row, key.shape[2]), row
    else:
        first = call.cu_seqlens_q[:-1] // TILE + torch.arange(len(call.cu_seqlens_q) - 1, device=query.device)
        sequence = (torch.searchsorted(first, row, right=True) - 1).clamp_min(0)
        length, keys = (ends.diff()[sequence] for ends in (call.cu_seqlens_q, call.cu_seqlens_k) if ends is not None)
        tile = row - first[sequence]
    last_row = torch.minimum(tile * TILE + TILE, length) - 1
    shift = keys - length if call.lower_right else torch.zeros_like(row)
    low = tile * TILE + shift - call.left if call.left >= 0 else torch.zeros_like(tile)
    high = last_row + shift + call.right if call.right >= 0 else keys
    low, high = low.clamp_min(0), torch.minimum(high, keys - 1)
    left = torch.where((high >= low) & (tile * TILE <= last_row), high // TILE - low // TILE + 1, 0).sum()
    full = unpacked_bits(live).sum(2)
    return 1 - full / left.clamp_min(1).float()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's own attention computes with under autocast."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in tensors)
