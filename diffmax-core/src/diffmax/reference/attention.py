"""Attention in plain PyTorch: what the other kernels are measured against, and the fallback on any device.

The score matrix is held in memory, in the accumulation dtype. Nothing waits for a device. Equations: docs/theory.md,
section 11.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from diffmax import reference
from diffmax.operators.attention.packing import Packing, packings
from diffmax.operators.common.numerics import accumulation_dtype, alpha_weight, clamp_e
from diffmax.plugin import TILE, AttentionCall
from diffmax.reference.dropout import kept
from diffmax.reference.rows import _power

# Tiles whose bits share one int32 of `live`.
WORD = 32

Solve = Callable[[Tensor, "float | Tensor", int, int, bool], tuple[Tensor, Tensor, Tensor]]
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def attention(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool, solve: Solve = reference.bisect
) -> Forward:
    """Forward kernel.

    Args:
        query: (B, H, L, D), any strides.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), any strides. Query head h reads key head h // (H / H_kv).
        call: Scale, alpha, and who sees whom.
        keep: Whether a backward follows.
        stats: Whether support sizes and live tiles are asked for.
        solve: The row operator. One that autograd differentiates makes all of this differentiable.
    Returns:
        A `Forward`, contiguous tensors:

        - out (B, H, L, D_v), in value's dtype. A query that sees nothing gets zeros.
        - m, delta (B, H, L), in the accumulation dtype: each query's largest score, the sink's among them, and its delta,
          with tau = m - (1 - delta) / e. A query that sees nothing, without a sink, has -inf and 0; one whose result
          is NaN has delta NaN.
        - u, U of Eq. 5, like out; (0,) if not `keep`. A sink counts in the sum of s; dropout, in the values' weights alone.
        - live, int32 (B, H, ceil(L / TILE), ceil(S / TILE / WORD)): bit b of word w is clear only if no weight of that tile of
          queries with key tile w * WORD + b differs from 0. Of packed sequences, tiles begin with each sequence: tile i of
          sequence n has row cu_seqlens_q[n] // TILE + n + i of T // TILE + N, and max_seqlen_k takes S's place.
          (0,) if neither `keep` nor `stats`, or where the kernel does not know; a backward has to do without it.
        - support, int32 (B, H, L), how many scores lie above tau; (0,) if not `stats`.
    """
    if call.cu_seqlens_q is not None:
        return _packed_forward(query, key, value, call, keep, stats, solve)
    scores = masked_scores(query, key, call)
    e, keys = per_head(call.e), key.shape[2]
    p, m, delta = solve(with_sink(scores, call), e, 3, 200, True)
    m, delta = m.squeeze(3), delta.squeeze(3)
    row_e = e.squeeze(2) if isinstance(e, Tensor) else torch.full((), e, dtype=m.dtype, device=m.device)
    delta = delta.masked_fill(m.isnan() | (m == torch.inf) | ~((row_e >= 0) & (row_e <= 1)), torch.nan)

    passed = dropped(scores, call)
    out = weighted(times(p[..., :keys], passed), value).to(value.dtype)
    u = live = support = out.new_empty(0)
    if keep:
        s = torch.where(p != 0, torch.exp((1 - clamp_e(e)) * torch.where(p != 0, p, 1.0).log()), 0.0)
        total = s.sum(3, keepdim=True)
        u = weighted(times(s[..., :keys] / torch.where(total == 0, 1.0, total), passed), value).to(value.dtype)
    live = packed_bits(tiles_with(p[..., :keys] != 0)) if keep or stats else live.int()
    if stats:
        shift = torch.where(m == -torch.inf, 0.0, m)
        support = (clamp_e(e) * (scores - shift.unsqueeze(3)) > delta.unsqueeze(3) - 1).sum(3, dtype=torch.int32)
    return out, m, delta, u, live, support.int()


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    m: Tensor,
    delta: Tensor,
    u: Tensor,
    live: Tensor,
    call: AttentionCall,
    needs_e: bool,
    needs_bias: bool = False,
    needs_sink: bool = False,
) -> Backward:
    """Backward kernel: Eq. 5.

    Args:
        grad: Gradient for out, any strides.
        query, key, value, call: As for the forward.
        m, delta, u, live: What any forward kernel returned for them.
        needs_e, needs_bias, needs_sink: Whether the gradient for e, the bias or the sink is wanted.
    Returns:
        A `Backward`: gradients for query, key and value, contiguous, in their dtypes; for e per query, like m; for the bias, of
        its own shape, in the accumulation dtype; for the sink per query, like m. The last three are (0,) where not wanted.
        A query whose weights are all 0 passes nothing on, whatever it holds.
    """
    if call.cu_seqlens_q is not None:
        return _packed_backward(grad, query, key, value, m, delta, u, call, needs_e, needs_sink)
    acc, groups, keys = m.dtype, key.shape[1], key.shape[2]
    e = clamp_e(per_head(call.e))
    m, delta = m.unsqueeze(3), delta.unsqueeze(3)
    capped = capped_scores(query, key, call)
    scores = with_sink(masked_scores(query, key, call, capped), call)
    p, log_p, base = _power(e * (scores - torch.where(m == -torch.inf, 0.0, m)), delta, e)
    p, s = (weights.masked_fill(delta.isnan(), torch.nan) for weights in (p, p / base))
    silent = (s[..., :keys] == 0).all(3, keepdim=True)
    q, g = (t.to(acc).masked_fill(silent, 0.0) for t in (query, grad))
    passed = dropped(capped, call)
    d_p = times((grouped(g, groups) @ value.to(acc).mT).view(capped.shape), passed)
    centred = widened(d_p, s.shape[3]) - (g * u.to(acc)).sum(3, keepdim=True)  # the sink has no value
    d_s = s * centred
    grad_bias = grad_sink = grad_e = m.new_empty(0)
    if needs_e:
        grad_e = -(alpha_weight(p, log_p, e) * centred).sum(3)
    if needs_sink:
        grad_sink = d_s[..., keys].contiguous()
    d_s = d_s[..., :keys]
    if needs_bias and call.bias is not None:
        grad_bias = d_s.sum_to_size(call.bias.shape).contiguous()
    d_raw = grouped(d_s if call.softcap == 0 else d_s * cap_slope(capped, call).masked_fill(silent, 0.0), groups) * call.scale
    return (
        (d_raw @ key.to(acc)).view(query.shape).to(query.dtype),
        (d_raw.mT @ grouped(q, groups)).to(key.dtype),
        (grouped(times(p[..., :keys], passed), groups).mT @ grouped(g, groups)).to(value.dtype),
        grad_e,
        grad_bias,
        grad_sink,
    )


def capped_scores(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """(B, H, L, S) in the accumulation dtype: what queries and keys say, scaled and capped."""
    acc = accumulation_dtype(query.dtype)
    turned = key.to(acc).transpose(2, 3)  # no mT, which the older ONNX exporter does not know
    scores = (grouped(query.to(acc), key.shape[1]) @ turned * call.scale).view(*query.shape[:3], key.shape[2])
    return scores if call.softcap == 0 else call.softcap * (scores / call.softcap).tanh()


def cap_slope(capped: Tensor, call: AttentionCall) -> Tensor:
    """The derivative of `capped_scores` in the scores before the cap."""
    return 1 - (capped / call.softcap).square()


def masked_scores(query: Tensor, key: Tensor, call: AttentionCall, capped: Tensor | None = None) -> Tensor:
    """`capped_scores`, if they are not given, with what is added to them; -inf where nothing is to be seen."""
    scores = capped_scores(query, key, call) if capped is None else capped
    if call.bias is not None:
        scores = scores + call.bias.to(scores.dtype)
    if call.alibi is not None:
        scores = scores + alibi_scores(call, call.alibi, query.shape[2], key.shape[2], query.device)
    seen = in_window(call, query.shape[2], key.shape[2], query.device)
    if call.mask is not None:
        seen = call.mask if seen is None else call.mask & seen
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def with_sink(scores: Tensor, call: AttentionCall) -> Tensor:
    """The scores with the sink's behind them, if there is one."""
    if call.sink is None:
        return scores
    return torch.cat([scores, call.sink.view(-1, 1, 1).expand(*scores.shape[:3], 1)], 3)


