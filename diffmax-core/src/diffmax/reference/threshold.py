"""Threshold attention in plain PyTorch: the reference for all other kernels, and the fallback on any device.

It holds the matrix of weights in memory, in the accumulation dtype, and is differentiable. With S keys, query i has the
position t = i + S - L; hidden keys (outside the window, and what the mask hides) have no weight, whatever theta, nor have
the keys of a query whose visible scores are all -inf:

    s_ij = scale * q_i . k_j + bias[t - j] where 0 <= t - j < W
    u_i = s_i, softmax(s_i) or diffmax(s_i) over the visible keys
    w_ij = relu(u_ij - theta_i)^p,  out_i = sum_j w_ij v_j,  mass_i = sum_j w_ij

Its gradients, with the derivative of relu 0 at 0, dw_ij = dout_i . v_j + dmass_i:

    G_ij = p relu(u_ij - theta_i)^(p - 1) dw_ij,  dtheta_i = -sum_j G_ij,  dbias[r] = sum over t - j = r of ds_ij
    ds = G for scores;  softmax: u (G - sum_j u_ij G_ij);  diffmax: r (G - sum_j r_ij G_ij / sum_j r_ij), r = u^(1 - e)
    de_i = -sum_j w_ij (G_ij - sum_j r_ij G_ij / sum_j r_ij), with w of Eq. 6
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffmax.operators.attention.packing import Packing
from diffmax.operators.common import portable
from diffmax.operators.common.numerics import accumulation_dtype, alpha_weight, clamp_e
from diffmax.plugin import ThresholdCall, ThresholdGradients, ThresholdResults, ThresholdSaved, ThresholdWanted
from diffmax.reference.attention import grouped, per_head, products, weighted


def threshold_attention(query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall, keep: bool) -> ThresholdResults:
    """Forward kernel.

    Args:
        query: (B, H, L, D), any strides.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), any strides. Query head h reads key head h // (H / H_kv).
        call: Thresholds and what they are subtracted from.
        keep: Whether a backward follows.
    Returns:
        Contiguous tensors:

        - out (B, H, L, D_v), in value's dtype. A query without weights has 0.
        - mass (B, H, L), in the accumulation dtype, the sum of each query's weights.
        - statistic, see `diffmax.plugin.ThresholdSaved`; (0,) if not `keep`.
    """
    if call.cu_seqlens_q is not None:
        packed = _Packed.of(query, key, value, call)
        found = threshold_attention(*packed.heads, packed.call, keep)
        return ThresholdResults(*(packed.queries.unpad(t, query.shape[2]) if t.ndim > 1 else t for t in found))
    terms = _Terms.of(query, key, call)
    weights = _powers(terms.rectified, call.power)
    statistic = terms.statistic if keep and call.weights != "scores" else weights.new_empty(0)
    out = weighted(weights, value).to(value.dtype).contiguous()
    return ThresholdResults(out, weights.sum(3), statistic.contiguous())


def threshold_attention_backward(
    grad: Tensor,
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: ThresholdSaved,
    call: ThresholdCall,
    wanted: ThresholdWanted,
) -> ThresholdGradients:
    """Backward kernel.

    Args:
        grad: Gradient for out, any strides.
        grad_mass: Gradient for mass, or None.
        query, key, value, call: As for the forward.
        saved: The results of any forward kernel for them. Here they are computed again.
        wanted: Whether to compute the gradients for theta, for the bias and for e.
    Returns:
        Gradients for query, key and value, contiguous, in their dtypes; for theta (B, H, L), the bias (H, W) and e, per query
        (B, H, L), in the accumulation dtype, (0,) if not wanted.
    """
    if call.cu_seqlens_q is not None:
        packed = _Packed.of(query, key, value, call)
        queries, keys = packed.queries, packed.keys
        mass = None if grad_mass is None else queries.pad(grad_mass.unsqueeze(3)).squeeze(3)
        found = threshold_attention_backward(queries.pad(grad), mass, *packed.heads, saved, packed.call, wanted)
        length, many = query.shape[2], key.shape[2]
        return ThresholdGradients(
            queries.unpad(found.query, length),
            keys.unpad(found.key, many),
            keys.unpad(found.value, many),
            queries.unpad(found.theta, length) if wanted.theta else found.theta,
            found.bias,
            queries.unpad(found.e, length) if wanted.e else found.e,
        )
    terms, groups, acc = _Terms.of(query, key, call), key.shape[1], accumulation_dtype(query.dtype)
    g = grouped(grad.to(acc), groups)
    of_weights = (g @ value.to(acc).mT).view(terms.rectified.shape)
    if grad_mass is not None:
        of_weights = of_weights + grad_mass.unsqueeze(3)
    of_u = _slopes(terms.rectified, call.power) * of_weights
    of_scores = of_u
    if call.weights != "scores":
        slope = terms.u if call.weights == "softmax" else _exponent(terms.u, 1 - per_head(call.e))
        total = slope.sum(3, keepdim=True)
        mean = (slope * of_u).sum(3, keepdim=True) / total.masked_fill(total == 0, 1.0)
        of_scores = slope * (of_u - mean)
    of_e = of_u.new_empty(0)
    if wanted.e:
        log_u = terms.u.masked_fill(terms.u == 0, 1.0).log()
        of_e = -(alpha_weight(terms.u, log_u, clamp_e(per_head(call.e))) * (of_u - mean)).sum(3)
    d_raw = grouped(of_scores, groups) * call.scale
    weights = grouped(_powers(terms.rectified, call.power), groups)
    return ThresholdGradients(
        (d_raw @ key.to(acc)).view(query.shape).to(query.dtype).contiguous(),
        (d_raw.mT @ grouped(query.to(acc), groups)).to(key.dtype).contiguous(),
        (weights.mT @ g).to(value.dtype).contiguous(),
        -of_u.sum(3) if wanted.theta else of_u.new_empty(0),
        _of_bias(of_scores, call) if wanted.bias and call.bias is not None else of_u.new_empty(0),
        of_e,
    )


class _Terms(NamedTuple):
    """The matrices (B, H, L, S) of a call: u and relu(u - theta), 0 at hidden keys; and the statistic (B, H, L)."""

    u: Tensor
    rectified: Tensor
    statistic: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, call: ThresholdCall) -> _Terms:
        scores = products(query, key, call.scale)
        distance = _distances(query.shape[2], key.shape[2], query.device)
        if call.bias is not None and call.bias.shape[1]:
            width = call.bias.shape[1]
            added = call.bias[:, distance.clamp(0, width - 1)]
            scores = scores + added.masked_fill((distance < 0) | (distance >= width), 0.0)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        hidden = hidden | (distance < -call.right) if call.right >= 0 else hidden
        hidden = hidden | (distance > call.left) if call.left >= 0 else hidden
        hidden = hidden if call.mask is None else hidden | ~call.mask
        u, statistic = scores, scores.new_empty(0)
        if call.weights != "scores":
            seen = scores.masked_fill(hidden, -torch.inf)
            hidden = hidden | (seen == -torch.inf).all(3, keepdim=True)  # nothing to share out; ONNX has no isneginf
            u, statistic = _normalized(scores, hidden, call)
        u = u.masked_fill(hidden, 0.0)
        above = u - call.theta.unsqueeze(3)
        rectified = above.masked_fill((above <= 0) | hidden, 0.0)
        return cls(u, rectified * torch.where(rectified.isnan(), torch.nan, 1.0), statistic)  # NaN has a gradient of NaN


def _normalized(scores: Tensor, hidden: Tensor, call: ThresholdCall) -> tuple[Tensor, Tensor]:
    """Softmax or diffmax of the visible scores, and the statistic."""
    if not scores.shape[3]:
        return scores, scores.new_full(scores.shape[:3], -torch.inf)
    seen = scores.masked_fill(hidden, -torch.inf)
    if call.weights == "diffmax":
        e = per_head(call.e)
        p, m, delta = portable.bisect(seen, e, 3, 200, True)
        return p, (m - (1 - delta) / clamp_e(e)).squeeze(3).detach()
    dead = hidden.all(-1, keepdim=True)
    seen = seen.masked_fill(dead, 0.0)
    statistic = seen.detach().logsumexp(3, keepdim=True).masked_fill(dead, -torch.inf)
    return seen.softmax(3), statistic.squeeze(3)


def _distances(length: int, many: int, device: torch.device) -> Tensor:
    """(L, S), how far each key lies before each query."""
    position = torch.arange(length, device=device).unsqueeze(1) + (many - length)
    return position - torch.arange(many, device=device)


def _powers(rectified: Tensor, power: float) -> Tensor:
    if power == 1:
        return rectified
    return rectified * rectified if power == 2 else _exponent(rectified, power)


def _slopes(rectified: Tensor, power: float) -> Tensor:
    """The derivatives of the weights, 0 where there is none."""
    if power == 2:
        return 2 * rectified
    if power == 1:
        return torch.where(rectified > 0, 1.0, rectified.detach())  # NaN stays
    return power * _exponent(rectified, power - 1)


def _exponent(t: Tensor, power: float | Tensor) -> Tensor:
    """t^power of numbers that are not negative, 0 at 0, with a derivative of 0 there."""
    off = t == 0
    return t.masked_fill(off, 1.0).pow(power).masked_fill(off, 0.0)


def _of_bias(of_scores: Tensor, call: ThresholdCall) -> Tensor:
    """(H, W), sums over the keys at each distance."""
    assert call.bias is not None  # noqa: S101  # asked by the caller
    width = call.bias.shape[1]
    distance = _distances(of_scores.shape[2], of_scores.shape[3], of_scores.device)
    place = torch.where((distance >= 0) & (distance < width), distance, width).flatten()
    rows = of_scores.sum(0).flatten(1)
    return torch.zeros_like(rows.sum(1, keepdim=True)).expand(-1, width + 1).index_add(1, place, rows)[:, :width].contiguous()


class _Packed(NamedTuple):
    """Packed sequences as a batch, each at the end of the longest: there a query's position counts from the last key."""

    heads: tuple[Tensor, Tensor, Tensor]
    queries: _AtEnd
    keys: _AtEnd
    call: ThresholdCall

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall) -> _Packed:
        if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
            raise ValueError("threshold_attention: cu_seqlens_q and cu_seqlens_k are given together, got one of them")
        queries = _AtEnd(call.cu_seqlens_q, call.max_seqlen_q)
        keys = _AtEnd(call.cu_seqlens_k, call.max_seqlen_k)
        seen = keys.there().view(len(keys.lengths), 1, 1, -1) & queries.there().view(len(keys.lengths), 1, -1, 1)
        theta = queries.pad(call.theta.unsqueeze(3)).squeeze(3)
        alone = replace(call, theta=theta, mask=seen, cu_seqlens_q=None, cu_seqlens_k=None)
        return cls((queries.pad(query), keys.pad(key), keys.pad(value)), queries, keys, alone)


