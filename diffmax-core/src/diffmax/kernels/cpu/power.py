"""Power attention for CPUs, chunk by chunk: one state in memory, however long the sequence.

Forward: a sweep over chunks that carries the state; within a chunk the weights of its pairs. Backward: such a sweep again for
the gradients of queries, and one from the end that carries the state's gradient for those of keys and values. All products are
of matrices; expanded queries and keys exist for one slice of the state at a time.

`forward` and `backward` run on any device: diffmax_npu uses them too.

Values have a last column of ones and the state one of norms, so that sums of weights come with those of values. The gradients
of gates need no products of their own: what goes through a state follows from the gradients for queries and keys
(docs/theory.md, Eq. 34), and is taken so on both sides, where the rounding errors cancel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from diffmax.machine.forked import alone_in_child
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power.cost import chosen_chunk
from diffmax.operators.power.symmetric import coefficients, even_power, expanded_dim, first_of
from diffmax.plugin import PowerCall, PowerGradients, PowerResults, PowerSaved, PowerWanted
from diffmax.reference.power import cumulated, suffix_sums

ENTRIES = 1 << 19  # of expanded tokens in memory at once
PAIRS = 1 << 21  # of queries and keys, likewise


def forward(query: Tensor, key: Tensor, value: Tensor, call: PowerCall, keep: bool) -> PowerResults:
    """Forward kernel; arguments and results as `diffmax.reference.power.power_attention`."""
    walk = _Walk(query, key, value, call)
    acc, size = walk.acc, value.shape[3]
    rounds = value.dtype != acc
    out = value.new_empty((walk.heads, walk.groups, walk.length, size), dtype=acc if keep else value.dtype)
    total = walk.new(walk.groups, walk.length) if keep else out.new_empty(0, dtype=acc)
    state = walk.first_state()
    for chunk in walk.chunks():
        for rows in chunk.blocks():
            sums = rows.weights() @ chunk.value[:, : rows.seen]
            if chunk.has_past:
                sums += rows.through(state)
            result, norm = sums[..., :size], sums[..., size:]
            divided = (result / norm).masked_fill_(norm == 0, 0.0).masked_fill_(norm == torch.inf, torch.nan)
            out[:, :, rows.first : rows.last] = divided.view(walk.heads, walk.groups, rows.count, size)
            if keep:
                total[:, :, rows.first : rows.last] = norm.view(walk.heads, walk.groups, rows.count)
        if call.final or not chunk.is_last:
            chunk.enter(state)
    shape = query.shape[:3]
    sums, norm = walk.split(state) if call.final else (total.new_empty(0), total.new_empty(0))
    out = out.view(*shape, size)
    exact = out if keep and rounds else total.new_empty(0)
    return PowerResults(out.to(value.dtype), total.view(shape) if keep else total, sums, norm, exact)


def backward(
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
    """Backward kernel; arguments and results as `diffmax.reference.power.power_attention_backward`."""
    walk = _Walk(query, key, value, call)
    acc, size, degree = walk.acc, value.shape[3], call.degree
    total = saved.total.view(walk.heads, walk.groups, walk.length, 1)
    a = (grad.to(acc).reshape(walk.heads, walk.groups, walk.length, size) / total).masked_fill_(total == 0, 0.0)
    mean = (a * saved.out.to(acc).view(a.shape)).sum(-1, keepdim=True)
    a = torch.cat([a, -mean], -1)
    grad_query = walk.new(walk.groups, walk.length, walk.size)
    grad_key = walk.new(walk.many, walk.size)
    grad_value = walk.new(walk.many, size)
    of_g = walk.new(walk.many) if wanted.log_gates and call.log_gates is not None and walk.many else None
    ends = None if grad_sums is None or grad_norm is None else walk.joined(grad_sums, grad_norm)

    state = walk.first_state()
    for chunk in walk.chunks():
        for rows in chunk.blocks():
            own = a[:, :, rows.first : rows.last].reshape(walk.heads, walk.groups * rows.count, size + 1)
            slope = rows.scores()
            power = even_power(slope, degree - 2) if degree > 2 else None
            weights = slope.square() if power is None else power * slope * slope
            slope = slope.mul_(degree) if power is None else slope.mul_(power).mul_(degree)
            rows.decay_(weights)
            rows.decay_(slope)
            keys = slice(chunk.start, chunk.start + rows.seen)
            grad_value[:, keys] += weights.mT @ own[..., :size]
            of_weights = own @ chunk.value[:, : rows.seen].mT
            if of_g is not None:
                moved = weights.mul_(of_weights)
                of_g[:, keys] -= moved.sum(1)
                rows.at_positions(of_g).add_(moved.sum(2).view(walk.heads, walk.groups, rows.count).sum(1))
            of_scores = of_weights.mul_(slope)
            grad_key[:, keys] += of_scores.mT @ rows.scaled
            of_query = of_scores @ chunk.key[:, : rows.seen]
            if chunk.has_past:
                of_past = rows.pull(state, own)
                if of_g is not None:
                    own_part = (of_past * rows.scaled).sum(2).div_(degree)
                    rows.at_positions(of_g).add_(own_part.view(walk.heads, walk.groups, rows.count).sum(1))
                of_query += of_past
            target = grad_query[:, :, rows.first : rows.last]
            target.copy_(of_query.view(target.shape)).mul_(call.scale)
        if ends is not None or not chunk.is_last:
            chunk.enter(state)
    of_end = None
    if ends is not None and walk.many:
        of_end = (state * ends).sum((1, 2))

    of_state = ends
    for chunk in reversed(list(walk.chunks())):
        span = slice(chunk.start, chunk.end)
        if of_state is not None:
            of_key, of_value = chunk.leave(of_state)
            grad_key[:, span] += of_key
            grad_value[:, span] += of_value[..., :size]
            if of_g is not None:
                of_g[:, span] -= (of_key * chunk.key).sum(2).div_(degree)
            of_state *= chunk.whole_decay
        if not chunk.has_past:
            continue
        for rows in chunk.blocks():
            if of_state is None:
                of_state = torch.zeros_like(state)
            rows.add_to(of_state, a[:, :, rows.first : rows.last].reshape(walk.heads, walk.groups * rows.count, size + 1))
    of_gates, of_sums, of_norm = (total.new_empty(0) for _ in range(3))
    if wanted.log_gates and call.log_gates is not None:
        of_g = walk.new(0) if of_g is None else suffix_sums(of_g)
        of_gates = of_g if of_end is None else of_g + of_end.unsqueeze(-1)
        of_gates = of_gates.to(acc).view(call.log_gates.shape)
    if wanted.state and call.sums is not None:
        of_sums, of_norm = walk.split(of_state if of_state is not None else torch.zeros_like(walk.first_state()))
    return PowerGradients(
        grad_query.view(query.shape).to(query.dtype),
        grad_key.view(key.shape).to(key.dtype),
        grad_value.view(value.shape).to(value.dtype),
        of_gates,
        of_sums,
        of_norm,
    )


power_attention = alone_in_child(forward)
power_attention_backward = alone_in_child(backward)


class _Walk:
    """A call, with one dimension (N) for batch and heads of keys."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, call: PowerCall) -> None:
        self.call, self.acc, self.given = call, accumulation_dtype(query.dtype), key.shape
        self.heads, self.many, self.length, self.size = key.shape[0] * key.shape[1], key.shape[2], query.shape[2], key.shape[3]
        self.groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
        self.query = query.reshape(self.heads, self.groups, self.length, self.size)
        self.key, self.value = (t.reshape(self.heads, self.many, t.shape[3]) for t in (key, value))
        self.values = value.shape[3] + 1
        self.rows = expanded_dim(self.size, call.degree)
        self.log_gates = None if call.log_gates is None else call.log_gates.reshape(self.heads, self.many)
        self.chunk = call.chunk or chosen_chunk(self.length, self.many, self.size, value.shape[3], call.degree, self.groups)

    def new(self, *shape: int) -> Tensor:
        """Zeros (N, ...) in the accumulation dtype."""
        return torch.zeros(self.heads, *shape, dtype=self.acc, device=self.query.device)

    @functools.cached_property
    def c(self) -> Tensor:
        """(P, 1), the coefficients of the monomials."""
        return coefficients(self.size, self.call.degree, self.new(0)).unsqueeze(1)

    def first_state(self) -> Tensor:
        """(N, P, D_v + 1); of no rows where no state is read or wanted: a quadratic form of many entries has no room for it."""
        if self.call.sums is not None and self.call.norm is not None:
            return self.joined(self.call.sums, self.call.norm)
        return self.new(self.rows if self.call.final or self.chunk < self.many else 0, self.values)

    def joined(self, sums: Tensor, norm: Tensor) -> Tensor:
        """The reverse of `split`."""
        return torch.cat([sums, norm.unsqueeze(-1)], -1).view(self.heads, self.rows, self.values)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and norm, contiguous."""
        batch, heads = self.given[:2]
        sums, norm = state[..., :-1].contiguous(), state[..., -1].contiguous()
        return sums.view(batch, heads, self.rows, self.values - 1), norm.view(batch, heads, self.rows)

    def chunks(self) -> Iterator[_Chunk]:
        """In order. Without keys, one that is empty."""
        for start in range(0, max(self.many, 1), self.chunk):
            yield _Chunk(self, start, min(start + self.chunk, self.many))


class _Chunk:
    """Keys from `start` to `end`, and the queries at their positions."""

    def __init__(self, walk: _Walk, start: int, end: int) -> None:
        self.walk, self.start, self.end = walk, start, end
        self.is_last = end == walk.many
        self.has_past = start > 0 or walk.call.sums is not None
        self.key = walk.key[:, start:end].to(walk.acc)
        value = walk.value[:, start:end].to(walk.acc)
        self.value = torch.cat([value, value.new_ones(*value.shape[:2], 1)], 2)
        self.g = None  # log gates since the chunk's start
        if walk.log_gates is not None and end > start:
            self.g = cumulated(walk.log_gates[:, start:end])

    @property
    def whole_decay(self) -> Tensor | float:
        """(N, 1, 1)."""
        return 1.0 if self.g is None else self.g[:, -1:].exp().to(self.walk.acc).unsqueeze(2)

    def blocks(self) -> Iterator[_Rows]:
        """The queries in blocks, of which the pairs fit."""
        walk, before = self.walk, self.walk.many - self.walk.length if self.walk.many else 0
        first, last = max(self.start - before, 0), (self.end if walk.many else walk.length) - before
        many = max(1, PAIRS // max(1, walk.heads * walk.groups * max(1, self.end - self.start)))
        for at in range(first, last, many):
            behind = min(at + many, last)
            yield _Rows(self, at, behind, behind + before - self.start if walk.many else 0)

    def enter(self, state: Tensor) -> None:
        """Let the state decay, and add the keys."""
        state *= self.whole_decay
        value = self.value * self._until_end()
        for rows, entries, _ in _Expansion(self.key.mT.contiguous(), self.walk.call.degree).slices():
            state[:, rows].baddbmm_(entries, value)

    def leave(self, of_state: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients for keys and values from that for the state after them."""
        expansion = _Expansion(self.key.mT.contiguous(), self.walk.call.degree)
        pulled = _Pulled(expansion)
        of_value = torch.zeros_like(self.value)
        value = (self.value * self._until_end()).mT.contiguous()
        for rows, entries, variables in expansion.slices():
            of_value.baddbmm_(entries.mT, of_state[:, rows])
            pulled.take(variables, torch.bmm(of_state[:, rows], value))
        of_value *= self._until_end()
        return pulled.result().mT, of_value

    def _until_end(self) -> Tensor | float:
        if self.g is None:
            return 1.0
        return (self.g[:, -1:] - self.g).exp().to(self.walk.acc).unsqueeze(2)


