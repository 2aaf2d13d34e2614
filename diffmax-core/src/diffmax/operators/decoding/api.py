"""`attention_with_kvcache` and `page_bounds`: public functions. The next step is `operators.decoding.operator`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from diffmax.machine.dispatch import selected
from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention import checks as attention_checks
from diffmax.operators.common.autocast import autocast
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_flag
from diffmax.operators.common.numerics import clamp_e
from diffmax.operators.decoding import checks
from diffmax.operators.decoding import operator as decoding_operator
from diffmax.plugin import TILE, KVCacheCall
from diffmax.reference import decoding as reference_decoding


class PageBounds(NamedTuple):
    """Elementwise smallest and largest key of each page of a cache, with which decoding skips pages; and keys in 4 bits.

    `attention_with_kvcache` updates them when it appends. After any other write to the cache, compute them again with
    `page_bounds`. A truncated sequence needs no update: bounds that are too wide stay correct.

    Attributes:
        low, high: In the cache's dtype: (num_blocks, H_kv, D) for a paged cache, else (B_cache, pages, H_kv, D).
        page_size: Tokens per page.
        codes: None, or uint8 (..., H_kv, ceil(D / 2), page_size): the keys of each page in 4 bits, with which decoding skips
            single keys.
    """

    low: Tensor
    high: Tensor
    page_size: int
    codes: Tensor | None = None


class KVCacheStats(NamedTuple):
    """Per-query statistics of a decoding call.

    Attributes:
        tau: (B, H, L), the threshold of each query (Eq. 1), in the accumulation dtype; -inf for a fully masked query.
        support_size: int32 (B, H, L), the number of keys with a score above tau.
        pages_read: int32 (B, H_kv), the number of pages of which keys were read. If a kernel processes a chunk in several
            blocks of queries, this is the largest count of a block.
    """

    tau: Tensor
    support_size: Tensor
    pages_read: Tensor


class Options(NamedTuple):
    """What `attention_with_kvcache` takes besides queries, caches and new tokens, in its words."""

    cache_seqlens: int | Tensor | None
    cache_batch_idx: Tensor | None
    block_table: Tensor | None
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    alpha: float | Tensor
    sink: Tensor | None
    page_bounds: PageBounds | None
    cache_leftpad: Tensor | None


for _kind in (PageBounds, KVCacheStats):
    _kind.__module__ = "diffmax"  # the module name that pickles store


@alone_in_child
def page_bounds(
    k_cache: Tensor,
    cache_seqlens: int | Tensor,
    block_table: Tensor | None = None,
    page_size: int | None = None,
    bits: int | None = None,
) -> PageBounds:
    """Compute the page bounds of a filled cache, for `attention_with_kvcache(..., page_bounds=...)`.

    Args:
        k_cache, cache_seqlens, block_table: As in `attention_with_kvcache`; without `block_table`, sequence b is row b.
        page_size: Tokens per page. Default: 64, or with `block_table` the size of its pages, which must then be the one given.
            Smaller pages have tighter bounds, but there are more of them. A page is no longer than the cache, or 64.
        bits: 4: keep the keys in 4 bits too, rounded between the bounds of their page. Then decoding reads these, and of the
            keys themselves only those that may have a weight. They take 1/8 of the bytes of float32 keys, 1/4 of bfloat16's.
            None: bounds alone.
    Returns:
        A `PageBounds`, on the cache's device. Empty pages have bounds of 0.
    Raises:
        TypeError, ValueError: An argument has the wrong type, shape, device or value.
    Numerics: Exact. If a key holds NaN, so do the bounds of its page, which is then always read.
    Source: docs/decoding.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> k_cache = torch.randn(2, 1000, 4, 16)
        >>> diffmax.page_bounds(k_cache, torch.tensor([1000, 3], dtype=torch.int32)).low.shape
        torch.Size([2, 16, 4, 16])
    """
    name = "diffmax.page_bounds"
    checks.check_cache(name, "k_cache", k_cache)
    checks.check_bits(name, bits)
    block_table = checks.check_block_table(name, block_table, k_cache, None)
    of_cache = TILE if block_table is None else k_cache.shape[1]
    page_size = of_cache if page_size is None else checks.check_page_size(name, page_size)
    if block_table is not None and page_size != of_cache:
        raise ValueError(f"{name}: page_size must be that of the cache's pages, {of_cache}, got {page_size}\nleave it out")
    if block_table is None and page_size > TILE:  # one page holds the whole cache then
        page_size = min(page_size, max(k_cache.shape[1], TILE))
    batch = k_cache.shape[0] if block_table is None else block_table.shape[0]
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = checks.check_lengths(name, cache_seqlens, batch, room, None, k_cache)
    checks.check_pages(name, block_table, lengths, 0, k_cache)
    call = KVCacheCall(
        scale=1.0,
        e=1.0,
        cache_seqlens=lengths,
        block_table=block_table,
        page_size=page_size,
    )
    k_cache = k_cache.detach()
    low, high = reference_decoding.bounds_of(k_cache, call)
    return PageBounds(low, high, page_size, None if bits is None else reference_decoding.codes_of(k_cache, call, low, high))


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alpha: float | Tensor = 0.9,
    sink: Tensor | None = None,
    page_bounds: PageBounds | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, KVCacheStats] | tuple[Tensor, Tensor]:
    """Attention of new tokens over a KV cache: flash-attn's `flash_attn_with_kvcache` with an alpha.

    out_i = sum_j P_ij v_j,  P_i = diffmax(scale * (q_i . k_j) over the keys j that query i sees)   (Eq. 1)

    With `k` and `v` the caches are modified in place: the new tokens are appended to each sequence before attention.
    With `page_bounds`, pages or single keys that cannot have a weight are skipped; the result is the same.

    Args:
        q: (B, L, H, D), one new token or a chunk. float16, bfloat16, float32 or float64.
        k_cache, v_cache: (B_cache, S, H_kv, D) and (B_cache, S, H_kv, D_v), of q's dtype, any strides; with `block_table`
            (num_blocks, page_size, H_kv, D) and (num_blocks, page_size, H_kv, D_v). H is a multiple of H_kv, and query head h
            reads key/value head h // (H / H_kv). Entries after the end of a sequence are never read.
        k, v: (B, L_new, H_kv, D) and (B, L_new, H_kv, D_v), or None: new tokens to append, usually the tokens of q.
        cache_seqlens: int32 (B,), or one int for all: tokens in the cache before the call. None: the cache is full
            (not with `k` and `v`).
        cache_batch_idx: int32 (B,), the cache row of each sequence, all different; None: sequence b is row b.
            Not with `block_table`.
        block_table: int32 (B, pages), the pages of each sequence in order. Entries after its last page may be anything.
            Sequences may share pages, except pages that new tokens are written to. On an accelerator the entries in use are
            not checked.
        softmax_scale: Factor of the scores; None: 1 / sqrt(D).
        causal: Each query sees the keys up to its position; the last query has the position of the last key.
        window_size: (left, right): number of keys visible before and after the position of the query; -1: unlimited.
        softcap: c > 0 replaces each score x by c * tanh(x / c); 0: off.
        alibi_slopes: float32 (H,) or (B, H): slope * abs(distance) is subtracted from the scores (ALiBi).
        alpha: Shape parameter, 0 < alpha < 1; smaller is sparser. A float, or a tensor () or (H,), which may hold 0 and 1.
        sink: (H,), an extra score per head, whose weight is discarded (attention sink); or None.
        page_bounds: The result of `diffmax.page_bounds` for this cache, or None: then all keys are read. With `bits=4` single
            keys are skipped, not pages.
        return_stats: Whether to return a `KVCacheStats` too.
        backend: A name from `diffmax.backends()`; it never falls back to another. None: the best one that can run the call.
        cache_leftpad: int32 (B,), the left padding of each sequence, counted in `cache_seqlens`. It is not visible, and may
            hold anything.
        rotary_cos, rotary_sin: Must be None: rotate q and k before the call. `rotary_interleaved` has no effect.
        num_splits: No effect.
        return_softmax_lse: Whether to return tau too, (B, H, L), the counterpart of the log-sum-exp of softmax.
    Returns:
        (B, L, H, D_v), contiguous, in q's dtype; and the stats or tau, if requested. A fully masked query returns zeros. A
        query with a visible score of NaN or +inf returns NaN.
    Raises:
        TypeError, ValueError: An argument has the wrong type, shape, device or value, or new tokens do not fit. Values on an
            accelerator are not read: there, tokens that do not fit are neither written nor visible.
        NotImplementedError: An argument requires a gradient, and gradients are on.
        NoBackendError: No backend can run the call, or the named one cannot.
    Numerics: As of `diffmax.attention`. Exact with and without bounds: a page is skipped only if its bound, including rounding
        errors, lies below a lower bound of tau.
    Source: docs/decoding.md. Written for diffmax; the argument names are flash-attn's.
    Example:
        >>> import torch, diffmax
        >>> k_cache, v_cache = torch.zeros(2, 2, 512, 4, 16).unbind()
        >>> q, k, v = torch.randn(2, 1, 8, 16), *torch.randn(2, 2, 1, 4, 16).unbind()
        >>> lengths = torch.tensor([100, 7], dtype=torch.int32)
        >>> diffmax.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True).shape
        torch.Size([2, 1, 8, 16])
    """
    options = Options(
        *(cache_seqlens, cache_batch_idx, block_table, softmax_scale, causal, window_size),
        *(softcap, alibi_slopes, alpha, sink, page_bounds, cache_leftpad),
    )
    if is_captured(q, k_cache, v_cache, k, v, *options):
        unserved = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "num_splits": num_splits}
        more = {"return_softmax_lse": return_softmax_lse, "return_stats": return_stats, "backend": backend}
        return captured(  # type: ignore[no-any-return]
            attention_with_kvcache, q, k_cache, v_cache, k, v, **options._asdict(), **unserved, **more
        )
    for what, flag in (("return_softmax_lse", return_softmax_lse), ("return_stats", return_stats)):
        check_flag("diffmax.attention_with_kvcache", what, flag)
    checks.check_unserved("diffmax.attention_with_kvcache", rotary_cos, rotary_sin, num_splits)
    if return_softmax_lse and return_stats:
        raise ValueError(
            "diffmax.attention_with_kvcache: return_softmax_lse and return_stats exclude each other, got both\n"
            "the stats have tau, which the former returns"
        )
    q, k_cache, v_cache, call = build_call(q, k_cache, v_cache, k, v, options)
    out, m, delta, support, pages = decoding_operator.attention_kvcache(
        q, k_cache, v_cache, call, return_stats, selected(backend)
    )
    if not (return_stats or return_softmax_lse):
        return out
    row_e = clamp_e(call.e.unsqueeze(1) if isinstance(call.e, Tensor) else call.e)
    tau = m - (1 - delta) / row_e
    return (out, tau) if return_softmax_lse else (out, KVCacheStats(tau, support, pages))


def build_call(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    options: Options,
    name: str = "diffmax.attention_with_kvcache",
) -> tuple[Tensor, Tensor, Tensor, KVCacheCall]:
    """Check the arguments of `attention_with_kvcache`, and build the call from them."""
    block_table, alpha, sink = options.block_table, options.alpha, options.sink
    checks.check_cache(name, "q", q)
    checks.check_cache(name, "k_cache", k_cache)
    q = _as_cached(q, k_cache)
    k, v = None if k is None else _as_cached(k, k_cache), None if v is None else _as_cached(v, k_cache)
    checks.check_tensors(name, q, k_cache, v_cache, k, v, block_table is not None)
    checks.check_gradients(q, k_cache, v_cache, k, v, alpha, sink, options.alibi_slopes)
    batch, _, heads, _ = q.shape
    e, e_tensor = attention_checks.check_alpha(name, q, alpha, heads)
    left, right = attention_checks.check_window(name, options.window_size, options.causal, "causal")
    block_table = checks.check_block_table(name, block_table, k_cache, batch)
    new = None if k is None else k.shape[1]
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    slopes = attention_checks.check_alibi(name, q, options.alibi_slopes, (batch, heads))
    low, high, page_size, codes = checks.check_bounds(name, options.page_bounds, k_cache, block_table)
    lengths = checks.check_lengths(name, options.cache_seqlens, batch, room, new, q)
    checks.check_pages(name, block_table, lengths, new or 0, k_cache)
    rows = checks.check_rows(name, options.cache_batch_idx, batch, k_cache, block_table)
    call = KVCacheCall(
        scale=attention_checks.check_scale(name, q, options.softmax_scale),
        e=e if e_tensor is None else e_tensor,
        cache_seqlens=lengths,
        k=k,
        v=v,
        cache_batch_idx=rows,
        block_table=block_table,
        low=low,
        high=high,
        page_size=page_size,
        left=left,
        right=right,
        softcap=attention_checks.check_softcap(name, options.softcap),
        alibi=slopes if slopes is None or slopes.ndim == 2 else slopes.unsqueeze(0),
        sink=attention_checks.check_sink(name, q, sink, heads),
        leftpad=checks.check_leftpad(name, options.cache_leftpad, lengths, q.device),
        codes=codes,
    )
    return q, k_cache, v_cache, call


def _as_cached(t: Tensor, k_cache: Tensor) -> Tensor:
    """New tokens in autocast's dtype, if the cache has that dtype."""
    (converted,) = autocast(t)
    return converted if isinstance(t, Tensor) and converted.dtype == k_cache.dtype else t
