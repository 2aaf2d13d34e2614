"""The weights of an attention call as sparse lists, block by block: no block is a whole map.

A forward kernel returns delta of every query: where its threshold lies, seen from its largest score. So the weights follow from
the scores (Eq. 1), which are computed once more, some queries at a time; the keys above the threshold are kept. The largest
score is the one found here: where scores are large, the kernel's differs from it by rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention import scores as rules
from diffmax.operators.common import portable
from diffmax.operators.common.autograd import is_transformed
from diffmax.operators.common.numerics import accumulation_dtype, clamp_e
from diffmax.plugin import AttentionCall

# Scores of one block, unless its fewest rows have more.
BLOCK_ELEMENTS = 1 << 19
FEWEST_ROWS = 16


class SparseWeights(NamedTuple):
    """The nonzero weights of an attention call, query by query, without gradients: compressed sparse rows.

    The queries are numbered through, heads before queries and batch entries before heads. Query r has the keys
    `indices[offsets[r] : offsets[r + 1]]`, ascending, with the weights `values[offsets[r] : offsets[r + 1]]`; every other key
    has weight exactly 0.

    Attributes:
        offsets: int64 (number of queries + 1,).
        indices: int32 (number of weights,): keys. For packed sequences they count through all tokens of key.
        values: Like indices, in the accumulation dtype: the weights before any rounding to value's dtype. With the sink's, a
            query's sum to 1. A query whose result is NaN lists every key that it sees, with NaN.
        sink: The sink's weight of each query, of shape `shape[:-1]`; None without a sink.
        shape: What the dense weights would have: (B, H, L, S), or as the given query has dimensions; for packed sequences
            (H, T_q, T_k).
    Example:
        >>> import torch, diffmax
        >>> query, key, value = torch.randn(3, 1, 2, 50, 16).mul(3).unbind()
        >>> out, weights = diffmax.attention(query, key, value, alpha=0.5, return_weights="sparse")
        >>> keys, values = weights.query(0, 1, 49)  # batch entry 0, head 1, the last query
        >>> torch.allclose(values @ value[0, 1, keys], out[0, 1, 49], atol=1e-5)
        True
    """

    offsets: Tensor
    indices: Tensor
    values: Tensor
    sink: Tensor | None
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        """Its size, not its numbers."""
        sink = "" if self.sink is None else ", with a sink"
        return f"SparseWeights of shape {tuple(self.shape)}, {len(self.values)} of them nonzero, {self.values.dtype}{sink}"

    def query(self, *place: int) -> tuple[Tensor, Tensor]:
        """The keys of one query and their weights; `place` is its index in the dimensions before the keys'."""
        row = self._row(place, len(self.shape) - 1)
        span = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self.indices[span], self.values[span]

    def head(self, *place: int) -> SparseWeights:
        """The weights of one head, of shape (L, S); `place` is its index in the dimensions before the queries'."""
        number, length = self._row(place, len(self.shape) - 2), self.shape[-2]
        offsets = self.offsets[number * length : (number + 1) * length + 1]
        span = slice(int(offsets[0]), int(offsets[-1]))
        sink = None if self.sink is None else self.sink[place]
        return SparseWeights(offsets - offsets[0], self.indices[span], self.values[span], sink, self.shape[-2:])

    def heads(self) -> Iterator[tuple[tuple[int, ...], SparseWeights]]:
        """Every head by its place, such as (b, h)."""
        for place in torch.cartesian_prod(*(torch.arange(n) for n in (1, *self.shape[:-2]))).view(-1, len(self.shape) - 1):
            found = tuple(place[1:].tolist())
            yield found, self.head(*found)

    def supports(self) -> Tensor:
        """The number of keys that each query reads: int64, of shape `shape[:-1]`."""
        return self.offsets.diff().view(self.shape[:-1])

    def to_sparse_csr(self) -> Tensor:
        """As a matrix of torch, (queries, S), in which dimensions before the queries' are flattened: see `head`."""
        size = len(self.offsets) - 1, self.shape[-1]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(self.offsets, self.indices.long(), self.values, size, check_invariants=False)

    def to_dense(self) -> Tensor:
        """As a tensor of this shape, with the zeros."""
        dense = self.values.new_zeros(len(self.offsets) - 1, self.shape[-1])
        dense[self.rows(), self.indices.long()] = self.values
        return dense.view(self.shape)

    def rows(self) -> Tensor:
        """int64, like indices: the number of the query that each weight belongs to."""
        rows = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff())

    def to(self, device: torch.device | str) -> SparseWeights:
        """The same on another device."""
        sink = None if self.sink is None else self.sink.to(device)
        offsets, indices, values = (t.to(device) for t in (self.offsets, self.indices, self.values))
        return SparseWeights(offsets, indices, values, sink, self.shape)

    def reshaped(self, shape: tuple[int, ...]) -> SparseWeights:
        """The same queries in the same order, with other dimensions before the keys'."""
        return self._replace(sink=None if self.sink is None else self.sink.reshape(shape[:-1]), shape=tuple(shape))

    def _row(self, place: tuple[int, ...], dims: int) -> int:
        sizes = self.shape[:dims]
        if len(place) != dims or not all(-size <= at < size for at, size in zip(place, sizes, strict=True)):
            raise IndexError(f"SparseWeights: the place must be an index into {tuple(sizes)}, got {place}")
        row = 0
        for at, size in zip(place, sizes, strict=True):
            row = row * size + at % size
        return row