class _Rows:
    """Queries `first` to `last` of a chunk, in all heads of a group: (N, H / H_kv * n, ...). They see `seen` keys of it."""

    def __init__(self, chunk: _Chunk, first: int, last: int, seen: int) -> None:
        self.chunk, self.first, self.last, self.seen = chunk, first, last, seen
        walk = chunk.walk
        self.count = last - first
        self.query = walk.query[:, :, first:last].to(walk.acc).reshape(walk.heads, walk.groups * (last - first), walk.size)
        self.scaled = self.query * walk.call.scale

    def scores(self) -> Tensor:
        """(N, H / H_kv * n, seen)."""
        return self.scaled @ self.chunk.key[:, : self.seen].mT

    def weights(self) -> Tensor:
        """Of the pairs."""
        return self.decay_(even_power(self.scores(), self.chunk.walk.call.degree))

    def decay_(self, t: Tensor) -> Tensor:
        """Decayed in place; 0 for keys behind the query."""
        by_group = t.view(t.shape[0], self.chunk.walk.groups, self.count, self.seen)
        g = self.chunk.g
        if g is None:
            by_group.tril_(self.seen - self.count)
            return t
        of_query = g[:, self.seen - self.count : self.seen]
        away = (of_query.unsqueeze(2) - g[:, : self.seen].unsqueeze(1)).to(t.dtype)
        by_group.mul_(away.exp_().unsqueeze(1))
        by_group.tril_(self.seen - self.count)  # after the product: what is hidden may be infinite, and would be NaN
        return t

    def _since(self) -> Tensor | None:
        """(N, H / H_kv * n, 1), the decay since the chunk's start."""
        g = self.chunk.g
        if g is None:
            return None
        since = g[:, self.seen - self.count : self.seen].exp().to(self.scaled.dtype)
        return since.repeat(1, self.chunk.walk.groups).unsqueeze(2)

    def at_positions(self, t: Tensor) -> Tensor:
        """A view of what belongs to the queries' positions in t, (N, S)."""
        last = self.chunk.start + self.seen
        return t[:, last - self.count : last]

    def through(self, state: Tensor) -> Tensor:
        """What the queries read of the state before the chunk."""
        walk = self.chunk.walk
        found = self.scaled.new_zeros(walk.heads, self.scaled.shape[1], walk.values)
        for rows, entries, _ in _Expansion(self.scaled.mT.contiguous(), walk.call.degree).slices():
            found.baddbmm_(entries.mT, state[:, rows] * walk.c[rows])
        since = self._since()
        return found if since is None else found.mul_(since)

    def pull(self, state: Tensor, a: Tensor) -> Tensor:
        """The gradient for the scaled queries from what they read of the state."""
        walk, since = self.chunk.walk, self._since()
        expansion = _Expansion(self.scaled.mT.contiguous(), walk.call.degree)
        pulled, of_sums = _Pulled(expansion), (a if since is None else a * since).mT.contiguous()
        for rows, _, variables in expansion.runs():
            pulled.take(variables, torch.bmm(state[:, rows] * walk.c[rows], of_sums))
        return pulled.result().mT

    def add_to(self, of_state: Tensor, a: Tensor) -> None:
        """Add the gradient for the state that they read."""
        walk, since = self.chunk.walk, self._since()
        of_sums = a if since is None else a * since
        for rows, entries, _ in _Expansion(self.scaled.mT.contiguous(), walk.call.degree).slices():
            of_state[:, rows] += torch.bmm(entries, of_sums).mul_(walk.c[rows])


