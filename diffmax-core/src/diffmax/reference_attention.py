"""Attention in plain PyTorch: what the other kernels are measured against, and the fallback on any device.

The score matrix is held in memory, in the accumulation dtype. Nothing waits for a device. Equations: docs/theory.md,
section 11.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffmax import reference
from diffmax._numerics import accumulation_dtype, alpha_weight, clamp_e
from diffmax.plugin import TILE, AttentionCall

# Tiles whose bits share one int32 of `live`.
WORD = 32

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor, Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool) -> Forward:
    """Forward kernel.

    Args:
        query: (B, H, L, D), any strides.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), any strides. Query head h reads key head h // (H / H_kv).
        call: Scale, alpha, and who sees whom.
        keep: Whether a backward follows.
        stats: Whether support sizes and live tiles are asked for.
    Returns:
        A `Forward`, contiguous tensors:

        - out (B, H, L, D_v), in value's dtype. A query that sees nothing gets zeros.
        - m, delta (B, H, L), in the accumulation dtype: each query's largest score, and its delta, with
          tau = m - (1 - delta) / e. A query that sees nothing has -inf and 0; one whose result is NaN has delta NaN.
        - u, U of Eq. 5, like out; (0,) if not `keep`.
        - live, int32 (B, H, ceil(L / TILE), ceil(S / TILE / WORD)): bit b of word w is clear only if no weight of that tile of
          queries with key tile w * WORD + b differs from 0. Of packed sequences, tiles begin with each sequence: tile i of
          sequence n has row cu_seqlens_q[n] // TILE + n + i of T // TILE + N, and max_seqlen_k takes S's place.
          (0,) if neither `keep` nor `stats`, or where the kernel does not know; a backward has to do without it.
        - support, int32 (B, H, L), how many scores lie above tau; (0,) if not `stats`.
    """
    if call.cu_seqlens_q is not None:
        return _packed_forward(query, key, value, call, keep, stats)
    scores = masked_scores(query, key, call)
    e = per_head(call.e)
    p, m, delta = reference.bisect(scores, e, 3, 200, True)
    m, delta = m.squeeze(3), delta.squeeze(3)
    row_e = e.squeeze(2) if isinstance(e, Tensor) else torch.full((), e, dtype=m.dtype, device=m.device)
    delta = delta.masked_fill(m.isnan() | (m == torch.inf) | ~((row_e >= 0) & (row_e <= 1)), torch.nan)

    out = weighted(p, value).to(value.dtype)
    u = live = support = out.new_empty(0)
    if keep:
        s = torch.where(p != 0, torch.exp((1 - clamp_e(e)) * torch.where(p != 0, p, 1.0).log()), 0.0)
        total = s.sum(3, keepdim=True)
        u = weighted(s / torch.where(total == 0, 1.0, total), value).to(value.dtype)
    live = packed_bits(tiles_with(p != 0)) if keep or stats else live.int()
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
) -> Backward:
    """Backward kernel: Eq. 5.

    Args:
        grad: Gradient for out, any strides.
        query, key, value, call: As for the forward.
        m, delta, u, live: What any forward kernel returned for them.
        needs_e: Whether the gradient for e is wanted.
    Returns:
        Gradients for query, key and value, contiguous, in their dtypes; and for e per query, like m, or (0,) if not wanted.
    """
    if call.cu_seqlens_q is not None:
        return _packed_backward(grad, query, key, value, m, delta, u, call, needs_e)
    acc, groups = m.dtype, key.shape[1]
    e = clamp_e(per_head(call.e))
    m, delta = m.unsqueeze(3), delta.unsqueeze(3)
    p, log_p, base = reference._power(e * (masked_scores(query, key, call) - torch.where(m == -torch.inf, 0.0, m)), delta, e)
    p, s = (weights.masked_fill(delta.isnan(), torch.nan) for weights in (p, p / base))
    g = grad.to(acc)
    d_p = grouped(g, groups) @ value.to(acc).mT
    centred = d_p.view(p.shape) - (g * u.to(acc)).sum(3, keepdim=True)
    d_s = grouped(s * centred, groups) * call.scale
    grad_query = (d_s @ key.to(acc)).view(query.shape).to(query.dtype)
    grad_key = (d_s.mT @ grouped(query.to(acc), groups)).to(key.dtype)
    grad_value = (grouped(p, groups).mT @ grouped(g, groups)).to(value.dtype)
    grad_e = -(alpha_weight(p, log_p, e) * centred).sum(3) if needs_e else m.new_empty(0)
    return grad_query, grad_key, grad_value, grad_e


def masked_scores(query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
    """(B, H, L, S) in the accumulation dtype, -inf where nothing is to be seen."""
    acc = accumulation_dtype(query.dtype)
    scores = (grouped(query.to(acc), key.shape[1]) @ key.to(acc).mT * call.scale).view(*query.shape[:3], key.shape[2])
    seen = in_window(call, query.shape[2], key.shape[2], query.device)
    if call.mask is not None:
        seen = call.mask if seen is None else call.mask & seen
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def in_window(call: AttentionCall, length: int | Tensor, keys: int | Tensor, device: torch.device) -> Tensor | None:
    """Which of `keys` keys each of `length` queries sees by causality and window; None if all.

    The lengths may be tensors (N, 1, 1, 1) of packed sequences, padded to max_seqlen_q and max_seqlen_k: then what lies beyond
    a sequence's end is not seen.
    """
    if isinstance(length, int | torch.SymInt) and call.left < 0 and call.right < 0:
        return None
    i = torch.arange(call.max_seqlen_q if isinstance(length, Tensor) else length, device=device).unsqueeze(1)
    j = torch.arange(call.max_seqlen_k if isinstance(keys, Tensor) else keys, device=device)
    distance = j - i - (keys - length if call.lower_right else 0)
    seen = (i < length) & (j < keys)
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
    entries = pad(entries, (0, tiles_k * TILE - keys, 0, tiles_q * TILE - length))
    return entries.view(*entries.shape[:-2], tiles_q, TILE, tiles_k, TILE).any(-1).any(-2)


def packed_bits(tiles: Tensor) -> Tensor:
    """Booleans (..., n) as int32 words (..., ceil(n / WORD)), the first in the lowest bit."""
    count = -(-tiles.shape[-1] // WORD)
    words = pad(tiles, (0, count * WORD - tiles.shape[-1])).view(*tiles.shape[:-1], count, WORD).long()
    return (words << torch.arange(WORD, device=tiles.device)).sum(-1).to(torch.int32)  # bit 31 wraps to the sign


def unpacked_bits(words: Tensor) -> Tensor:
    """The reverse: booleans (..., n * WORD)."""
    bits = words.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(-2)


# packed sequences: laid side by side in a batch, each padded to the longest


def _packed_forward(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, keep: bool, stats: bool) -> Forward:
    queries, keys = _packings(call)
    if not (query.shape[2] and key.shape[2]):
        return _nothing_seen(query, value, queries, call, keep, stats)
    padded = (queries.pad(query), keys.pad(key), keys.pad(value))
    *rows, live, support = attention(*padded, _alone(call, queries, keys), keep, stats)
    out, m, delta = (queries.unpad(t, query.shape[2]) for t in rows[:3])
    m = torch.where(queries.inside(query.shape[2]), m, -torch.inf)
    u = queries.unpad(rows[3], query.shape[2]) if keep else rows[3]
    live = queries.unpad_tiles(live, query.shape[2]) if keep or stats else live
    return out, m, delta, u, live, queries.unpad(support, query.shape[2]) if stats else support


def _nothing_seen(query: Tensor, value: Tensor, queries: _Packing, call: AttentionCall, keep: bool, stats: bool) -> Forward:
    rows = query.shape[:3]
    out = value.new_zeros((*rows, value.shape[3]))
    m = query.new_full(rows, -torch.inf, dtype=accumulation_dtype(query.dtype))
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
) -> Backward:
    queries, keys = _packings(call)
    if not (query.shape[2] and key.shape[2]):
        nothing = torch.zeros_like(m) if needs_e else m.new_empty(0)
        grads = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
        return (*grads, nothing)  # type: ignore[return-value]  # they are three
    grad_query, grad_key, grad_value, grad_e = attention_backward(
        queries.pad(grad),
        queries.pad(query),
        keys.pad(key),
        keys.pad(value),
        queries.pad(m.unsqueeze(3)).squeeze(3),
        queries.pad(delta.unsqueeze(3)).squeeze(3),
        queries.pad(u),
        m.new_empty(0),
        _alone(call, queries, keys),
        needs_e,
    )
    return (
        queries.unpad(grad_query, query.shape[2]),
        keys.unpad(grad_key, key.shape[2]),
        keys.unpad(grad_value, key.shape[2]),
        queries.unpad(grad_e, query.shape[2]) if needs_e else grad_e,
    )


def _alone(call: AttentionCall, queries: _Packing, keys: _Packing) -> AttentionCall:
    """The call for padded sequences: their lengths, causality and window become a mask."""
    length, many = (packing.lengths.view(-1, 1, 1, 1) for packing in (queries, keys))
    seen = in_window(call, length, many, queries.starts.device)
    return replace(call, mask=seen, left=-1, right=-1, cu_seqlens_q=None, cu_seqlens_k=None)


def _packings(call: AttentionCall) -> tuple[_Packing, _Packing]:
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        raise ValueError("attention: cu_seqlens_q and cu_seqlens_k are given together or not at all, got one of them")
    return _Packing(call.cu_seqlens_q, call.max_seqlen_q), _Packing(call.cu_seqlens_k, call.max_seqlen_k)


class _Packing:
    """Where N packed sequences lie, and the way to a padded batch and back."""

    def __init__(self, cu_seqlens: Tensor, longest: int) -> None:
        self.starts, self.ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        self.lengths, self.longest = self.ends - self.starts, longest

    def pad(self, t: Tensor) -> Tensor:
        """(1, H, T, n) as (N, H, longest, n), 0 beyond a sequence's end."""
        place = torch.arange(self.longest, device=t.device)
        inside = place < self.lengths.unsqueeze(1)
        index = torch.where(inside, self.starts.unsqueeze(1) + place, 0)
        return torch.where(inside.unsqueeze(2), t[0][:, index], 0).transpose(0, 1)

    def unpad(self, t: Tensor, total: int) -> Tensor:
        """(N, H, longest, ...) as (1, H, total, ...), 0 beyond the last sequence."""
        place = torch.arange(total, device=t.device)
        sequence = torch.searchsorted(self.ends, place, right=True).clamp_max(len(self.ends) - 1)
        rows = t.transpose(1, 2)[sequence, (place - self.starts[sequence]).clamp(0, self.longest - 1)]
        inside = self.inside(total).view(-1, *(1,) * (rows.ndim - 1))
        return torch.where(inside, rows, torch.zeros_like(rows)).transpose(0, 1).unsqueeze(0).contiguous()

    def inside(self, total: int) -> Tensor:
        """Which of `total` places belong to a sequence."""
        return torch.arange(total, device=self.ends.device) < self.ends[-1]

    def unpad_tiles(self, live: Tensor, total: int) -> Tensor:
        """(N, H, tiles, words) in the order of `live`'s contract."""
        first = self.starts // TILE + torch.arange(len(self.starts), device=live.device)
        row = torch.arange(total // TILE + len(self.starts), device=live.device)
        sequence = (torch.searchsorted(first, row, right=True) - 1).clamp_min(0)
        tile = row - first[sequence]
        rows = live.transpose(1, 2)[sequence, tile.clamp(0, live.shape[2] - 1)]
        inside = (tile >= 0) & (tile * TILE < self.lengths[sequence])
        return torch.where(inside.view(-1, 1, 1), rows, 0).transpose(0, 1).unsqueeze(0).contiguous()
