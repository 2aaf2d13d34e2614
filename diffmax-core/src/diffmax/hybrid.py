"""`HybridCache`: recent tokens attended exactly by diffmax, older ones folded into a state of power attention.

With a tail of n tokens, of which the first has position b, a query at position t, and p the degree (docs/decisions/0096):

    past_t = the power attention's mean of values over the keys 0 .. b - 1,  N = sum of their decays exp(G_t - G_j)
    s_past = slope * (sum_j (scale * q_t . k_j)^p exp(G_t - G_j) / N)^(1/p) + (1 - N^(alpha - 1)) / (1 - alpha) + offset
    P      = diffmax([s_past, scale * q_t . k_b, .., scale * q_t . k_t]),  out_t = P_0 past_t + sum_j P_j v_j

The last two columns of the stored keys and values make one call of `diffmax.attention` of this: the first key is 0 .. 0 1 1 and
meets s_past at the end of the query, its value is 0 .. 0 1 0, so that the output ends with P_0.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention.api import attention
from diffmax.operators.attention.checks import check_alpha, check_heads, check_scale
from diffmax.operators.common.autocast import autocast, without_autocast
from diffmax.operators.common.checks import _shape, as_int, check_tensor, has_shape, is_whole, to_float
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power.api import power_attention
from diffmax.operators.power.checks import check_degree, finite_gates
from diffmax.operators.power.state import PowerState
from diffmax.operators.power.symmetric import coefficients, monomials

_NAME = "diffmax.HybridCache"
_MORE = 2  # columns behind a key or value: the past's score in two parts, so that 16 bits do not round it


class _Tail(NamedTuple):
    """The tokens that are not folded, heads first; the first row of key and value is the past's.

    Attributes:
        key, value: (B, H_kv, 1 + n, D + 2) and (B, H_kv, 1 + n, D_v + 2).
        gates: (B, H_kv, n), log gates in the accumulation dtype, or None.
        padding: (B, n), True at padding, or None.
    """

    key: Tensor
    value: Tensor
    gates: Tensor | None
    padding: Tensor | None

    @property
    def length(self) -> int:
        """n."""
        return self.key.shape[2] - 1

    def part(self, begin: int, end: int) -> _Tail:
        """Those of its tokens, behind the row of the past."""
        rest = (None if t is None else t[..., begin:end] for t in (self.gates, self.padding))
        if begin == 0:
            return _Tail(self.key[:, :, : 1 + end], self.value[:, :, : 1 + end], *rest)
        kept = (torch.cat([t[:, :, :1], t[:, :, 1 + begin : 1 + end]], 2) for t in (self.key, self.value))
        return _Tail(*kept, *rest)


class _Past(NamedTuple):
    """A power state, and N (B, H_kv) at the tail's start."""

    sums: Tensor
    norm: Tensor
    total: Tensor


class _Options(NamedTuple):
    """Of one call."""

    scale: float
    alpha: float | Tensor
    e: float | Tensor
    offset: Tensor | float
    slope: Tensor | float
    backend: str | None


