"""Attention over a sequence that is sharded over ranks. What is sent, and which way sends less: docs/distributed.md.

The threshold of a query depends on all its keys. So either heads are exchanged for tokens, or keys and values are gathered; the
attention of each rank is then the fused one, of whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from diffmax.operators.attention import checks, live_blocks
from diffmax.operators.attention.api import attention, attention_varlen
from diffmax.operators.common import messages
from diffmax.operators.common.autocast import without_autocast
from diffmax.operators.common.parts import whole_keys

NAME = "diffmax.distributed.attention_context_parallel"
PACKED_NAME = "diffmax.distributed.attention_varlen_context_parallel"
METHODS = ("auto", "ulysses", "all_gather", "live_blocks")
LAYOUTS = ("contiguous", "zigzag")


class Ranks(NamedTuple):
    """A process group, how many ranks it has, and which of them this is."""

    group: dist.ProcessGroup
    size: int
    rank: int


class Options(NamedTuple):
    """What the ranks' calls have in common."""

    method: str
    layout: str
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    alpha: float | Tensor
    window_size: tuple[int, int] | None
    alibi_slopes: Tensor | None
    softcap: float
    sink: Tensor | None
    backend: str | None
    cu_seqlens: Any = None  # a tensor; once it is checked, its numbers

    @property
    def name(self) -> str:
        """The function's."""
        return NAME if self.cu_seqlens is None else PACKED_NAME


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks) -> Tensor:
    """The rows of this rank's queries."""
    lengths = _agree(query, key, value, options, ranks)
    packed = options.cu_seqlens is not None
    if packed:
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        options = options._replace(cu_seqlens=options.cu_seqlens.tolist())
    if options.method == "auto":
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        options = options._replace(method=_cheapest(query, key, value, options, lengths, learning))
    run = {"ulysses": _by_heads, "all_gather": _by_tokens, "live_blocks": _by_live_blocks}[options.method]
    with without_autocast(query):
        out = run(query, key, value, options, ranks, lengths)
    return out.squeeze(0).transpose(0, 1).contiguous() if packed else out


def _cheapest(query: Tensor, key: Tensor, value: Tensor, options: Options, lengths: list[int], learning: bool) -> str:
    """Of the methods that can do the call, and whose messages do not depend on the values, the one that sends least."""
    size, heads, kv_heads = len(lengths), query.shape[1], key.shape[1]
    both_dims, width = key.shape[3] + value.shape[3], query.element_size()
    summed = max(width, 4)  # bytes of a number in the accumulation dtype
    exchanged = (heads + kv_heads) * both_dims * width * (1 + learning) * sum(lengths) / size  # Eq. 41
    gathered = size * kv_heads * both_dims * (width + summed * learning) * max(lengths)  # Eq. 42
    if not _exchanges(heads, kv_heads, size):
        return "all_gather"
    return "ulysses" if exchanged <= gathered or not _gathers(options) else "all_gather"


def _exchanges(heads: int, kv_heads: int, size: int) -> bool:
    return heads % size == 0 and kv_heads % size == 0


def _gathers(options: Options) -> bool:
    """Whether the keys of a run of queries are those up to its last token; or all, and no position counts."""
    left, right = options.window_size or (-1, -1)
    return options.is_causal or ((left, right) == (-1, -1) and options.alibi_slopes is None)