SparseWeights.__module__ = "diffmax"  # the module name that pickles store


def check_request(
    name: str,
    kind: Literal["sparse"] | None,
    return_stats: bool,
    dropout_p: float,
    tensors: tuple[Any, ...],
    alibi: Any = None,
) -> bool:
    """Whether weights are asked for, of a call that can give them."""
    if kind is None:
        return False
    if kind != "sparse":
        raise ValueError(f'{name}: return_weights must be "sparse" or None, got {kind!r}')
    if return_stats:
        raise ValueError(
            f"{name}: return_weights and return_stats exclude each other, got both\n"
            "the weights have support sizes, by .supports(); for thresholds call again"
        )
    if dropout_p:
        raise ValueError(f"{name}: return_weights must come without dropout, got dropout_p {dropout_p}\npass dropout_p=0.0")
    if is_transformed() or portable.is_tracing():
        raise NotImplementedError(
            f"{name}: return_weights is not supported under torch.func transforms, in forward mode, or in a traced graph\n"
            "the number of weights follows from their values: call it outside"
        )
    for t in tensors:
        if isinstance(t, Tensor) and (t.is_nested or t.is_meta or type(t) not in (Tensor, torch.nn.Parameter)):
            kind_of = "a nested tensor" if t.is_nested else "device meta" if t.is_meta else type(t).__name__
            raise NotImplementedError(
                f"{name}: return_weights takes plain tensors that hold numbers, got {kind_of}\n"
                "for nested tensors call attention_varlen; for distributed ones pass the local part"
            )
    if isinstance(alibi, Tensor) and alibi.ndim == 2 and name.endswith("varlen"):
        raise NotImplementedError(
            f"{name}: return_weights takes alibi_slopes of shape (H,), got {tuple(alibi.shape)}\n"
            "call attention for each sequence"
        )
    return True


def sparse_weights(query: Tensor, key: Tensor, call: AttentionCall, delta: Tensor) -> SparseWeights:
    """The weights of a call, from delta as any forward kernel returns it. Dropout is not applied.

    Args:
        query, key, call: As for `diffmax.reference.attention.attention`.
        delta: (B, H, L), of its results.
    Returns:
        Weights of shape (B, H, L, S), and (1, H, T_q, T_k) for packed sequences.
    """
    # the graph breaks: what follows has as many numbers as there are weights
    run = torch.compiler.disable(_lists) if torch.compiler.is_compiling() else _lists  # type: ignore[no-untyped-call]
    weights: SparseWeights = run(query, key, call, delta)
    return weights