class _Expansion:
    """Monomials of tokens x, (N, d, n): those of lower degrees at once, the highest by runs that begin with one variable."""

    def __init__(self, x: Tensor, degree: int) -> None:
        self.x, self.degree, self.size = x, degree, x.shape[1]
        self.levels = [x]
        for done in range(1, degree - 1):
            self.levels.append(self._filled(done, range(self.size), None))

    def runs(self) -> Iterator[tuple[slice, int, range]]:
        """(which monomials, how many, the variables that begin them), as many as fit."""
        below = self.levels[-1]
        most, index = max(1, ENTRIES // max(1, below.shape[0] * below.shape[2])), 0
        while index < self.size:
            first, behind = self._first(index), index + 1
            while behind < self.size and self._first(behind + 1) - first <= most:
                behind += 1
            last = self._first(behind)
            yield slice(first, last), last - first, range(index, behind)
            index = behind

    def slices(self) -> Iterator[tuple[slice, Tensor, range]]:
        """As `runs`, with the monomials (N, rows, n), which the next ones overwrite."""
        below, memory = self.levels[-1], self.x.new_empty(0)
        for rows, count, variables in self.runs():
            needed = below.shape[0] * count * below.shape[2]
            if memory.numel() < needed:
                memory = self.x.new_empty(needed)
            yield rows, self._filled(self.degree - 1, variables, memory[:needed]), variables

    def _filled(self, done: int, variables: range, memory: Tensor | None) -> Tensor:
        """The monomials of degree `done` + 1 that begin with these variables."""
        below, size = self.levels[done - 1], self.size
        base = first_of(size, done + 1, variables.start)
        shape = (below.shape[0], first_of(size, done + 1, variables.stop) - base, below.shape[2])
        found = below.new_empty(shape) if memory is None else memory.view(shape)
        for index in variables:
            start, at = first_of(size, done, index), first_of(size, done + 1, index) - base
            torch.mul(below[:, start:], self.x[:, index : index + 1], out=found[:, at : at + below.shape[1] - start])
        return found

    def _first(self, index: int) -> int:
        return first_of(self.size, self.degree, index)


class _Pulled:
    """The gradient for x from that for its monomials, which comes slice by slice."""

    def __init__(self, expansion: _Expansion) -> None:
        self.of, self.of_x = expansion, torch.zeros_like(expansion.x)
        self.below = torch.zeros_like(expansion.levels[-1])

    def take(self, variables: range, grad: Tensor) -> None:
        """The gradient (N, rows, n) for the monomials that begin with these variables."""
        self.below = self._down(self.of.degree - 1, variables, grad, self.below)

    def result(self) -> Tensor:
        """(N, d, n)."""
        for done in range(self.of.degree - 2, 0, -1):
            self.below = self._down(done, range(self.of.size), self.below, torch.zeros_like(self.of.levels[done - 1]))
        return self.of_x.add_(self.below)

    def _down(self, done: int, variables: range, grad: Tensor, of_below: Tensor) -> Tensor:
        below, size, x = self.of.levels[done - 1], self.of.size, self.of.x
        base = first_of(size, done + 1, variables.start)
        for index in variables:
            start, at = first_of(size, done, index), first_of(size, done + 1, index) - base
            own = grad[:, at : at + below.shape[1] - start]
            of_below[:, start:].addcmul_(own, x[:, index : index + 1])
            self.of_x[:, index] += (own * below[:, start:]).sum(1)
        return of_below