def _by_heads(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks, lengths: list[int]) -> Tensor:
    """Each rank gets some of the heads, with all their tokens."""
    size, own_length = ranks.size, lengths[ranks.rank]
    sent = [t.unflatten(1, (size, -1)).movedim(1, 0) for t in (query, key, value)]
    per_token = [math.prod(t.shape[1:3]) * t.shape[4] for t in sent]  # numbers that one rank gets
    sends, receives = [own_length * sum(per_token)] * size, [length * sum(per_token) for length in lengths]
    packed = torch.cat([t.flatten(1) for t in sent], 1).flatten()
    received = messages.Exchange.apply(packed, ranks.group, sends, receives).split(receives)
    parts = [
        from_rank.split([length * n for n in per_token]) for from_rank, length in zip(received, lengths, strict=True)
    ]  # from each rank, its query, key and value
    order = order_of_tokens(options.layout, lengths, query.device)
    back = order.argsort()
    whole = [
        torch.cat([t.view(*like.shape[1:3], length, like.shape[4]) for t, length in zip(of_ranks, lengths, strict=True)], 2)[
            :, :, back
        ]
        for of_ranks, like in zip(zip(*parts, strict=True), sent, strict=True)
    ]
    heads = sent[0].shape[2]

    def own(t: Any) -> Any:
        """Of one number per head, those of this rank's heads."""
        if not isinstance(t, Tensor):
            return t
        handed = messages.Hand.apply(t, ranks.group)
        return handed.narrow(-1, ranks.rank * heads, heads) if t.ndim and t.shape[-1] == query.shape[1] else handed

    given: dict[str, Any] = {"is_causal": options.is_causal, "window_size": options.window_size}
    out = _attention(options, own)(*whole, **given, places=_Places(options.cu_seqlens, 0, sum(lengths), False))
    of_ranks = out[:, :, order].split(lengths, 2)
    sends, receives = [t.numel() for t in of_ranks], [of_ranks[ranks.rank].numel()] * size
    returned = messages.Exchange.apply(torch.cat([t.flatten() for t in of_ranks]), ranks.group, sends, receives)
    return returned.view(size, out.shape[0], heads, own_length, out.shape[3]).movedim(0, 1).flatten(1, 2)  # type: ignore[no-any-return]


def _by_tokens(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks, lengths: list[int]) -> Tensor:
    """Each rank gets the keys and values of all tokens. A run of queries that is causal sees them up to its own last token."""
    size, longest = ranks.size, max(lengths)
    padded = [torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[2])) for t in (key, value)]
    gathered = messages.Gather.apply(torch.cat([t.flatten() for t in padded]), ranks.group).view(size, -1)
    order = order_of_tokens(options.layout, lengths, query.device)
    back = order.argsort()
    keys, values = (
        torch.cat([of_rank[:, :, :length] for of_rank, length in zip(t.view(size, *like.shape), lengths, strict=True)], 2)[
            :, :, back
        ]
        for t, like in zip(gathered.split([t.numel() for t in padded], 1), padded, strict=True)
    )

    def own(t: Any) -> Any:
        return messages.Hand.apply(t, ranks.group) if isinstance(t, Tensor) else t

    run = _attention(options, own)
    causal = {"is_causal": True, "window_size": options.window_size} if options.is_causal else {}
    if not causal and options.cu_seqlens is None:
        return run(query, keys, values)
    rows = []
    for first, last, end in _runs(options.layout, lengths, ranks.rank):
        places = _Places(options.cu_seqlens, end - (last - first), end, options.is_causal)
        seen = places.keys
        rows.append(run(query[:, :, first:last], keys[:, :, seen], values[:, :, seen], places=places, **causal))
    return torch.cat(rows, 2)