def dropped(scores: Tensor, call: AttentionCall) -> Tensor | None:
    """What dropout multiplies the weights of these scores by; None: nothing is dropped."""
    return kept(call, scores.shape, scores.dtype) if call.dropout_p > 0 else None


def times(weights: Tensor, factors: Tensor | None) -> Tensor:
    """The weights, multiplied if there are factors."""
    return weights if factors is None else weights * factors


def alibi_scores(call: AttentionCall, slopes: Tensor, length: int | Tensor, keys: int | Tensor, device: torch.device) -> Tensor:
    """What ALiBi adds to the scores, to broadcast against (B, H, L, S); lengths as for `in_window`."""
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * distances(call, length, keys, device).abs()


def distances(call: AttentionCall, length: int | Tensor, keys: int | Tensor, device: torch.device) -> Tensor:
    """How far each key lies behind the place at which each query stands; lengths as for `in_window`."""
    padded = call.cu_seqlens_q is not None  # and not by what a length is: torch.jit.trace makes tensors of all
    i = torch.arange(call.max_seqlen_q if padded else cast(int, length), device=device).unsqueeze(1)
    j = torch.arange(call.max_seqlen_k if padded else cast(int, keys), device=device)
    return j - i - (keys - length if call.lower_right else 0)


def in_window(call: AttentionCall, length: int | Tensor, keys: int | Tensor, device: torch.device) -> Tensor | None:
    """Which of `keys` keys each of `length` queries sees by causality and window; None if all.

    The lengths may be tensors (N, 1, 1, 1) of packed sequences, padded to max_seqlen_q and max_seqlen_k: then what lies beyond
    a sequence's end is not seen.
    """
    if call.cu_seqlens_q is None and call.left < 0 and call.right < 0:
        return None
    distance = distances(call, length, keys, device)
    seen = (torch.arange(distance.shape[-2], device=device).unsqueeze(1) < length) & (
        torch.arange(distance.shape[-1], device=device) < keys
    )
    if call.left >= 0:
        seen = seen & (distance >= -call.left)
    if call.right >= 0:
        seen = seen & (distance <= call.right)
    return seen


def grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """(B, H, L, n) as (B, H_kv, H / H_kv * L, n): the query heads that share a key head lie below one another."""
    batch, heads, length, size = rows.shape
    return rows.reshape(batch, kv_heads, heads // max(kv_heads, 1) * length, size)


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted sums of the values, (B, H, L, D_v)."""
    sums = grouped(weights, value.shape[1]) @ value.to(weights.dtype)
    return sums.view(*weights.shape[:3], value.shape[3])


def per_head(e: float | Tensor) -> float | Tensor:
    """e, so that it broadcasts against (B, H, L, S)."""
    return e.view(-1, 1, 1) if isinstance(e, Tensor) else e


def live_shape(query: Tensor, key: Tensor, call: AttentionCall) -> tuple[int, ...]:
    """The shape of `live`, see `attention`."""
    batch, heads, length, _ = query.shape
    if call.cu_seqlens_q is None:
        tiles, keys = -(-length // TILE), key.shape[2]
    else:
        tiles, keys = length // TILE + call.cu_seqlens_q.shape[0] - 1, call.max_seqlen_k
    return batch, heads, tiles, -(-keys // (TILE * WORD))


def tiles_with(entries: Tensor) -> Tensor:
    """Which tiles of a boolean (..., L, S) hold True."""
    length, keys = entries.shape[-2:]
    tiles_q, tiles_k = -(-length // TILE), -(-keys // TILE)
    entries = widened(widened(entries, tiles_k * TILE).mT, tiles_q * TILE).mT
    return entries.reshape(*entries.shape[:-2], tiles_q, TILE, tiles_k, TILE).any(-1).any(-2)


def widened(t: Tensor, size: int) -> Tensor:
    """The last dimension filled up with zeros. torch 2.4's pad takes no dimension of 0."""
    missing = size - t.shape[-1]
    return torch.cat([t, t.new_zeros(*t.shape[:-1], missing)], -1) if missing else t


def packed_bits(tiles: Tensor) -> Tensor:
    """Booleans (..., n) as int32 words (..., ceil(n / WORD)), the first in the lowest bit."""
    count = -(-tiles.shape[-1] // WORD)
    words = widened(tiles, count * WORD).view(*tiles.shape[:-1], count, WORD).long()
    return (words << torch.arange(WORD, device=tiles.device)).sum(-1).to(torch.int32)  # bit 31 wraps to the sign


def unpacked_bits(words: Tensor) -> Tensor:
    """The reverse: booleans (..., n * WORD)."""
    bits = words.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(-2)


# packed sequences: laid side by side in a batch, each padded to the longest


def _packed_forward(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool, solve: Solve
) -> Forward:
    queries, keys = packings(call)
    if not (query.shape[2] and key.shape[2]):
        return _nothing_seen(query, value, queries, call, keep, stats)
    padded = (queries.pad(query), keys.pad(key), keys.pad(value))
    *rows, live, support = attention(*padded, alone(call, queries, keys), keep, stats, solve)
    out, m, delta = (queries.unpad(t, query.shape[2]) for t in rows[:3])
    m = torch.where(queries.inside(query.shape[2]), m, -torch.inf)
    u = queries.unpad(rows[3], query.shape[2]) if keep else rows[3]
    live = queries.unpad_tiles(live, query.shape[2]) if keep or stats else live
    return out, m, delta, u, live, queries.unpad(support, query.shape[2]) if stats else support


def _nothing_seen(query: Tensor, value: Tensor, queries: Packing, call: AttentionCall, keep: bool, stats: bool) -> Forward:
    rows = query.shape[:3]
    out = value.new_zeros((*rows, value.shape[3]))
    m = query.new_full(rows, -torch.inf, dtype=accumulation_dtype(query.dtype))
    if call.sink is not None:
        m = torch.where(queries.inside(query.shape[2]), call.sink.view(-1, 1), m)
    words = -(-call.max_seqlen_k // (TILE * WORD))
    live = m.new_zeros((*rows[:2], rows[2] // TILE + len(queries.starts), words), dtype=torch.int32)
    nothing = live.new_empty(0)
    u = torch.zeros_like(out) if keep else out.new_empty(0)
    support = torch.zeros_like(m, dtype=torch.int32) if stats else nothing
    return out, m, torch.zeros_like(m), u, live if keep or stats else nothing, support


def _packed_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    m: Tensor,
    delta: Tensor,
    u: Tensor,
    call: AttentionCall,
    needs_e: bool,
    needs_sink: bool,
) -> Backward:
    queries, keys = packings(call)
    length, many = query.shape[2], key.shape[2]
    if not (length and many):
        nothing = (torch.zeros_like(m) if needed else m.new_empty(0) for needed in (needs_e, False, needs_sink))
        grads = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
        return (*grads, *nothing)  # type: ignore[return-value]  # they are six
    grad_query, grad_key, grad_value, grad_e, grad_bias, grad_sink = attention_backward(
        queries.pad(grad),
        queries.pad(query),
        keys.pad(key),
        keys.pad(value),
        queries.pad(m.unsqueeze(3)).squeeze(3),
        queries.pad(delta.unsqueeze(3)).squeeze(3),
        queries.pad(u),
        m.new_empty(0),
        alone(call, queries, keys),
        needs_e,
        False,
        needs_sink,
    )
    return (
        queries.unpad(grad_query, length),
        keys.unpad(grad_key, many),
        keys.unpad(grad_value, many),
        queries.unpad(grad_e, length) if needs_e else grad_e,
        grad_bias,
        queries.unpad(grad_sink, length) if needs_sink else grad_sink,
    )


def alone(call: AttentionCall, queries: Packing, keys: Packing) -> AttentionCall:
    """The call for padded sequences: their lengths, causality and window become a mask, and ALiBi a bias."""
    length, many = (packing.lengths.view(-1, 1, 1, 1) for packing in (queries, keys))
    device = queries.starts.device
    return replace(
        call,
        mask=in_window(call, length, many, device),
        left=-1,
        right=-1,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        bias=None if call.alibi is None else alibi_scores(call, call.alibi, length, many, device),
        alibi=None,
    )