class HybridCache:
    """A cache of constant size: a tail of recent tokens, attended sparsely by diffmax, and a power state for all older ones.

    A query sees the last `tail` to `tail + block - 1` tokens exactly. The older ones are one more key: its value is their power
    attention's output, its score a power mean of their scores (docs/decisions/0096). So the weights of a query remain a
    probability vector with exact zeros, also for the past as a whole. Whole blocks of tokens move from the tail to the state.

    Args:
        tail: Number of recent tokens that each query sees exactly, at least.
        block: Tokens that are folded at a time.
        degree: p of the power attention, even. The state has C(D + p - 1, p) rows per head.
    Raises:
        TypeError, ValueError: A number has the wrong type or is out of range.
    Source: docs/decisions/0096-the-past-as-one-key.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> cache = diffmax.HybridCache(tail=64, block=16)
        >>> q, k, v = torch.randn(1, 1000, 8, 16), *torch.randn(2, 1, 1000, 2, 16)
        >>> cache.attend(q, k, v, alpha=0.8).shape
        torch.Size([1, 1000, 8, 16])
        >>> token = slice(0, 1)
        >>> with torch.no_grad():
        ...     for step in range(100):
        ...         out = cache.attend(q[:, token], k[:, token], v[:, token], alpha=0.8)
        >>> len(cache), cache.memory
        (1100, 41832)
    """

    def __init__(self, tail: int = 1024, *, block: int = 128, degree: int = 2) -> None:
        for what, number in (("tail", tail), ("block", block)):
            if not is_whole(number):
                raise TypeError(f"{_NAME}: {what} must be an int, got {number!r} of type {type(number).__name__}")
            if number < 1:
                raise ValueError(f"{_NAME}: {what} must be at least 1, got {number}")
        self.tail, self.block, self.degree = as_int(tail), as_int(block), check_degree(_NAME, degree)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._length = 0
        self._tail: _Tail | None = None
        self._room: tuple[Tensor, Tensor] | None = None  # in which the tail's keys and values lie, without gradients
        self._state: _Past | None = None

    def __len__(self) -> int:
        return self._length

    def __bool__(self) -> bool:
        return True  # an empty cache is a cache

    def __copy__(self) -> HybridCache:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._room = None
        if self._room is not None and self._tail is not None:  # this one's next tokens are written there
            made._tail = self._tail._replace(key=self._tail.key.clone(), value=self._tail.value.clone())
        return made

    def __repr__(self) -> str:
        return f"HybridCache(tail={self.tail}, block={self.block}, degree={self.degree}), {self._length} tokens"

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first token."""
        return -1 if self._tail is None else self._tail.key.shape[0]

    @property
    def state(self) -> PowerState | None:
        """The state of the tokens before the tail; None while all are in it."""
        return None if self._state is None else PowerState(*self._state[:2])

    @property
    def memory(self) -> int:
        """Bytes held, for all sequences of the batch. Without gradients it is constant from the first folded block on."""
        held = [] if self._tail is None else [*(self._room or self._tail[:2]), *self._tail[2:]]
        return sum(t.numel() * t.element_size() for t in (*held, *(self._state or ())) if t is not None)

    def detach(self) -> None:
        """Cut the gradients of what was stored, for truncated backpropagation through time."""
        self._map(Tensor.detach)

    def reorder(self, index: Tensor) -> None:
        """Replace the sequences by those with these numbers, (B,) or of another length: for beam search."""
        if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point():
            got = _shape(index) if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"{_NAME}: reorder must be given a tensor (B,) of numbers of sequences, got {got}")
        if index.device.type == "cpu" and index.numel() and self._tail is not None:
            low, high = index.min().item(), index.max().item()
            if low < 0 or high >= self.batch_size:
                raise ValueError(f"{_NAME}: reorder must be given numbers from 0 to {self.batch_size - 1}, got {low} to {high}")
        self._map(lambda t: t.index_select(0, index.to(t.device)))

    def crop(self, length: int) -> None:
        """Refused, unless it removes nothing.

        Raises:
            NotImplementedError: Tokens that are folded into a state cannot be taken out again.
        """
        if length != self._length:
            raise NotImplementedError(
                f"{_NAME}: crop must keep all {self._length} tokens, got {length}\n"
                "tokens that are folded into the state cannot be taken out: keep a copy of the cache (copy.deepcopy), or reset"
            )

    def _map(self, change: Any) -> None:
        if self._tail is not None:
            self._tail = _Tail(*(None if t is None else change(t) for t in self._tail))  # type: ignore[arg-type]
        self._room = None
        self._state = None if self._state is None else _Past(*(change(t) for t in self._state))

    @alone_in_child
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_gates: Tensor | None = None,
        *,
        alpha: float | Tensor = 0.9,
        softmax_scale: float | None = None,
        offset: float | Tensor = 0.0,
        slope: float | Tensor = 1.0,
        padding: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Append tokens, and attend from the last of them: causal, one token at a time or many.

        Args:
            q: (B, L, H, D), already rotated. float16, bfloat16, float32 or float64.
            k, v: (B, L_new, H_kv, D) and (B, L_new, H_kv, D_v), of q's dtype, L_new >= L: the new tokens, of which the last L
                have queries. Query head h reads head h // (H / H_kv).
            log_gates: (B, L_new, H_kv), floating: the past fades by exp(log_gates[j]) at token j. The tail does not.
            alpha: As for `diffmax.attention`. torch.tensor(1.0) is softmax.
            softmax_scale: Factor of the scores; None: 1 / sqrt(D).
            offset: Added to the past's score, a float or (H,); may require gradients. -inf: no past.
            slope: Factor of the power mean in the past's score, likewise.
            padding: Boolean (B, L_new), True at padding, which is not seen. Blocks are counted with it.
            backend: As for `diffmax.attention`.
        Returns:
            (B, L, H, D_v), contiguous, in q's dtype. A query that sees nothing returns zeros.
        Raises:
            TypeError, ValueError: An argument has the wrong type, shape, device or value, or does not fit the stored tokens.
        Numerics: As of `diffmax.attention` and `diffmax.power_attention`. How tokens are divided among calls changes rounding
            alone. What is stored keeps its gradients: see `detach`.
        """
        q, k, v = autocast(q, k, v)
        before = self._length, self._tail, self._room, self._state
        try:
            with without_autocast(q):  # the past's sums are products in float32
                return self._attend(q, k, v, log_gates, alpha, softmax_scale, offset, slope, padding, backend)
        except BaseException:  # a call that fails changes nothing: its tokens lie behind those of the tail
            self._length, self._tail, self._room, self._state = before
            raise

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_gates: Tensor | None,
        alpha: float | Tensor,
        softmax_scale: float | None,
        offset: float | Tensor,
        slope: float | Tensor,
        padding: Tensor | None,
        backend: str | None,
    ) -> Tensor:
        heads = self._check(q, k, v, log_gates, padding)
        e, e_tensor = check_alpha(_NAME, q.transpose(1, 2), alpha, heads)
        scale = check_scale(_NAME, q, softmax_scale)
        if not scale > 0:
            raise ValueError(f"{_NAME}: softmax_scale must be positive, got {scale}\nthe past's score is a mean of magnitudes")
        options = _Options(
            scale,
            alpha,
            e if e_tensor is None else e_tensor.view(-1, 1),
            _check_per_head("offset", offset, q, heads),
            _check_per_head("slope", slope, q, heads),
            backend,
        )
        query = q.transpose(1, 2)
        if padding is not None:  # 0 times NaN would be NaN
            k, v = (t.masked_fill(padding[:, :, None, None], 0.0) for t in (k, v))
        origin = self._length - (0 if self._tail is None else self._tail.length)  # position of the tail's first token
        tail = self._appended(k.transpose(1, 2), v.transpose(1, 2), log_gates, padding)
        self._length += k.shape[1]
        done, at, begin, outs = 0, self._length - q.shape[1], 0, []
        while done < q.shape[1]:
            start = self.block * max(0, (at + 1 - self.tail) // self.block) - origin
            if start > begin:  # at a first call with few queries, many blocks at once
                self._fold(tail.part(begin, start))
                begin = start
            count = min(origin + start + self.block + self.tail - 1 - at, q.shape[1] - done)
            seen = tail.part(begin, at + count - origin)
            outs.append(self._read(query[:, :, done : done + count], seen, options))
            done, at = done + count, at + count
        self._keep(tail.part(begin, tail.length))
        return torch.cat(outs, 2).transpose(1, 2).contiguous()

    def _check(self, q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor | None, padding: Tensor | None) -> int:
        for what, t in (("q", q), ("k", k), ("v", v)):
            check_tensor(_NAME, what, t)
            if t.ndim != 4:
                raise ValueError(f"{_NAME}: {what} must have shape (B, L, H, D), got {_shape(t)}")
        if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
            raise TypeError(
                f"{_NAME}: q, k and v must have one dtype and device, got {q.dtype} on {q.device}, {k.dtype} on {k.device} "
                f"and {v.dtype} on {v.device}"
            )
        batch, new, heads, size = k.shape
        if v.shape[:3] != k.shape[:3] or q.shape[0] != batch or q.shape[3] != size or not 1 <= q.shape[1] <= new:
            raise ValueError(
                f"{_NAME}: q, k and v must have shapes (B, L, H, D), (B, L_new, H_kv, D) and (B, L_new, H_kv, D_v) with "
                f"1 <= L <= L_new, got {_shape(q)}, {_shape(k)} and {_shape(v)}"
            )
        check_heads(_NAME, q.shape[2], heads, True)
        for what, given, wanted in (("log_gates", log_gates, (batch, new, heads)), ("padding", padding, (batch, new))):
            if given is None:
                continue
            is_gates = what == "log_gates"
            kind = isinstance(given, Tensor) and (given.is_floating_point() if is_gates else given.dtype == torch.bool)
            if not kind or not has_shape(given, wanted) or given.device != k.device:
                got = f"{given.dtype} {_shape(given)} on {given.device}" if isinstance(given, Tensor) else type(given).__name__
                rule = "floating (B, L_new, H_kv)" if is_gates else "boolean (B, L_new)"
                raise ValueError(f"{_NAME}: {what} must be {rule} = {tuple(wanted)} on {k.device}, got {got}")
        if self._tail is not None:
            key, value = self._tail.key, self._tail.value
            stored = (key.shape[0], key.shape[1], key.shape[3] - _MORE, value.shape[3] - _MORE)
            if stored != (batch, heads, size, v.shape[3]) or key.dtype != k.dtype or key.device != k.device:
                raise ValueError(
                    f"{_NAME}: new tokens must be as those stored, of (B, H_kv, D, D_v) = {stored} in {key.dtype} on "
                    f"{key.device}, got {(batch, heads, size, v.shape[3])} in {k.dtype} on {k.device}\nfor others: reset()"
                )
        return int(q.shape[2])

    def _appended(self, key: Tensor, value: Tensor, log_gates: Tensor | None, padding: Tensor | None) -> _Tail:
        """The tail with new tokens, (B, H_kv, L_new, ..) but `log_gates` (B, L_new, H_kv)."""
        batch, heads, new, _ = key.shape
        stored, acc = self._tail, accumulation_dtype(key.dtype)
        gates = None if log_gates is None else log_gates.transpose(1, 2).to(acc)
        if stored is None:
            begins = ((_of_past(key, 2), key), (_of_past(value, 1), value))
            joined = [torch.cat([row, pad(t, (0, _MORE))], 2) for row, t in begins]
            gates, padding = (None if t is None else t.clone() for t in (gates, padding))  # the caller may write to its own
            return _Tail(joined[0], joined[1], gates, padding)
        n = stored.length
        gates = _joined(stored.gates, gates, key.new_zeros((batch, heads, n + new), dtype=acc), n)
        padding = _joined(stored.padding, padding, key.new_zeros((batch, n + new), dtype=torch.bool), n)
        room = self._room
        if room is None or torch.is_grad_enabled() or not _is_writable(room[0]) or n + new >= room[0].shape[2]:
            pairs = zip((stored.key, stored.value), (key, value), strict=True)
            joined = [torch.cat([old, pad(t, (0, _MORE))], 2) for old, t in pairs]
            return _Tail(joined[0], joined[1], gates, padding)
        for place, t in zip(room, (key, value), strict=True):
            place[:, :, 1 + n : 1 + n + new, : t.shape[3]] = t
        return _Tail(room[0][:, :, : 1 + n + new], room[1][:, :, : 1 + n + new], gates, padding)

    def _fold(self, tokens: _Tail) -> None:
        """Move tokens into the state."""
        key, value, gates = tokens.key[:, :, 1:, :-_MORE], tokens.value[:, :, 1:, :-_MORE], tokens.gates
        gates = None if gates is None else finite_gates(gates)
        counted = torch.ones(key.shape[:3], dtype=accumulation_dtype(key.dtype), device=key.device)
        if tokens.padding is not None:
            hidden = tokens.padding.unsqueeze(1)
            key, counted = key.masked_fill(hidden.unsqueeze(3), 0.0), counted.masked_fill(hidden, 0.0)
        if gates is not None:
            counted = counted * (gates.sum(2, keepdim=True) - gates.cumsum(2)).exp()
        count = counted.sum(2)
        if self._state is not None:
            old = self._state.total
            count = count + (old if gates is None else old * gates.sum(2).exp())
        options: dict[str, Any] = {"degree": self.degree, "scale": 1.0, "return_final_state": True}
        _, (sums, norm) = power_attention(key[:, :, :0], key, value, gates, self.state, **options)
        self._state = _Past(sums, norm, count)

    def _read(self, query: Tensor, tail: _Tail, options: _Options) -> Tensor:
        """Attention of queries (B, H, L, D) at the end of a tail."""
        settings: dict[str, Any] = {
            "scale": options.scale,
            "alpha": options.alpha,
            "enable_gqa": query.shape[1] != tail.key.shape[1],
            "backend": options.backend,
        }
        if self._state is None or (not isinstance(options.offset, Tensor) and options.offset == -math.inf):
            key, value = tail.key[:, :, 1:, :-_MORE], tail.value[:, :, 1:, :-_MORE]
            alone: Tensor = attention(query, key, value, **_visible(query, tail, 0), **settings)
            return alone
        past, score = _past(self._state, query, tail, self.degree, options)
        score = score / options.scale
        high = score.to(query.dtype)
        low = (score - high.to(score.dtype)).to(query.dtype)
        extended = torch.cat([query, high.unsqueeze(3), low.unsqueeze(3)], 3)
        both = attention(extended, tail.key, tail.value, **_visible(query, tail, 1), **settings).to(past.dtype)
        out: Tensor = both[..., :-_MORE] + both[..., -_MORE : 1 - _MORE] * past
        return out.to(query.dtype)

    def _keep(self, tail: _Tail) -> None:
        """Store the tail: in the room that appends are written to, unless gradients are on."""
        self._tail = tail
        if torch.is_grad_enabled():
            self._room = None
            return
        held, batch = 1 + tail.length, tail.key.shape[0]
        room = self._room
        if room is None or not _is_writable(room[0]) or room[0].shape[0] != batch:
            places = 1 + self.tail + self.block
            key, value = (t.new_zeros((*t.shape[:2], places, t.shape[3])) for t in tail[:2] if t is not None)
            room = key, value
        for place, t in zip(room, (tail.key, tail.value), strict=True):
            if t.data_ptr() != place.data_ptr():
                place[:, :, :held] = t
        self._room = room
        gates, padding = (None if t is None else t.clone() for t in (tail.gates, tail.padding))  # not parts of longer ones
        self._tail = _Tail(room[0][:, :, :held], room[1][:, :, :held], gates, padding)


def _past(state: _Past, query: Tensor, tail: _Tail, degree: int, options: _Options) -> tuple[Tensor, Tensor]:
    """The past's value (B, H, L, D_v) and score (B, H, L) for each query, in the accumulation dtype."""
    sums, norm, count = state
    batch, heads, length, size = query.shape
    groups, acc = norm.shape[1], norm.dtype
    rows = query.to(acc).reshape(batch, groups, heads // groups * length, size) * options.scale
    phi = monomials(rows, degree) * coefficients(size, degree, rows)
    shape, grouped = (batch, heads, length), (batch, groups, heads // groups, length)
    total = (phi @ norm.unsqueeze(3)).view(shape)
    count = count[:, :, None, None].clamp_min(torch.finfo(acc).tiny)
    # the decay since the tail's start is that of all weights: it cancels in both means
    mean = (total.view(grouped) / count).view(shape)
    there = ~((total <= 0) | (mean <= 0))  # NaN is there, and spoils the query
    past = (phi @ sums).view(*shape, sums.shape[3]) / torch.where(there, total, 1.0).unsqueeze(3)
    log_count = count.log()
    if tail.gates is not None:
        log_count = log_count + finite_gates(tail.gates).cumsum(2)[:, :, None, tail.length - length :]
    mean = torch.where(there, mean, 1.0) ** (1 / degree)
    log_count = log_count.expand(grouped).reshape(shape)
    score = options.slope * mean + _log_of_diffmax(log_count, options.e) + options.offset
    # an infinite score would spoil its products with zeros
    most = torch.finfo(query.dtype).max / 2 * min(1.0, options.scale)
    score = torch.where(there & ~(score <= -most), score.clamp_max(most), -most)
    return past.masked_fill(~there.unsqueeze(3), 0.0), score


def _of_past(t: Tensor, ones: int) -> Tensor:
    """The past's row (B, H_kv, 1, D + 2): zeros, then one or two ones."""
    row = t.new_zeros((*t.shape[:2], 1, t.shape[3] + _MORE))
    row[..., t.shape[3] : t.shape[3] + ones] = 1.0
    return row


def _joined(old: Tensor | None, new: Tensor | None, zeros: Tensor, held: int) -> Tensor | None:
    """Two parts of a row, where None is zeros; None if both are."""
    if old is None and new is None:
        return None
    return torch.cat([zeros[..., :held] if old is None else old, zeros[..., held:] if new is None else new], -1)


def _visible(query: Tensor, tail: _Tail, past: int) -> dict[str, Any]:
    """The mask of a call: the `past` rows before the tail are seen by all."""
    if tail.padding is None:
        return {"is_causal": True, "causal_alignment": "lower_right"}
    place = torch.arange(tail.length, device=query.device)
    mask = (place <= place[tail.length - query.shape[2] :].unsqueeze(1)) & ~tail.padding[:, None, None, :]
    return {"attn_mask": pad(mask, (past, 0), value=True)}


def _log_of_diffmax(log_count: Tensor, e: float | Tensor) -> Tensor:
    """(1 - N^-e) / e from ln N: what N equal scores have over one, where together they have all weight; ln N for e = 0."""
    if isinstance(e, Tensor):
        safe = torch.where(e == 0, 1.0, e)
        return torch.where(e == 0, log_count, -torch.expm1(-safe * log_count) / safe)
    return -torch.expm1(-e * log_count) / e


def _check_per_head(what: str, given: float | Tensor, q: Tensor, heads: int) -> float | Tensor:
    """A float, or a tensor () or (H,) as (H, 1) in the accumulation dtype."""
    if isinstance(given, Tensor):
        if not given.is_floating_point() or not has_shape(given, (), (1,), (heads,)):
            raise ValueError(
                f"{_NAME}: {what} must be a float or floating (H,) = ({heads},), got {given.dtype} {_shape(given)}"
            )
        return given.to(device=q.device, dtype=accumulation_dtype(q.dtype)).reshape(-1, 1)
    if isinstance(given, bool) or not isinstance(given, numbers.Real):
        raise TypeError(f"{_NAME}: {what} must be a float or a tensor, got {given!r} of type {type(given).__name__}")
    number = to_float(given)
    if math.isnan(number):
        raise ValueError(f"{_NAME}: {what} must be a number, got {given}")
    return number


def _is_writable(t: Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not t.is_inference()
