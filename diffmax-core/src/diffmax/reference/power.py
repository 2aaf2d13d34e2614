"""Power attention in plain PyTorch: the reference for all other kernels, and the fallback on any device.

It holds the matrix of weights in memory, in the accumulation dtype. With S keys, G_t = log_gates_1 + .. + log_gates_t and query
i at position t = i + S - L (docs/theory.md, Eq. 30):

    w_ij = (scale * q_i . k_j)^p exp(G_t - G_j) for j <= t,   u_i = exp(G_t) phi(scale * q_i)
    out_i = (sum_j w_ij v_j + u_i . sums) / total_i,          total_i = sum_j w_ij + u_i . norm

`sums` and `norm` are the state before the first key; after the last one it is, with m the monomials of
`operators.power.symmetric` and phi those times their multinomial coefficients,

    sums' = exp(G_S) sums + sum_j exp(G_S - G_j) m(k_j) v_j,  norm' = exp(G_S) norm + sum_j exp(G_S - G_j) m(k_j)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power.symmetric import coefficients, even_power, expanded_dim, monomials, monomials_backward
from diffmax.plugin import PowerCall, PowerGradients, PowerResults, PowerSaved, PowerWanted

NARROW = frozenset({"mps", "npu", "xla"})
"""Devices where float64 cannot be taken for granted."""


def power_attention(query: Tensor, key: Tensor, value: Tensor, call: PowerCall, keep: bool) -> PowerResults:
    """Forward kernel.

    Args:
        query: (B, H, L, D), any strides.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), any strides, with S >= L or S = 0. Query head h reads key head
            h // (H / H_kv).
        call: Degree, gates and state.
        keep: Whether a backward follows.
    Returns:
        Contiguous tensors:

        - out (B, H, L, D_v), in value's dtype. A query whose weights are all 0 has 0; one whose sum of weights overflows, NaN.
        - total (B, H, L), in the accumulation dtype, the sum of each query's weights; (0,) if not `keep`.
        - sums (B, H_kv, P, D_v) and norm (B, H_kv, P), in the accumulation dtype, the state after the last key; (0,) if not
          `call.final`.
        - exact (B, H, L, D_v), in the accumulation dtype, `out` before it was rounded to a narrower one; (0,) if it was not, or
          if not `keep`. A backward that knew only the rounded result would give gates a gradient without its last digits.
    """
    terms = _Terms.of(query, key, value, call)
    weights = terms.weights(call)
    total, result = weights.sum(-1), weights @ terms.value.unsqueeze(2)
    if call.sums is not None and call.norm is not None:
        phi = terms.phi(call) * terms.since_start.unsqueeze(-1)
        total = total + (phi @ call.norm[:, :, None, :, None]).squeeze(-1)
        result = result + phi @ call.sums.unsqueeze(2)
    out = (result / _not_zero(total).unsqueeze(-1)).masked_fill((total == 0).unsqueeze(-1), 0.0)
    out = out.masked_fill((total == torch.inf).unsqueeze(-1), torch.nan)
    sums, norm = _final_state(terms, call) if call.final else (total.new_empty(0), total.new_empty(0))
    exact = out.reshape(*query.shape[:3], value.shape[3]).contiguous()
    total = total.reshape(query.shape[:3]).contiguous() if keep else total.new_empty(0)
    if exact.dtype == value.dtype:
        return PowerResults(exact, total, sums, norm, total.new_empty(0))
    return PowerResults(exact.to(value.dtype), total, sums, norm, exact if keep else total.new_empty(0))


def power_attention_backward(
    grad: Tensor,
    grad_sums: Tensor | None,
    grad_norm: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: PowerSaved,
    call: PowerCall,
    wanted: PowerWanted,
) -> PowerGradients:
    """Backward kernel (docs/theory.md, Eq. 33 and 34).

    Args:
        grad: Gradient for out, any strides.
        grad_sums, grad_norm: Gradients for the state after the last key, both or neither.
        query, key, value, call: As for the forward.
        saved: The results of any forward kernel for them. Here they are computed again.
        wanted: Whether to compute the gradients for the gates and for the state before the first key.
    Returns:
        Gradients for query, key and value, contiguous, in their dtypes; for log_gates, sums and norm in their shapes and the
        accumulation dtype, (0,) if not wanted. A query whose weights are all 0 propagates none.
    """
    del saved
    found = power_attention(query, key, value, call, True)
    terms, acc, exact = _Terms.of(query, key, value, call), accumulation_dtype(query.dtype), found.saved.out
    total = found.total.view(terms.seen_scores.shape[:-1])
    a = grad.to(acc).reshape(*total.shape, value.shape[3]) / _not_zero(total).unsqueeze(-1)
    a = a.masked_fill((total == 0).unsqueeze(-1), 0.0)
    mean = (a * exact.view(a.shape)).sum(-1)
    v = terms.value.unsqueeze(2)
    of_weights = a @ v.mT - mean.unsqueeze(-1)
    weights = terms.weights(call)
    slope = terms.decay * call.degree * terms.seen_scores
    if call.degree > 2:
        slope = slope * even_power(terms.seen_scores, call.degree - 2)
    of_scores = of_weights * slope * call.scale
    grad_query = of_scores @ terms.key.unsqueeze(2)
    grad_key = (of_scores.mT @ terms.query).sum(2)
    grad_value = (weights.mT @ a).sum(2)
    moved = of_weights * weights
    of_query, of_key = moved.sum(-1).sum(2), -moved.sum(2).sum(2)  # of G, at the positions of queries and keys
    of_sums = of_norm = of_end = None
    if call.sums is not None and call.norm is not None:
        phi, since = terms.phi(call), terms.since_start.unsqueeze(-1)
        of_phi = since * (a @ call.sums.unsqueeze(2).mT - mean.unsqueeze(-1) * call.norm[:, :, None, None, :])
        c = coefficients(query.shape[3], call.degree, of_phi)
        grad_query = grad_query + call.scale * monomials_backward(terms.query * call.scale, of_phi * c, call.degree)
        of_query = of_query + (of_phi * phi).sum(-1).sum(2)
        of_sums = ((phi * since).mT @ a).sum(2)
        of_norm = -((phi * since) * mean.unsqueeze(-1)).sum(-2).sum(2)
    if grad_sums is not None and grad_norm is not None:
        m, until = monomials(terms.key, call.degree), terms.until_end.unsqueeze(-1)
        grad_value = grad_value + until * (m @ grad_sums)
        of_m = until * (terms.value @ grad_sums.mT + grad_norm.unsqueeze(2))
        grad_key = grad_key + monomials_backward(terms.key, of_m, call.degree)
        of_key = of_key - (of_m * m).sum(-1)
        sums, norm = _final_state(terms, call)
        of_end = (grad_sums * sums).sum((-1, -2)) + (grad_norm * norm).sum(-1)
        if of_sums is not None and of_norm is not None:
            whole = terms.whole.exp()
            of_sums, of_norm = of_sums + whole[..., None, None] * grad_sums, of_norm + whole.unsqueeze(-1) * grad_norm
    of_gates = total.new_empty(0)
    if wanted.log_gates and call.log_gates is not None:
        size = key.shape[2]
        of_g = of_key + torch.nn.functional.pad(of_query, (size - query.shape[2], 0)) if size else of_key
        if size and of_end is not None:
            of_g = of_g + torch.nn.functional.pad(of_end.unsqueeze(-1), (size - 1, 0))
        of_gates = suffix_sums(of_g).to(acc)
    keep_state = wanted.state and of_sums is not None
    return PowerGradients(
        grad_query.reshape(query.shape).to(query.dtype).contiguous(),
        grad_key.to(key.dtype).contiguous(),
        grad_value.to(value.dtype).contiguous(),
        of_gates,
        of_sums if keep_state and of_sums is not None else total.new_empty(0),
        of_norm if keep_state and of_norm is not None else total.new_empty(0),
    )


def cumulated(log_gates: Tensor) -> Tensor:
    """G: sums of log gates, in float64 where the device has it, so that differences of large sums keep their digits."""
    return log_gates.cumsum(-1) if log_gates.device.type in NARROW else log_gates.double().cumsum(-1)


def suffix_sums(of_g: Tensor) -> Tensor:
    """The gradient for log gates from that for their sums: what comes from a key on; in float64 where the device has it."""
    wide = of_g if of_g.device.type in NARROW else of_g.double()
    return wide.flip(-1).cumsum(-1).flip(-1)


class _Terms(NamedTuple):
    """What forward and backward both need: (B, H_kv, ...) in the accumulation dtype, queries (B, H_kv, H / H_kv, L, D).

    `seen_scores` and `decay` are (B, H_kv, H / H_kv or 1, L, S), both 0 for keys that are not seen. `since_start`
    (B, H_kv, 1, L) is exp(G_t), `until_end` (B, H_kv, S) exp(G_S - G_j), `whole` (B, H_kv) G_S.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    seen_scores: Tensor
    decay: Tensor
    since_start: Tensor
    until_end: Tensor
    whole: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, call: PowerCall) -> _Terms:
        acc = accumulation_dtype(query.dtype)
        batch, heads, length, size = query.shape
        groups, many = key.shape[1:3]
        q = query.to(acc).reshape(batch, groups, heads // groups if groups else 1, length, size)
        k, v = key.to(acc), value.to(acc)
        place = torch.arange(many, device=query.device)
        hidden = place > place[many - length :].unsqueeze(1) if many else place.new_zeros((length, 0), dtype=torch.bool)
        scores = (q @ k.unsqueeze(2).mT * call.scale).masked_fill(hidden, 0.0)
        if call.log_gates is None or not many:
            visible = (~hidden).to(acc).expand(batch, groups, 1, length, many)
            one = q.new_ones(())
            flat = (one.expand(batch, groups, 1, length), one.expand(batch, groups, many), (one - 1).expand(batch, groups))
            return cls(q, k, v, scores, visible, *flat)
        g = cumulated(call.log_gates)
        of_query = g[..., many - length :]
        decay = (of_query.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(hidden, -torch.inf).exp().to(acc).unsqueeze(2)
        until, whole = (g[..., -1:] - g).exp().to(acc), g[..., -1].to(acc)
        return cls(q, k, v, scores, decay, of_query.exp().to(acc).unsqueeze(2), until, whole)

    def weights(self, call: PowerCall) -> Tensor:
        """Of the pairs."""
        return even_power(self.seen_scores, call.degree) * self.decay

    def phi(self, call: PowerCall) -> Tensor:
        """(B, H_kv, H / H_kv, L, P), the monomials of scaled queries times their coefficients."""
        c = coefficients(self.query.shape[-1], call.degree, self.query)
        return monomials(self.query * call.scale, call.degree) * c


def _final_state(terms: _Terms, call: PowerCall) -> tuple[Tensor, Tensor]:
    m = monomials(terms.key, call.degree) * terms.until_end.unsqueeze(-1)
    sums, norm = m.mT @ terms.value, m.sum(-2)
    if call.sums is not None and call.norm is not None:
        whole = terms.whole.exp()
        sums, norm = sums + whole[..., None, None] * call.sums, norm + whole.unsqueeze(-1) * call.norm
    return sums.contiguous(), norm.contiguous()


def _not_zero(t: Tensor) -> Tensor:
    return t.masked_fill(t == 0, 1.0)


def state_shapes(key: Tensor, value: Tensor, degree: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of sums and norm."""
    rows = (*key.shape[:2], expanded_dim(key.shape[3], degree))
    return (*rows, value.shape[3]), rows