def _by_live_blocks(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks, lengths: list[int]) -> Tensor:
    """Each rank gets the keys and values that may have a weight for one of its queries."""
    alpha, sink = (messages.Hand.apply(t, ranks.group) if isinstance(t, Tensor) else t for t in (options.alpha, options.sink))
    causal = {"is_causal": True} if options.is_causal else {}

    def run(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
        def of_heads(t: Any) -> Any:
            return t[heads] if isinstance(t, Tensor) and t.ndim == 1 and t.shape[0] == query.shape[1] else t

        return _attention(options._replace(alpha=of_heads(alpha), sink=of_heads(sink)), lambda t: t)(q, k, v, **causal)

    return live_blocks.attend(query, key, value, options, ranks, runs_of(options.layout, lengths), run)


def runs_of(layout: str, lengths: list[int]) -> list[list[live_blocks.Run]]:
    """The runs of every rank."""
    every = [_runs(layout, lengths, rank) for rank in range(len(lengths))]
    return [[live_blocks.Run(first, last, end - (last - first)) for first, last, end in of_rank] for of_rank in every]


def _attention(options: Options, own: Callable[[Any], Any]) -> Callable[..., Tensor]:
    alpha, sink, slopes = own(options.alpha), own(options.sink), own(options.alibi_slopes)

    def run(query: Tensor, key: Tensor, value: Tensor, places: _Places | None = None, **more: Any) -> Tensor:
        given: dict[str, Any] = {"scale": options.scale, "softcap": options.softcap, "backend": options.backend, **more}
        given |= {"enable_gqa": True, "alpha": alpha, "sink": sink, "alibi_slopes": slopes}
        with whole_keys():
            if places is None or options.cu_seqlens is None:
                out: Any = attention(query, key, value, causal_alignment="lower_right", **given)
                return out  # type: ignore[no-any-return]
            q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
            out = attention_varlen(q, k, v, *places.packing(query.device), **given)
        return out.transpose(0, 1).unsqueeze(0)  # type: ignore[no-any-return]

    return run


class _Places:
    """Which keys the queries with the positions from `first` to `end` see, and where their sequences start in either."""

    def __init__(self, starts_of_all: list[int] | None, first: int, end: int, causal: bool) -> None:
        bounds = [0, end] if starts_of_all is None else starts_of_all
        own = [(low, high) for low, high in pairwise(bounds) if low < end and high > first]
        low, high = (own[0][0], end if causal else own[-1][1]) if own else (0, 0)
        starts = [low, *(min(high, end_of_one) for _, end_of_one in own)]
        self.keys = slice(low, high)
        self.of_keys = [start - low for start in starts]
        self.of_queries = [min(max(start, first), end) - first for start in starts]
        if len(starts) == 1:  # no sequence: one without tokens
            self.of_keys, self.of_queries = [0, 0], [0, 0]

    def packing(self, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k of `attention_varlen`."""
        both = (self.of_queries, self.of_keys)
        of_query, of_key = (torch.tensor(starts, dtype=torch.int32, device=device) for starts in both)
        longest_query, longest_key = (max(end - start for start, end in pairwise(starts)) for starts in both)
        return of_query, of_key, longest_query, longest_key


def order_of_tokens(layout: str, lengths: list[int], device: torch.device) -> Tensor:
    """The positions of the tokens in the order in which the ranks hold them (Eq. 40)."""
    positions, size = torch.arange(sum(lengths), device=device), len(lengths)
    if layout == "contiguous":
        return positions
    pairs = [run for rank in range(size) for run in (rank, 2 * size - 1 - rank)]
    return positions.view(2 * size, -1)[pairs].flatten()


def _runs(layout: str, lengths: list[int], rank: int) -> list[tuple[int, int, int]]:
    """A rank's runs of consecutive tokens: the first one, the one after the last, and the position of the latter."""
    length, size = lengths[rank], len(lengths)
    if layout == "contiguous":
        return [(0, length, sum(lengths[: rank + 1]))]
    half = length // 2
    return [(0, half, half * (rank + 1)), (half, length, half * (2 * size - rank))]


def _agree(query: Any, key: Any, value: Any, options: Options, ranks: Ranks) -> list[int]:
    """Check the arguments, and see that all ranks make the same call; else raise on every rank. The ranks' lengths."""
    name, cu_seqlens = options.name, options.cu_seqlens
    axis = 2 if cu_seqlens is None else 0
    with messages.refusals(name, ranks.group, query):
        _check(query, key, value, options, ranks)
        facts = _facts({"query": query, "key": key, "value": value}, options, axis)
    lengths = messages.agree(name, facts, query.shape[axis], None, ranks.group, query.device)
    if options.layout == "zigzag" and len(set(lengths)) > 1:
        raise ValueError(
            f"{name}: every rank must have as many tokens in the zigzag layout, got "
            f"{', '.join(f'{length} on rank {rank}' for rank, length in enumerate(lengths))}\n"
            'pad them, or pass layout="contiguous", which takes any lengths'
        )
    if cu_seqlens is not None and int(cu_seqlens[-1]) != sum(lengths):
        raise ValueError(
            f"{name}: cu_seqlens must end at the number of tokens of all ranks, {sum(lengths)}, got {int(cu_seqlens[-1])}\n"
            "it is that of the whole packed sequence, the same on every rank"
        )
    return lengths


def _facts(parts: dict[str, Tensor], options: Options, axis: int) -> dict[str, Any]:
    """What is the same on every rank. axis: that of the tokens, whose number may differ."""
    shared = {what: getattr(options, what) for what in ("alpha", "sink", "alibi_slopes", "cu_seqlens")}
    learned = [
        f"{what} ({t.dtype})"  # gradients are summed over the ranks in it
        for what, t in {**parts, **shared}.items()
        if torch.is_grad_enabled() and isinstance(t, Tensor) and t.requires_grad
    ]
    return {
        **{f"{what}'s shape": (*t.shape[:axis], "tokens", *t.shape[axis + 1 :]) for what, t in parts.items()},
        **{what: t.detach().tolist() if isinstance(t, Tensor) else t for what, t in shared.items()},
        "query's dtype": parts["query"].dtype,
        "what requires a gradient": learned,
        **{what: given for what, given in options._asdict().items() if what not in shared},
    }


def _check(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks) -> None:
    """The errors of `attention`, and those of the way that the ranks share the work."""
    name, method, layout, size = options.name, options.method, options.layout, ranks.size
    for what, given, known in (("method", method, METHODS), ("layout", layout, LAYOUTS)):
        if given not in known:
            raise ValueError(f"{name}: {what} must be one of {', '.join(known)}, got {given!r}")
    for what, t in (("query", query), ("key", key), ("value", value)):
        messages.check_here(name, what, t, f" and group={what}.device_mesh")
    packed = options.cu_seqlens is not None
    checks.check_tensors(name, query, key, value, "THD" if packed else "BHLD")
    heads, kv_heads, length, of_key = query.shape[1], key.shape[1], *(t.shape[0 if packed else 2] for t in (query, key))
    checks.check_heads(name, heads, kv_heads, options.enable_gqa or kv_heads == 1)
    checks.check_alpha(name, query, options.alpha, heads)
    checks.check_sink(name, query, options.sink, heads)
    checks.check_alibi(name, query, options.alibi_slopes, (heads,) if packed else (query.shape[0], heads))
    checks.check_softcap(name, options.softcap)
    checks.check_scale(name, query, options.scale)
    left, right = checks.check_window(name, options.window_size, options.is_causal)
    if packed:
        _check_starts(name, options.cu_seqlens)
    if of_key != length:
        raise ValueError(f"{name}: query and key must have the same length on a rank, got {length} and {of_key}")
    if layout == "zigzag" and length % 2:
        raise ValueError(
            f"{name}: a rank has two runs of one length in the zigzag layout, got {length} tokens\npad to an even one"
        )
    if not _exchanges(heads, kv_heads, size) and (method == "ulysses" or (method == "auto" and not _gathers(options))):
        raise ValueError(
            f'{name}: method "ulysses" gives each rank the same number of heads, got {heads} query heads and {kv_heads} '
            f'key heads for {size} ranks\npass method="all_gather", which takes any number, or a smaller group'
        )
    if method == "live_blocks" and packed:
        raise ValueError(
            f'{name}: method must be "auto", "ulysses" or "all_gather", got "live_blocks"\n'
            "its bounds know no packed sequences: pad them to a batch for attention_context_parallel, which takes it"
        )
    if method == "live_blocks" and options.alibi_slopes is not None:
        raise ValueError(
            f'{name}: method "live_blocks" takes no ALiBi, got alibi_slopes\npass method="all_gather" or "ulysses"'
        )
    if method == "live_blocks" and (left != -1 or (right != -1 and not options.is_causal)):
        raise ValueError(
            f'{name}: method "live_blocks" takes no window, got window_size={options.window_size}\n'
            'pass method="all_gather" or "ulysses"'
        )
    if method == "all_gather" and not _gathers(options):
        got = f"window_size={options.window_size}" if options.alibi_slopes is None else "alibi_slopes"
        raise ValueError(
            f'{name}: method "all_gather" takes a window or ALiBi with is_causal=True, got {got}\npass method="ulysses"'
        )


def _check_starts(name: str, cu_seqlens: Any) -> None:
    """Check where the sequences of all ranks' tokens start; where they end is known when the ranks have told their lengths."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name}: cu_seqlens must be an int32 tensor of one dimension, got {got}")
    starts = cu_seqlens.tolist()
    if len(starts) < 2 or starts[0] != 0 or any(end < start for start, end in pairwise(starts)):
        some = str(starts) if len(starts) <= 8 else f"[{', '.join(map(str, starts[:6]))}, ..., {starts[-1]}]"
        raise ValueError(f"{name}: cu_seqlens must have two entries or more, and ascend from 0, got {some}")