@alone_in_child
@torch.no_grad()
def _lists(query: Tensor, key: Tensor, call: AttentionCall, delta: Tensor) -> SparseWeights:
    """`sparse_weights`."""
    acting, found = rules.acting(call, sink=False), []
    with torch._C._DisableAutocast():
        for block in _blocks(query, key, call):
            found.append(_of_block(block, query, key, call, acting, delta))
    rows = query.shape[:3]
    counts, keys, values, sinks = (list(parts) for parts in zip(*found, strict=True)) if found else ([], [], [], [])
    values.append(delta.new_empty(0))
    keys.append(torch.empty(0, dtype=torch.int32, device=delta.device))
    counts.insert(0, torch.zeros(1, dtype=torch.int64, device=delta.device))
    sink = None if call.sink is None else torch.cat([*sinks, delta.new_empty(0)]).view(rows)
    return SparseWeights(torch.cat(counts).cumsum(0), torch.cat(keys), torch.cat(values), sink, (*rows, key.shape[2]))


@dataclass(frozen=True, eq=False)
class _Block(rules.Region):
    """The scores (heads, queries, keys) of some heads of one batch entry: the queries and the keys are of one sequence.

    Attributes:
        query_at, key_at: Where the queries and keys lie in the tensors.
        query_position, key_position: Positions of the first of them.
    """

    in_place: ClassVar[bool] = True

    batch: int
    head_at: slice
    query_at: slice
    key_at: slice
    query_position: int
    key_position: int
    device: torch.device

    def queries(self) -> Tensor:
        """(queries, 1)."""
        count = self.query_at.stop - self.query_at.start
        return torch.arange(self.query_position, self.query_position + count, device=self.device).unsqueeze(1)

    def keys(self) -> Tensor:
        """(keys,)."""
        return torch.arange(self.key_position, self.key_position + self.key_at.stop - self.key_at.start, device=self.device)

    def of_heads(self, t: Tensor) -> Tensor:
        """(heads, 1, 1)."""
        return (t[self.batch if len(t) > 1 else 0] if t.ndim == 2 else t)[self.head_at, None, None]

    def of_scores(self, t: Tensor) -> Tensor:
        """The block's part of a mask or a bias; packed sequences have neither."""
        parts = (slice(self.batch, self.batch + 1), self.head_at, self.query_at, self.key_at)
        return t[tuple(part if size > 1 else slice(None) for part, size in zip(parts, t.shape, strict=True))].squeeze(0)

    def keys_of(self, key: Tensor, group: int) -> Tensor:
        """(heads, keys, D), in the accumulation dtype."""
        first, last = self.head_at.start // group, -(-self.head_at.stop // group)
        keys = key[self.batch, first:last, self.key_at].to(accumulation_dtype(key.dtype))
        if group > 1:
            start = self.head_at.start - first * group
            keys = keys.repeat_interleave(group, 0)[start : start + self.head_at.stop - self.head_at.start]
        return keys

    def rows_of(self, t: Tensor) -> Tensor:
        """The block's part of (B, H, L, ...)."""
        return t[self.batch, self.head_at, self.query_at]


