"""The operators as compositions of torch's own, for graphs that leave Python: torch.jit.trace and ONNX.

Such a graph holds no operator of diffmax, so it runs without diffmax. It has a fixed number of steps, enough for any length up
to `LONGEST`, and uses only what every exporter supports: no log1p, no expm1, and no branch that depends on a size. All scores
and weights are in memory. Equations: docs/theory.md.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from diffmax import reference
from diffmax.operators.attention.packing import packings
from diffmax.operators.attention.scores import Region
from diffmax.operators.common.numerics import MIN_E, accumulation_dtype, clamp_e, newton_steps
from diffmax.operators.loss import terms
from diffmax.plugin import AttentionCall, AttentionResults, KVCacheCall, KVCacheResults
from diffmax.reference import attention as reference_attention
from diffmax.reference import decoding as reference_decoding

# Longer rows are solved less accurately.
LONGEST = 1 << 20

# Smaller than every relevant score, and finite: so its product with 0 in a gradient stays 0.
_HIDDEN = -1e30


def is_tracing() -> bool:
    """Whether torch.jit.trace is tracing; torch's older ONNX exporter uses it too."""
    return torch._C._get_tracing_state() is not None


def exports_onnx() -> bool:
    """Whether torch's newer ONNX exporter is decomposing operators."""
    return torch._C._len_torch_dispatch_stack() > 0 and is_in_onnx_export()


def is_in_onnx_export() -> bool:
    """Whether one of torch's ONNX exporters is running, without importing them."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def bisect(x: Tensor, e: float | Tensor, dim: int, n_iter: int, ensure_sum_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `diffmax.reference.bisect`, but differentiable: in x to third order, in e to first order."""
    acc = accumulation_dtype(x.dtype)
    scores = x.to(acc)
    row_e = e.detach() if isinstance(e, Tensor) else torch.full((), e, dtype=acc, device=x.device)
    wrong = ~((row_e >= 0) & (row_e <= 1)) | (scores.isnan() | (scores == torch.inf)).any(dim, keepdim=True)
    row_e = row_e.clamp_min(MIN_E)
    m = scores.detach().amax(dim, keepdim=True)
    z = row_e * (scores - m.masked_fill(m == -torch.inf, 0.0)).clamp_min(_HIDDEN)
    delta = _solved(z.detach(), row_e, dim, newton_steps(n_iter, LONGEST, 1.0 if isinstance(e, Tensor) else e, acc))
    solved = delta
    for _ in range(2):  # these steps change no value, but bring tau's derivatives into the graph, as in `reference.retraced`
        powers, base = _power(z, delta, row_e)
        slopes = (powers / base).sum(dim, keepdim=True)
        delta = delta + row_e * (powers.sum(dim, keepdim=True) - 1) / _not_zero(slopes)
    p = _power(z, delta, row_e)[0]
    if ensure_sum_one:
        p = p / _not_zero(p.sum(dim, keepdim=True))
    if isinstance(e, Tensor) and not is_in_onnx_export():
        # Eq. 4 explicitly, as a product with 0: derivatives of the steps would lose all digits as alpha -> 1
        p = p + reference.bisect_jvp(None, e - e.detach(), p.detach(), m, solved, None, row_e, dim)
    return p.masked_fill(wrong, torch.nan).to(x.dtype), m, solved


def _solved(z: Tensor, e: Tensor, dim: int, steps: int) -> Tensor:
    """Newton's method, as in `reference.bisect`."""
    delta = torch.zeros_like(z.sum(dim, keepdim=True))
    for _ in range(steps):
        powers, base = _power(z, delta, e)
        total = powers.sum(dim, keepdim=True)
        slopes = (powers / base).sum(dim, keepdim=True)
        step = -total * _expm1(-e * _not_zero(total).log()) / _not_zero(slopes)
        delta = delta + step
    return delta