class _AtEnd(Packing):
    """A packing whose padding comes first."""

    def there(self) -> Tensor:
        """Boolean (N, longest)."""
        place = torch.arange(self.longest, device=self.starts.device)
        return place >= self.longest - self.lengths.unsqueeze(1)

    def pad(self, t: Tensor) -> Tensor:
        """(1, H, T, n) as (N, H, longest, n), 0 before the start of a sequence."""
        place = torch.arange(self.longest, device=t.device) - (self.longest - self.lengths).unsqueeze(1)
        index = torch.where(place >= 0, self.starts.unsqueeze(1) + place, 0)
        if not t.shape[2]:
            return t.new_zeros(len(self.starts), t.shape[1], self.longest, t.shape[3])
        return torch.where((place >= 0).unsqueeze(2), t[0][:, index], 0).transpose(0, 1)

    def unpad(self, t: Tensor, total: int) -> Tensor:
        """(N, H, longest, ...) as (1, H, total, ...), 0 after the last sequence."""
        place = torch.arange(total, device=t.device)
        sequence = torch.searchsorted(self.ends, place, right=True).clamp_max(len(self.ends) - 1)
        within = place - self.ends[sequence] + self.longest
        rows = t.transpose(1, 2)[sequence, within.clamp(0, max(self.longest - 1, 0))]
        inside = self.inside(total).view(-1, *(1,) * (rows.ndim - 1))
        return torch.where(inside, rows, torch.zeros_like(rows)).transpose(0, 1).unsqueeze(0).contiguous()