def _blocks(query: Tensor, key: Tensor, call: AttentionCall) -> Iterator[_Block]:
    """Cover all queries in the order of their numbers."""
    batch, heads, _, _ = query.shape
    sequences = _sequences(query, key, call)
    together = 1
    if len(sequences) == 1 and _height(key.shape[2], call) >= query.shape[2]:
        together = max(1, BLOCK_ELEMENTS // max(1, query.shape[2] * key.shape[2]))
    for b in range(batch):
        for head in range(0, heads, together):
            for query_start, query_end, key_start, key_end in sequences:
                keys, height = key_end - key_start, _height(key_end - key_start, call)
                shift = keys - (query_end - query_start) if call.lower_right else 0
                for start in range(query_start, query_end, height):
                    stop, place = min(start + height, query_end), start - query_start + shift
                    first, last = rules.visible_span(place, place + stop - start - 1, call.left, call.right, keys)
                    last = max(first, last)
                    span = slice(key_start + first, key_start + last) if last > first else slice(0, 0)
                    some = slice(head, min(head + together, heads))
                    yield _Block(b, some, slice(start, stop), span, place, first, query.device)


def _sequences(query: Tensor, key: Tensor, call: AttentionCall) -> list[tuple[int, int, int, int]]:
    """Start and end of each sequence's queries and keys; tokens behind the last one are a sequence that sees nothing."""
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return [(0, query.shape[2], 0, key.shape[2])]
    ends_q, ends_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    found = list(zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True))
    return [*found, (ends_q[-1], query.shape[2], 0, 0)]


def _height(keys: int, call: AttentionCall) -> int:
    """Queries of one block: with a window, not many more than the keys that each sees."""
    if call.left >= 0 and call.right >= 0:
        width = min(keys, call.left + call.right + 1 + FEWEST_ROWS)
        return max(FEWEST_ROWS, min(BLOCK_ELEMENTS // max(1, 2 * width), width))
    return max(FEWEST_ROWS, BLOCK_ELEMENTS // max(1, keys))


def _of_block(
    block: _Block,
    query: Tensor,
    key: Tensor,
    call: AttentionCall,
    acting: tuple[rules.Rule, ...],
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts of weights, keys and weights, and the sink's weights."""
    keys = block.keys_of(key, query.shape[1] // key.shape[1])
    scores = block.rows_of(query).to(keys.dtype).mul(call.scale) @ keys.mT
    scores = rules.apply(scores, call, block, acting)
    shape, width = scores.shape[:2], scores.shape[2]
    e = clamp_e(block.of_heads(call.e).expand(*shape, 1).reshape(-1) if isinstance(call.e, Tensor) else call.e)
    sink = None if call.sink is None else block.of_heads(call.sink).expand(*shape, 1).reshape(-1)
    offset = block.rows_of(delta).reshape(-1)
    scores = scores.view(shape.numel(), width)
    top = scores.amax(1) if width else torch.full_like(offset, -torch.inf)
    top = top if sink is None else torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0.0)
    spoilt = offset.isnan()
    seen = scores != -torch.inf if spoilt.any() else None
    live = scores.sub_(top.unsqueeze(1)) > ((offset - 1) / e).unsqueeze(1)
    if seen is not None:
        live |= seen & spoilt.unsqueeze(1)
    place = live.view(-1).nonzero().squeeze(1)
    row = place.div(max(1, width), rounding_mode="floor")
    column, counts = (place - row * width).int(), torch.bincount(row, minlength=len(scores))
    values = _powers(scores.view(-1)[place], offset[row], e[row] if isinstance(e, Tensor) else e)
    wide = values.double() if values.device.type in ("cpu", "cuda") else values  # it adds one after the other
    total = torch.segment_reduce(wide, "sum", lengths=counts, initial=0).to(values.dtype)
    of_sink = values.new_empty(0)
    if sink is not None:
        of_sink = _powers(sink - top, offset, e)
        total += of_sink
    total.masked_fill_(total == 0, 1.0)
    values, of_sink = values / total[row], of_sink / (1.0 if sink is None else total)
    kept = values != 0
    if not kept.all():  # a weight below the smallest number is 0
        counts = torch.bincount(row[kept], minlength=len(counts))
        column, values = column[kept], values[kept]
    return counts, column + block.key_at.start, values, of_sink


def _powers(below: Tensor, delta: Tensor, e: float | Tensor) -> Tensor:
    """Eq. 1, of scores less the largest of their row; NaN where delta is."""
    u = e * below - delta
    return torch.where(u <= -1, 0.0, torch.log1p(u).div(e).exp())
