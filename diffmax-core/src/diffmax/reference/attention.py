"""Attention in plain PyTorch: the reference for all other kernels, and the fallback on any device.

It holds the score matrix in memory, in the accumulation dtype, and never waits for a device. Equations: docs/theory.md,
section 11. Rules of the scores: `diffmax.operators.attention.scores`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from diffmax import reference
from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.packing import Packing, packings
from diffmax.operators.attention.tiles import WORD, packed_bits, tiles_with, widened
from diffmax.operators.common.numerics import accumulation_dtype, alpha_weight, clamp_e
from diffmax.plugin import TILE, AttentionCall, AttentionGradients, AttentionResults, Saved, Wanted
from diffmax.reference.dropout import kept
from diffmax.reference.rows import _power

Solve: TypeAlias = Callable[[Tensor, "float | Tensor", int, int, bool], tuple[Tensor, Tensor, Tensor]]
Lengths: TypeAlias = "tuple[Tensor, Tensor] | None"  # (N,) lengths of queries and keys of packed sequences in a padded batch


def attention(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool, solve: Solve = reference.bisect
) -> AttentionResults:
    """Forward kernel.

    Args:
        query: (B, H, L, D), any strides.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), any strides. Query head h reads key head h // (H / H_kv).
        call: Scale, alpha, and the options of the scores.
        keep: Whether a backward follows.
        stats: Whether to return support sizes and live tiles.
        solve: The row operator. If autograd differentiates it, the whole function is differentiable.
    Returns:
        Contiguous tensors:

        - out (B, H, L, D_v), in value's dtype. Fully masked queries are 0.
        - m, delta (B, H, L), in the accumulation dtype: the largest score of each query, including the sink, and delta, with
          tau = m - (1 - delta) / e. A fully masked query without a sink has -inf and 0; a query whose result is NaN has
          delta NaN.
        - u, U of Eq. 5, like out; (0,) if not `keep`. The sum of s includes the sink; dropout affects only the weights of the
          values.
        - live, int32 (B, H, ceil(L / TILE), ceil(S / TILE / WORD)): bit b of word w is clear only if no weight of that query
          tile and key tile w * WORD + b differs from 0. For packed sequences, tiles begin with each sequence: tile i of
          sequence n has row cu_seqlens_q[n] // TILE + n + i of T // TILE + N, and max_seqlen_k replaces S.
          (0,) if neither `keep` nor `stats`, or if the kernel does not compute it; a backward must work without it.
        - support, int32 (B, H, L), the number of scores above tau; (0,) if not `stats`.
    """
    if call.cu_seqlens_q is not None:
        return _packed_forward(query, key, value, call, keep, stats, solve)
    return attend(query, key, value, call, keep, stats, solve, Whole.of(query, key, call))


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, call: AttentionCall, wanted: Wanted
) -> AttentionGradients:
    """Backward kernel: Eq. 5.

    Args:
        grad: Gradient for out, any strides.
        query, key, value, call: As for the forward.
        saved: The results of any forward kernel for them.
        wanted: Whether to compute the gradients for e, the bias and the sink.
    Returns:
        Gradients for query, key and value, contiguous, in their dtypes; for e per query, like m; for the bias, in its shape
        and the accumulation dtype; for the sink per query, like m. The last three are (0,) if not requested. A query whose
        weights are all 0 propagates no gradient, even if it holds NaN.
    """
    if call.cu_seqlens_q is not None:
        return _packed_backward(grad, query, key, value, saved, call, wanted)
    return _backward(grad, query, key, value, saved, call, wanted, Whole.of(query, key, call))


def products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, H, L, S) in the accumulation dtype: the scaled products of queries and keys, before the rules of the scores."""
    acc = accumulation_dtype(query.dtype)
    turned = key.to(acc).transpose(2, 3)  # not mT, which the older ONNX exporter does not support
    return (grouped(query.to(acc), key.shape[1]) @ turned * scale).view(*query.shape[:3], key.shape[2])


