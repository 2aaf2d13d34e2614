"""Attention over a sequence that is sharded over ranks. What is sent, and which way sends less: docs/distributed.md.

The threshold of a query depends on all its keys. So either heads are exchanged for tokens, or keys and values are gathered; the
attention of each rank is then the fused one, of whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from diffmax.operators.attention import checks, live_blocks
from diffmax.operators.attention.api import attention
from diffmax.operators.common import messages
from diffmax.operators.common.parts import whole_keys

NAME = "diffmax.distributed.attention_context_parallel"
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


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks) -> Tensor:
    """The rows of this rank's queries."""
    lengths = _agree(query, key, value, options, ranks)
    if options.method == "auto":
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        options = options._replace(method=_cheapest(query, key, value, options, lengths, learning))
    run = {"ulysses": _by_heads, "all_gather": _by_tokens, "live_blocks": _by_live_blocks}[options.method]
    return run(query, key, value, options, ranks, lengths)


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
    order = _places(options.layout, lengths, query.device)
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

    out = _attention(options, own)(*whole, is_causal=options.is_causal, window_size=options.window_size)
    of_ranks = out[:, :, order].split(lengths, 2)
    sends, receives = [t.numel() for t in of_ranks], [of_ranks[ranks.rank].numel()] * size
    returned = messages.Exchange.apply(torch.cat([t.flatten() for t in of_ranks]), ranks.group, sends, receives)
    return returned.view(size, out.shape[0], heads, own_length, out.shape[3]).movedim(0, 1).flatten(1, 2)  # type: ignore[no-any-return]


def _by_tokens(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks, lengths: list[int]) -> Tensor:
    """Each rank gets the keys and values of all tokens. A run of queries that is causal sees them up to its own last token."""
    size, longest = ranks.size, max(lengths)
    padded = [torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[2])) for t in (key, value)]
    gathered = messages.Gather.apply(torch.cat([t.flatten() for t in padded]), ranks.group).view(size, -1)
    order = _places(options.layout, lengths, query.device)
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
    if not options.is_causal:
        return run(query, keys, values)
    rows = [
        run(
            query[:, :, first:last],
            keys[:, :, :seen],
            values[:, :, :seen],
            is_causal=True,
            window_size=options.window_size,
            causal_alignment="lower_right",
        )
        for first, last, seen in _runs(options.layout, lengths, ranks.rank)
    ]
    return torch.cat(rows, 2)