def _power(z: Tensor, delta: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """[z - t]^(1/e) with t = delta - 1, and the base z - t; off the support 0 and 1."""
    u = z - delta
    off = ~(u > -1)
    u = u.masked_fill(off, 0.0)
    return (_log1p(u) / e).exp().masked_fill(off, 0.0), 1 + u


def _log1p(u: Tensor) -> Tensor:
    """ln(1 + u) without log1p; the rounding error of 1 + u is corrected to first order, which is exact enough."""
    w = 1 + u
    return w.log() + (u - (w - 1)) / w


def _expm1(v: Tensor) -> Tensor:
    """exp(v) - 1 without expm1, with the same correction."""
    y = v.exp()
    return (y - 1) + y * (v - y.log())


def _not_zero(t: Tensor) -> Tensor:
    return t.masked_fill(t == 0, 1.0)


def attention(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, stats: bool) -> AttentionResults:
    """As `diffmax.reference.attention.attention`, but differentiable."""
    if stats:  # the share of empty tiles depends on their number, on which the graph cannot branch
        raise NotImplementedError(
            "diffmax.attention: return_stats must be False where a graph is traced, got True\n"
            "ask for statistics in a call that is not traced"
        )
    if call.cu_seqlens_q is None:
        return reference_attention.attention(query, key, value, call, False, stats, bisect)
    region = _SideBySide(query, key, call)
    return reference_attention.attend(query, key, value, reference_attention.padded_call(call), False, stats, bisect, region)


class _SideBySide(Region):
    """Packed sequences as one long sequence, in which tokens of different sequences are masked for each other."""

    def __init__(self, query: Tensor, key: Tensor, call: AttentionCall) -> None:
        if call.dropout_p > 0:
            raise NotImplementedError(
                f"diffmax.attention_varlen: dropout_p must be 0 where a graph is traced, got {call.dropout_p}\n"
                "trace the model after model.eval()"
            )
        queries, keys = packings(call)
        place_q, self._of_query = _places(query.shape[2], queries.ends)
        place_k, self._of_key = _places(key.shape[2], keys.ends)
        offset = keys.lengths - queries.lengths if call.lower_right else torch.zeros_like(queries.lengths)
        self._queries = place_q + (offset - queries.starts)[self._of_query.clamp_max(queries.ends.shape[0] - 1)]
        self._keys = place_k - keys.starts[self._of_key.clamp_max(keys.ends.shape[0] - 1)]
        self._outside = place_k >= keys.ends[-1]

    def queries(self) -> Tensor:
        """(T_q, 1), positions in the sequences."""
        return self._queries.unsqueeze(1)

    def keys(self) -> Tensor:
        """(T_k,), positions in the sequences."""
        return self._keys

    def of_heads(self, t: Tensor) -> Tensor:
        """(1, H, 1, 1)."""
        return (t if t.ndim == 2 else t.unsqueeze(0))[..., None, None]

    def padding(self) -> tuple[Tensor, ...]:
        """Keys that belong to another sequence, or to none."""
        return ((self._of_query.unsqueeze(1) != self._of_key) | self._outside,)


def _places(total: int, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The position of each token in the packed tensor, and the index of its sequence, which is unused after the last one."""
    place = torch.arange(total, device=ends.device)
    return place, (place.unsqueeze(1) >= ends).sum(1)


def loss(x: Tensor, target: Tensor, e: float | Tensor, dim: int, n_iter: int) -> Tensor:
    """The losses of `diffmax.operators.loss.terms.loss`, with first-order gradients for x and e."""
    acc = accumulation_dtype(x.dtype)
    scores = x.to(acc)
    p, m, delta = (t.detach() for t in bisect(scores, e, dim, n_iter, True))
    soft = target.is_floating_point()
    row_e = clamp_e(e.detach() if isinstance(e, Tensor) else e)
    solved = (scores.detach(), target, p.clone(), m, delta, row_e, dim)
    losses = terms.soft_losses(*solved, _expm1) if soft else terms._index_losses(*solved)
    if is_in_onnx_export():
        return losses
    # explicit gradients: p - y for x, and the slope of Omega for e; the term that carries them is 0
    y = target.to(acc) if soft else torch.zeros_like(p).scatter(dim, target.clamp_min(0), 1.0)
    idle = terms.silent(target, m == -torch.inf)
    carried = ((p - y) * scores.masked_fill(scores == -torch.inf, 0.0)).sum(dim, keepdim=True)
    if isinstance(e, Tensor):
        carried = carried + terms.omega_slopes(target, p, row_e, dim) * e
    return losses + (carried - carried.detach()).masked_fill(idle, 0.0)


def kvcache(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool) -> KVCacheResults:
    """As `diffmax.reference.decoding.attention_kvcache`."""
    if call.k is not None and is_in_onnx_export():
        raise NotImplementedError(
            "diffmax.attention_with_kvcache: an ONNX graph cannot change the caches, and k and v are given\n"
            "write the new tokens into caches that the model returns, and call without k and v"
        )
    return reference_decoding.attention_kvcache(query, k_cache, v_cache, call, stats, bisect)
