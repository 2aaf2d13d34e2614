"""Threshold attention for CPUs: blocks of queries against the keys that they can see, without the matrix of weights.

Forward, per block: the scores, what thresholds are subtracted from, the weights; columns without any weight are left out of the
product with the values. Backward computes a block's weights again, and takes the same columns.

`forward` and `backward` run on any device: diffmax_npu uses them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffmax.kernels.cpu import rows
from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import accumulation_dtype, alpha_weight, clamp_e
from diffmax.plugin import ThresholdCall, ThresholdGradients, ThresholdResults, ThresholdSaved, ThresholdWanted

PAIRS = 1 << 18  # of queries and keys in memory at once, unless one query sees more
ROWS = 128  # queries of a block
SPARSE = 0.5  # the share of live columns up to which the others are left out


def forward(query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall, keep: bool) -> ThresholdResults:
    """Forward kernel; arguments and results as `diffmax.reference.threshold.threshold_attention`."""
    acc, shape = accumulation_dtype(query.dtype), query.shape[:3]
    out = value.new_zeros((*shape, value.shape[3]))
    mass = query.new_zeros(shape, dtype=acc)
    statistic = mass.new_full(shape if keep and call.weights != "scores" else (0,), -torch.inf)
    for q_of, k_of, alone in _sequences(call):
        for block in _blocks(query[:, :, q_of], key[:, :, k_of], value[:, :, k_of], alone):
            weights = block.weights(None)
            if statistic.ndim > 1:
                block.write(statistic[:, :, q_of], block.statistic)
            block.write(mass[:, :, q_of], weights.sum(2))
            columns = _live(weights)
            v = block.value
            if columns is not None:
                weights, v = weights[:, :, columns], v[:, columns]
            block.write(out[:, :, q_of], block.grouped(weights) @ v)
    return ThresholdResults(out, mass, statistic)


def backward(
    grad: Tensor,
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: ThresholdSaved,
    call: ThresholdCall,
    wanted: ThresholdWanted,
) -> ThresholdGradients:
    """Backward kernel; arguments and results as `diffmax.reference.threshold.threshold_attention_backward`."""
    acc, softmax = accumulation_dtype(query.dtype), call.weights == "softmax"
    of_query, of_key, of_value = (torch.zeros(t.shape, dtype=acc, device=t.device) for t in (query, key, value))
    of_theta = of_query.new_zeros(query.shape[:3] if wanted.theta else (0,))
    of_bias = of_query.new_zeros(call.bias.shape if wanted.bias and call.bias is not None else (0,))
    of_e = of_query.new_zeros(query.shape[:3] if wanted.e else (0,))
    for q_of, k_of, alone in _sequences(call):
        for block in _blocks(query[:, :, q_of], key[:, :, k_of], value[:, :, k_of], alone):
            weights = block.weights(saved.statistic[:, :, q_of] if softmax else None)
            columns = _live(weights)
            g, v = block.grouped(block.rows_of(grad[:, :, q_of]).to(acc)), block.value
            rectified = block.rectified
            if columns is not None:
                weights, v, rectified = weights[:, :, columns], v[:, columns], rectified[:, :, columns]
            block.add_to_keys(of_value[:, :, k_of], block.grouped(weights).mT @ g, columns)
            of_u = (g @ v.mT).view(rectified.shape)
            if grad_mass is not None:
                of_u += block.rows_of(grad_mass[:, :, q_of]).unsqueeze(2)
            of_u.mul_(_slopes(rectified, call.power))
            if wanted.theta:
                block.write(of_theta[:, :, q_of], of_u.sum(2).neg_())
            of_scores = block.of_scores(of_u, columns, of_e[:, :, q_of] if wanted.e else None)
            if of_scores.shape[2] != block.last:
                assert columns is not None  # noqa: S101  # no others have fewer columns
                k, kept = block.key[:, columns], columns
            else:
                k, kept = block.key, None
            if of_bias.ndim > 1:
                block.add_to_bias(of_bias, of_scores, kept)
            product = block.grouped(of_scores)
            block.write(of_query[:, :, q_of], (product @ k).mul_(call.scale))
            block.add_to_keys(of_key[:, :, k_of], product.mT @ block.scaled, kept)
    of_tensors = (of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype))
    return ThresholdGradients(*of_tensors, of_theta, of_bias, of_e)


threshold_attention = alone_in_child(forward)
threshold_attention_backward = alone_in_child(backward)


def _sequences(call: ThresholdCall) -> Iterator[tuple[slice, slice, ThresholdCall]]:
    """The queries and keys of each packed sequence, with a call for it alone; or of all."""
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        yield slice(None), slice(None), call
        return
    ends_q, ends_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for n in range(len(ends_q) - 1):
        of = slice(ends_q[n], ends_q[n + 1])
        yield (
            of,
            slice(ends_k[n], ends_k[n + 1]),
            replace(call, theta=call.theta[:, :, of], cu_seqlens_q=None, cu_seqlens_k=None),
        )


def _blocks(query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall) -> Iterator[_Block]:
    """Blocks of queries that see a key, of some heads of a sequence at once."""
    batch, kv_heads, many = key.shape[:3]
    length, groups = query.shape[2], query.shape[1] // max(kv_heads, 1)
    if not (query.numel() or query.shape[3] == 0) or not many or not length:
        return
    count = max(1, min(length, ROWS, PAIRS // (groups * many)))
    together = max(1, min(kv_heads, PAIRS // (groups * many * count)))
    acc = accumulation_dtype(query.dtype)
    for b in range(batch):
        for first in range(0, kv_heads, together):
            of = slice(first, min(first + together, kv_heads))
            k, v = key[b, of].to(acc), value[b, of].to(acc)
            for start in range(0, length, count):
                end = min(start + count, length)
                keys = _seen(call, start + many - length, end + many - length, many)
                if keys.start < keys.stop:
                    shift = many - length - keys.start
                    yield _Block(query, k[:, keys], v[:, keys], call, b, of, groups, start, end, shift, keys.start)


def _seen(call: ThresholdCall, first: int, end: int, many: int) -> slice:
    """The keys that queries at the positions from `first` up to `end` may see."""
    start = max(0, first - call.left) if call.left >= 0 else 0
    return slice(start, min(many, max(0, end + call.right)) if call.right >= 0 else many)


def _live(weights: Tensor) -> Tensor | None:
    """The columns that hold a weight; None where most do."""
    columns = ~(weights.amax((0, 1)) <= 0)
    count = int(columns.sum())
    return columns.nonzero().squeeze(1) if count <= SPARSE * weights.shape[2] else None


def _slopes(rectified: Tensor, power: float) -> Tensor:
    """The derivatives of the weights, 0 where there is none."""
    if power == 2:
        return 2 * rectified
    if power == 1:
        return torch.where(rectified > 0, 1.0, rectified)  # NaN stays
    off = rectified == 0
    return rectified.masked_fill(off, 1.0).pow_(power - 1).mul_(power).masked_fill_(off, 0.0)


@dataclass
class _Block:
    """Queries `start` to `end` of the heads that read the key heads `of`, of sequence b, with `last` keys from `first` on.

    Query i has the position i + `offset` among these keys.

    Matrices are (heads, rows, keys), or, grouped, (key heads, groups * rows, keys).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    call: ThresholdCall
    b: int
    of: slice
    groups: int
    start: int
    end: int
    offset: int
    first: int

    def __post_init__(self) -> None:
        self.last = self.key.shape[1]
        self.heads = slice(self.of.start * self.groups, self.of.stop * self.groups)
        self.count = self.end - self.start
        self.scaled = self.grouped(self.rows_of(self.query).to(self.key.dtype)) * self.call.scale
        self.u = self.rectified = self.statistic = self.key.new_empty(0)

    def rows_of(self, t: Tensor) -> Tensor:
        """The block's part of (B or 1, H, L, ...)."""
        return t[self.b if t.shape[0] > 1 else 0, self.heads, self.start : self.end]

    def grouped(self, t: Tensor) -> Tensor:
        """(heads, rows, n) with the heads of one key head stacked along the rows."""
        return t.reshape(self.of.stop - self.of.start, self.groups * self.count, t.shape[2])

    def write(self, target: Tensor, rows: Tensor) -> None:
        """Put the block's rows where they belong."""
        place = self.rows_of(target)
        place.copy_(rows.reshape(place.shape))

    def add_to_keys(self, target: Tensor, share: Tensor, columns: Tensor | None) -> None:
        """Add to the gradient of keys or values."""
        place = target[self.b, self.of, self.first : self.first + self.last]
        if columns is None:
            place += share
        else:
            place.index_add_(1, columns, share)

    def weights(self, saved: Tensor | None) -> Tensor:
        """The weights; `u`, `rectified` and `statistic` are kept. `saved`: the statistic, if it is known."""
        call = self.call
        scores = (self.scaled @ self.key.mT).view(-1, self.count, self.last)
        self._add_bias(scores)
        self._hide(scores, -torch.inf)
        self.u = scores if call.weights == "scores" else self._normalized(scores, saved)
        rectified = (self.u - self.rows_of(call.theta).unsqueeze(2)).clamp_min_(0.0)
        self._hide(rectified, 0.0)
        if call.weights != "scores" and bool(self.dead.any()):
            rectified.masked_fill_(self.dead, 0.0)
        self.rectified = rectified
        if call.power == 1:
            return rectified
        return rectified.square() if call.power == 2 else rectified.pow(call.power)

    def _normalized(self, scores: Tensor, saved: Tensor | None) -> Tensor:
        if self.call.weights == "diffmax":
            flat = scores.view(-1, self.last)
            e = self._per_row_e()
            p, m, delta = rows.bisect(flat, e, 1, 200, True)
            self.statistic = (m - (1 - delta) / clamp_e(e)).view(scores.shape[:2])
            self.dead = (m == -torch.inf).view(*scores.shape[:2], 1)
            return p.view(scores.shape)
        if saved is not None:
            lse = self.rows_of(saved).unsqueeze(2)
            self.dead = lse == -torch.inf
            return scores.sub_(lse.masked_fill(self.dead, 0.0)).exp_()
        m = scores.amax(2, keepdim=True)
        self.dead = m == -torch.inf  # of these queries all visible scores are -inf, or none is visible
        p = scores.softmax(2)
        # the largest weight is exp(m - lse)
        self.statistic = (m - p.amax(2, keepdim=True).log()).masked_fill_(self.dead, -torch.inf).squeeze(2)
        return p.masked_fill_(self.dead, 0.0) if bool(self.dead.any()) else p

    def _per_row_e(self) -> float | Tensor:
        """e, or one number per row of the block (n, 1)."""
        e = self.call.e
        return e[self.heads].repeat_interleave(self.count).unsqueeze(1) if isinstance(e, Tensor) else e

    def _write_of_e(self, target: Tensor, of_u: Tensor, columns: Tensor | None, mean: Tensor, e: float | Tensor) -> None:
        u = self.u.view(-1, self.last)
        weight = alpha_weight(u, u.masked_fill(u == 0, 1.0).log_(), e).view(self.u.shape)
        there = weight if columns is None else weight[:, :, columns]
        self.write(target, (weight.sum(2) * mean.squeeze(2)).sub_((there * of_u).sum(2)))

    def _hide(self, t: Tensor, by: float) -> None:
        """Fill what is hidden."""
        left, right = self.call.left, self.call.right
        first, last = self.start + self.offset, self.end + self.offset
        low = max(0, first + right + 1) if right >= 0 else self.last
        high = min(self.last, last - 1 - left) if left >= 0 else 0
        if low < self.last or high > 0:
            position = torch.arange(first, last, device=t.device).unsqueeze(1)
            if low < self.last:
                t[:, :, low:].masked_fill_(torch.arange(low, self.last, device=t.device) > position + right, by)
            if high > 0:
                t[:, :, :high].masked_fill_(torch.arange(high, device=t.device) < position - left, by)
        if self.call.mask is not None:
            mask = self.call.mask
            mask = mask[self.b if mask.shape[0] > 1 else 0]
            mask = mask[self.heads] if mask.shape[0] > 1 else mask
            mask = mask[:, self.start : self.end] if mask.shape[1] > 1 else mask
            t.masked_fill_(~(mask[..., self.first : self.first + self.last] if mask.shape[2] > 1 else mask), by)

    def of_scores(self, of_u: Tensor, columns: Tensor | None, of_e: Tensor | None) -> Tensor:
        """The gradient for scores from that for u, which is 0 outside `columns`. `of_e`: where that for e is wanted."""
        kind = self.call.weights
        if kind == "scores":
            return of_u
        slope = self.u
        if kind == "diffmax":
            e = clamp_e(self._per_row_e())
            slope = rows._slopes(self.u.view(-1, self.last), e).view(self.u.shape)
        there = slope if columns is None else slope[:, :, columns]
        mean = (of_u * there).sum(2, keepdim=True)
        if kind == "diffmax":
            total = slope.sum(2, keepdim=True)
            mean /= total.masked_fill(total == 0, 1.0)
            if of_e is not None:
                self._write_of_e(of_e, of_u, columns, mean, e)
        of_u.mul_(there)
        if columns is None:
            return of_u.sub_(slope * mean)
        return (slope * -mean).index_add_(2, columns, of_u)

    def _reach(self, width: int) -> tuple[int, int]:
        """The keys that a bias of this width may be added to."""
        position = self.start + self.offset
        return max(0, position - width + 1), max(0, min(self.last, position + self.count))

    def _add_bias(self, scores: Tensor) -> None:
        bias = self.call.bias
        if bias is None or not bias.shape[1]:
            return
        first, last = self._reach(bias.shape[1])
        if first >= last:
            return
        # by distance, from the farthest that the block has to the nearest; row i of the windows below begins at its own
        farthest, nearest = self.end - 1 + self.offset - first, self.start + self.offset - (last - 1)
        table = bias[self.heads, max(nearest, 0) : farthest + 1]
        table = pad(table, (max(-nearest, 0), farthest + 1 - max(nearest, 0) - table.shape[1])).flip(1)
        scores[:, :, first:last] += table.unfold(1, last - first, 1).flip(1)

    def add_to_bias(self, target: Tensor, of_scores: Tensor, columns: Tensor | None) -> None:
        """Add the sums over the keys at each distance."""
        width = target.shape[1]
        first, last = self._reach(width)
        if first >= last:
            return
        if columns is not None:
            whole = of_scores.new_zeros(*of_scores.shape[:2], self.last)
            of_scores = whole.index_copy_(2, columns, of_scores)
        part, size = of_scores[:, :, first:last].flip(1), last - first
        # rows of one width more, laid end to end, shift each row by one: then a distance is a column
        skewed = pad(part, (0, self.count)).flatten(1)[:, : -self.count or None]
        sums = skewed.view(-1, self.count, size + self.count - 1).sum(1).flip(1)
        nearest = self.start + self.offset - (last - 1)
        low, high = max(nearest, 0), min(nearest + sums.shape[1], width)
        target[self.heads, low:high] += sums[:, low - nearest : high - nearest]