def _by_live_blocks(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks, lengths: list[int]) -> Tensor:
    """Each rank gets the keys and values that may have a weight for one of its queries."""
    alpha, sink = (messages.Hand.apply(t, ranks.group) if isinstance(t, Tensor) else t for t in (options.alpha, options.sink))
    causal = {"is_causal": True, "causal_alignment": "lower_right"} if options.is_causal else {}

    def run(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
        def of_heads(t: Any) -> Any:
            return t[heads] if isinstance(t, Tensor) and t.ndim == 1 and t.shape[0] == query.shape[1] else t

        return _attention(options._replace(alpha=of_heads(alpha), sink=of_heads(sink)), lambda t: t)(q, k, v, **causal)

    runs = [
        [live_blocks.Run(first, last, end - (last - first)) for first, last, end in _runs(options.layout, lengths, rank)]
        for rank in range(ranks.size)
    ]
    return live_blocks.attend(query, key, value, options, ranks, runs, run)


def _attention(options: Options, own: Callable[[Any], Any]) -> Callable[..., Tensor]:
    alpha, sink, slopes = own(options.alpha), own(options.sink), own(options.alibi_slopes)

    def run(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        given: dict[str, Any] = {"scale": options.scale, "softcap": options.softcap, "backend": options.backend, **more}
        with whole_keys():
            out: Tensor = attention(query, key, value, enable_gqa=True, alpha=alpha, sink=sink, alibi_slopes=slopes, **given)
        return out

    return run


def _places(layout: str, lengths: list[int], device: torch.device) -> Tensor:
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
    try:
        _check(query, key, value, options, ranks)
        problem = None
    except (TypeError, ValueError) as error:
        problem = error
    parts = {"query": query, "key": key, "value": value}
    shared = {name: getattr(options, name) for name in ("alpha", "sink", "alibi_slopes")}
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    if problem is not None:
        return messages.agree(NAME, {}, 0, problem, ranks.group, device)
    learning = torch.is_grad_enabled()
    facts: dict[str, Any] = {
        **{f"{name}'s shape": (*t.shape[:2], "tokens", t.shape[3]) for name, t in parts.items()},
        **{name: t.detach().tolist() if isinstance(t, Tensor) else t for name, t in shared.items()},
        "query's dtype": query.dtype,
        "what requires a gradient": [
            name for name, t in {**parts, **shared}.items() if learning and isinstance(t, Tensor) and t.requires_grad
        ],
        **{name: given for name, given in options._asdict().items() if name not in shared},
    }
    lengths = messages.agree(NAME, facts, query.shape[2], None, ranks.group, device)
    if options.layout == "zigzag" and len(set(lengths)) > 1:
        raise ValueError(
            f"{NAME}: every rank must have as many tokens in the zigzag layout, got "
            f"{', '.join(f'{length} on rank {rank}' for rank, length in enumerate(lengths))}\n"
            'pad them, or pass layout="contiguous", which takes any lengths'
        )
    return lengths


def _check(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks) -> None:
    """The errors of `attention`, and those of the way that the ranks share the work."""
    method, layout, size = options.method, options.layout, ranks.size
    for what, given, known in (("method", method, METHODS), ("layout", layout, LAYOUTS)):
        if given not in known:
            raise ValueError(f"{NAME}: {what} must be one of {', '.join(known)}, got {given!r}")
    for what, t in (("query", query), ("key", key), ("value", value)):
        if type(t).__name__ == "DTensor":
            raise TypeError(
                f"{NAME}: {what} must be this rank's part, got a DTensor\npass {what}.to_local() and group={what}.device_mesh"
            )
    checks.check_tensors(NAME, query, key, value, "BHLD")
    heads, kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
    checks.check_heads(NAME, heads, kv_heads, options.enable_gqa or kv_heads == 1)
    checks.check_alpha(NAME, query, options.alpha, heads)
    checks.check_sink(NAME, query, options.sink, heads)
    checks.check_alibi(NAME, query, options.alibi_slopes, (query.shape[0], heads))
    checks.check_softcap(NAME, options.softcap)
    checks.check_scale(NAME, query, options.scale)
    left, right = checks.check_window(NAME, options.window_size, options.is_causal)
    if key.shape[2] != length:
        raise ValueError(f"{NAME}: query and key must have the same length on a rank, got {length} and {key.shape[2]}")
    if layout == "zigzag" and length % 2:
        raise ValueError(
            f"{NAME}: a rank has two runs of one length in the zigzag layout, got {length} tokens\npad to an even one"
        )
    if not _exchanges(heads, kv_heads, size) and (method == "ulysses" or (method == "auto" and not _gathers(options))):
        raise ValueError(
            f'{NAME}: method "ulysses" gives each rank the same number of heads, got {heads} query heads and {kv_heads} '
            f'key heads for {size} ranks\npass method="all_gather", which takes any number, or a smaller group'
        )
    if method == "live_blocks" and options.alibi_slopes is not None:
        raise ValueError(
            f'{NAME}: method "live_blocks" takes no ALiBi, got alibi_slopes\npass method="all_gather" or "ulysses"'
        )
    if method == "live_blocks" and (left != -1 or (right != -1 and not options.is_causal)):
        raise ValueError(
            f'{NAME}: method "live_blocks" takes no window, got window_size={options.window_size}\n'
            'pass method="all_gather" or "ulysses"'
        )
    if method == "all_gather" and not _gathers(options):
        got = f"window_size={options.window_size}" if options.alibi_slopes is None else "alibi_slopes"
        raise ValueError(
            f'{NAME}: method "all_gather" takes a window or ALiBi with is_causal=True, got {got}\npass method="ulysses"'
        )