@dataclass(frozen=True)
class Whole(rules.Region):
    """All scores of a call, (B, H, L, S); for packed sequences in a padded batch, `lengths` has their lengths."""

    length: int
    many: int
    call: AttentionCall
    device: torch.device
    lengths: Lengths = None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, call: AttentionCall, lengths: Lengths = None) -> Whole:
        """The region that covers all scores of a call."""
        return cls(query.shape[2], key.shape[2], call, query.device, lengths)

    def queries(self) -> Tensor:
        """(L, 1), or (N, 1, L, 1)."""
        position = torch.arange(self.length, device=self.device).unsqueeze(1)
        if not self.call.lower_right:
            return position
        if self.lengths is None:
            return position + (self.many - self.length)
        of_queries, of_keys = (t.view(-1, 1, 1, 1) for t in self.lengths)
        return position + (of_keys - of_queries)

    def keys(self) -> Tensor:
        """(S,)."""
        return torch.arange(self.many, device=self.device)

    def of_heads(self, t: Tensor) -> Tensor:
        """(1 or B, H, 1, 1)."""
        return (t if t.ndim == 2 else t.unsqueeze(0))[..., None, None]

    def padding(self) -> tuple[Tensor, ...]:
        """The padding of queries and keys, after the end of each sequence."""
        if self.lengths is None:
            return ()
        of_queries, of_keys = (t.view(-1, 1, 1, 1) for t in self.lengths)
        return torch.arange(self.length, device=self.device).unsqueeze(1) >= of_queries, self.keys() >= of_keys


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    keep: bool,
    stats: bool,
    solve: Solve,
    region: rules.Region,
) -> AttentionResults:
    """`attention`, with the positions of queries and keys given by the region."""
    e, keys = per_head(call.e), key.shape[2]
    scores = rules.apply(products(query, key, call.scale), call, region)
    p, m, delta = solve(scores, e, 3, 200, True)
    m, delta = m.squeeze(3), delta.squeeze(3)
    row_e = e.squeeze(2) if isinstance(e, Tensor) else torch.full((), e, dtype=m.dtype, device=m.device)
    delta = delta.masked_fill(m.isnan() | (m == torch.inf) | ~((row_e >= 0) & (row_e <= 1)), torch.nan)

    passed, p_keys = keep_factors(scores[..., :keys], call), p[..., :keys]
    out = weighted(times(p_keys, passed), value).to(value.dtype)
    u = live = support = out.new_empty(0)
    if keep:
        s = torch.where(p != 0, torch.exp((1 - clamp_e(e)) * torch.where(p != 0, p, 1.0).log()), 0.0)
        total = s.sum(3, keepdim=True)
        u = weighted(times(s[..., :keys] / torch.where(total == 0, 1.0, total), passed), value).to(value.dtype)
    live = packed_bits(tiles_with(p_keys != 0)) if keep or stats else live.int()
    if stats:
        shift = torch.where(m == -torch.inf, 0.0, m)
        support = (clamp_e(e) * (scores[..., :keys] - shift.unsqueeze(3)) > delta.unsqueeze(3) - 1).sum(3, dtype=torch.int32)
    return AttentionResults(out, m, delta, u, live, support.int())


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    call: AttentionCall,
    wanted: Wanted,
    region: rules.Region,
) -> AttentionGradients:
    m, delta, u = saved.m.unsqueeze(3), saved.delta.unsqueeze(3), saved.u
    acc, groups, keys, e = m.dtype, key.shape[1], key.shape[2], clamp_e(per_head(call.e))
    scores, slope = rules.apply_with_slope(products(query, key, call.scale), call, region)
    p, log_p, base = _power(e * (scores - torch.where(m == -torch.inf, 0.0, m)), delta, e)
    p, s = (weights.masked_fill(delta.isnan(), torch.nan) for weights in (p, p / base))
    silent = (s[..., :keys] == 0).all(3, keepdim=True)
    q, g = (t.to(acc).masked_fill(silent, 0.0) for t in (query, grad))
    passed = keep_factors(scores[..., :keys], call)
    d_p = times((grouped(g, groups) @ value.to(acc).mT).view(*scores.shape[:3], keys), passed)
    centred = widened(d_p, s.shape[3]) - (g * u.to(acc)).sum(3, keepdim=True)  # the sink has no value vector
    d_s = s * centred
    grad_bias = grad_sink = grad_e = m.new_empty(0)
    if wanted.e:
        grad_e = -(alpha_weight(p, log_p, e) * centred).sum(3)
    if wanted.sink:
        grad_sink = d_s[..., keys].contiguous()
    d_s = d_s[..., :keys]
    if wanted.bias and call.bias is not None:
        grad_bias = d_s.sum_to_size(call.bias.shape).contiguous()
    d_raw = grouped(d_s if slope is None else d_s * slope.masked_fill(silent, 0.0), groups) * call.scale
    return AttentionGradients(
        (d_raw @ key.to(acc)).view(query.shape).to(query.dtype),
        (d_raw.mT @ grouped(q, groups)).to(key.dtype),
        (grouped(times(p[..., :keys], passed), groups).mT @ grouped(g, groups)).to(value.dtype),
        grad_e,
        grad_bias,
        grad_sink,
    )


def keep_factors(scores: Tensor, call: AttentionCall) -> Tensor | None:
    """Dropout factors of the weights, 0 or 1 / (1 - dropout_p); None: no dropout."""
    return kept(call, scores.shape, scores.dtype) if call.dropout_p > 0 else None


def times(weights: Tensor, factors: Tensor | None) -> Tensor:
    """The weights, multiplied by the factors, if any."""
    return weights if factors is None else weights * factors


def grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """(B, H, L, n) as (B, H_kv, H / H_kv * L, n): query heads that share a key head are stacked along the queries."""
    batch, heads, length, size = rows.shape
    return rows.reshape(batch, kv_heads, heads // max(kv_heads, 1) * length, size)


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted sums of the values, (B, H, L, D_v)."""
    sums = grouped(weights, value.shape[1]) @ value.to(weights.dtype)
    return sums.view(*weights.shape[:3], value.shape[3])


def per_head(e: float | Tensor) -> float | Tensor:
    """e in a shape that broadcasts against (B, H, L, S)."""
    return e.view(-1, 1, 1) if isinstance(e, Tensor) else e


# packed sequences: a batch, each sequence padded to the longest


def _packed_forward(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool, solve: Solve
) -> AttentionResults:
    queries, keys = packings(call)
    if not (query.shape[2] and key.shape[2]):
        return _nothing_seen(query, value, queries, call, keep, stats)
    padded, total = (queries.pad(query), keys.pad(key), keys.pad(value)), query.shape[2]
    region = Whole.of(*padded[:2], call, (queries.lengths, keys.lengths))
    found = attend(*padded, padded_call(call), keep, stats, solve, region)
    return AttentionResults(
        queries.unpad(found.out, total),
        torch.where(queries.inside(total), queries.unpad(found.m, total), -torch.inf),
        queries.unpad(found.delta, total),
        queries.unpad(found.u, total) if keep else found.u,
        queries.unpad_tiles(found.live, total) if keep or stats else found.live,
        queries.unpad(found.support, total) if stats else found.support,
    )


def _nothing_seen(
    query: Tensor, value: Tensor, queries: Packing, call: AttentionCall, keep: bool, stats: bool
) -> AttentionResults:
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
    return AttentionResults(out, m, torch.zeros_like(m), u, live if keep or stats else nothing, support)


def _packed_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Saved, call: AttentionCall, wanted: Wanted
) -> AttentionGradients:
    queries, keys = packings(call)
    length, many = query.shape[2], key.shape[2]
    if not (length and many):
        return nothing_learned(query, key, value, saved.m, wanted)
    padded = (queries.pad(grad), queries.pad(query), keys.pad(key), keys.pad(value))
    region = Whole.of(*padded[1:3], call, (queries.lengths, keys.lengths))
    found = _backward(*padded, padded_saved(saved, queries), padded_call(call), wanted, region)
    return unpadded(found, queries, keys, length, many, wanted)


def padded_call(call: AttentionCall) -> AttentionCall:
    """The call for packed sequences in a padded batch. The region, which has their lengths, restricts visibility."""
    return replace(call, cu_seqlens_q=None, cu_seqlens_k=None)


def padded_saved(saved: Saved, queries: Packing) -> Saved:
    """The saved tensors of a packed forward, in a padded batch, without the live tiles."""
    m, delta = (queries.pad(t.unsqueeze(3)).squeeze(3) for t in (saved.m, saved.delta))
    return Saved(m, delta, queries.pad(saved.u), saved.live.new_empty(0))


def unpadded(
    found: AttentionGradients, queries: Packing, keys: Packing, length: int, many: int, wanted: Wanted
) -> AttentionGradients:
    """The gradients for packed sequences from those for a padded batch; there is no bias."""
    return AttentionGradients(
        queries.unpad(found.query, length),
        keys.unpad(found.key, many),
        keys.unpad(found.value, many),
        queries.unpad(found.e, length) if wanted.e else found.e,
        found.bias,
        queries.unpad(found.sink, length) if wanted.sink else found.sink,
    )


def nothing_learned(query: Tensor, key: Tensor, value: Tensor, m: Tensor, wanted: Wanted) -> AttentionGradients:
    """The gradients if every query is fully masked."""
    of_query, of_key, of_value = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    of_e, of_sink = (torch.zeros_like(m) if needed else m.new_empty(0) for needed in (wanted.e, wanted.sink))
    return AttentionGradients(of_query, of_key, of_value, of_e, m.new_empty(0), of_sink)
