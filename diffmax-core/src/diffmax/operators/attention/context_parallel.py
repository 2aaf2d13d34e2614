"""Attention over a sequence that is sharded over ranks. What is sent, and which way sends less: docs/distributed.md.

The threshold of a query depends on all its keys. So either heads are exchanged for tokens, or keys and values are gathered; the
attention of each rank is then the fused one, of whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from diffmax.operators.attention import checks
from diffmax.operators.attention.api import attention
from diffmax.operators.common import messages

NAME = "diffmax.distributed.attention_context_parallel"
METHODS = ("ulysses", "all_gather")
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
    softcap: float
    sink: Tensor | None
    backend: str | None


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks) -> Tensor:
    """The rows of this rank's queries."""
    _agree(query, key, value, options, ranks)
    run = _by_heads if options.method == "ulysses" else _by_tokens
    return run(query, key, value, options, ranks)


def _by_heads(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks) -> Tensor:
    """Each rank gets some of the heads, with all their tokens."""
    size, length = ranks.size, query.shape[2]
    sent = [t.unflatten(1, (size, -1)).movedim(1, 0) for t in (query, key, value)]
    received = messages.Exchange.apply(torch.cat([t.flatten(1) for t in sent], 1), ranks.group)
    parts = received.split([t[0].numel() for t in sent], 1)
    order = _places(options.layout, size, length, query.device)
    back = order.argsort()
    whole = [_in_order(t.reshape(like.shape), back) for t, like in zip(parts, sent, strict=True)]
    heads = sent[0].shape[2]

    def own(t: Any) -> Any:
        """Of one number per head, those of this rank's heads."""
        if not isinstance(t, Tensor):
            return t
        handed = messages.Hand.apply(t, ranks.group)
        return handed.narrow(0, ranks.rank * heads, heads) if t.ndim == 1 and t.shape[0] == query.shape[1] else handed

    out = _attention(options, own)(*whole, is_causal=options.is_causal, window_size=options.window_size)
    tokens = out[:, :, order].unflatten(2, (size, length)).movedim(2, 0)
    returned = messages.Exchange.apply(tokens.flatten(1), ranks.group).view(tokens.shape)
    return returned.movedim(0, 1).flatten(1, 2)  # type: ignore[no-any-return]


def _by_tokens(query: Tensor, key: Tensor, value: Tensor, options: Options, ranks: Ranks) -> Tensor:
    """Each rank gets the keys and values of all tokens. A run of queries that is causal sees them up to its own last token."""
    size, length = ranks.size, query.shape[2]
    gathered = messages.Gather.apply(torch.cat([key.flatten(), value.flatten()]), ranks.group).view(size, -1)
    order = _places(options.layout, size, length, query.device)
    back = order.argsort()
    keys, values = (
        _in_order(t.reshape(size, *like.shape), back)
        for t, like in zip(gathered.split([key.numel(), value.numel()], 1), (key, value), strict=True)
    )

    def own(t: Any) -> Any:
        return messages.Hand.apply(t, ranks.group) if isinstance(t, Tensor) else t

    run = _attention(options, own)
    if not options.is_causal:
        return run(query, keys, values)
    ends = [0, *_run_ends(options.layout, length)]
    starts = [int(order[ranks.rank * length + start]) for start in ends[:-1]] if length else []
    rows = []
    for (first, last), start in zip(pairwise(ends), starts, strict=False):
        seen = start + last - first
        rows.append(
            run(
                query[:, :, first:last],
                keys[:, :, :seen],
                values[:, :, :seen],
                is_causal=True,
                window_size=options.window_size,
                causal_alignment="lower_right",
            )
        )
    return torch.cat(rows, 2) if rows else run(query, keys, values)


def _attention(options: Options, own: Callable[[Any], Any]) -> Callable[..., Tensor]:
    alpha, sink = own(options.alpha), own(options.sink)

    def run(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        given: dict[str, Any] = {"scale": options.scale, "softcap": options.softcap, "backend": options.backend, **more}
        out: Tensor = attention(query, key, value, enable_gqa=True, alpha=alpha, sink=sink, **given)
        return out

    return run


def _in_order(t: Tensor, back: Tensor) -> Tensor:
    """(ranks, B, H, l, D) as (B, H, L, D), the tokens in their order."""
    return t.movedim(0, 2).flatten(2, 3)[:, :, back]


def _places(layout: str, size: int, length: int, device: torch.device) -> Tensor:
    """The positions of the tokens in the order in which the ranks hold them (Eq. 40)."""
    if layout == "contiguous":
        return torch.arange(size * length, device=device)
    runs = torch.arange(size * length, device=device).view(2 * size, -1)
    pairs = [run for rank in range(size) for run in (rank, 2 * size - 1 - rank)]
    return runs[pairs].flatten()


def _run_ends(layout: str, length: int) -> list[int]:
    """Where the runs of consecutive tokens of a rank end."""
    return [length] if layout == "contiguous" else [length // 2, length]


def _agree(query: Any, key: Any, value: Any, options: Options, ranks: Ranks) -> None:
    """Check the arguments, and see that all ranks make the same call; else raise on every rank."""
    try:
        _check(query, key, value, options, ranks)
        problem = None
    except (TypeError, ValueError) as error:
        problem = error
    parts, shared = {"query": query, "key": key, "value": value}, {"alpha": options.alpha, "sink": options.sink}
    learning = torch.is_grad_enabled()
    facts: dict[str, Any] = {
        **{f"{name}'s shape": tuple(t.shape) if isinstance(t, Tensor) else t for name, t in parts.items()},
        **{name: t.detach().tolist() if isinstance(t, Tensor) else t for name, t in shared.items()},
        "query's dtype": getattr(query, "dtype", None),
        "what requires a gradient": [
            name for name, t in {**parts, **shared}.items() if learning and isinstance(t, Tensor) and t.requires_grad
        ],
        **{name: given for name, given in options._asdict().items() if name not in ("alpha", "sink")},
    }
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    refusing, differing = messages.agree(facts, 0 if problem is None else 1 + ranks.rank, ranks.group, device)
    if problem is not None:
        raise problem
    if refusing:
        raise ValueError(
            f"{NAME}: every rank's arguments must be valid, got invalid ones on rank {refusing - 1}\nit says which"
        )
    if differing:
        raise ValueError(
            f"{NAME}: {' and '.join(differing)} must be the same on every rank, got different ones\n"
            + "\n".join(f"  {name} on rank {ranks.rank}: {facts[name]}" for name in differing)
        )


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
    checks.check_softcap(NAME, options.softcap)
    checks.check_scale(NAME, query, options.scale)
    left, right = checks.check_window(NAME, options.window_size, options.is_causal)
    if key.shape[2] != length:
        raise ValueError(f"{NAME}: query and key must have the same length on a rank, got {length} and {key.shape[2]}")
    if layout == "zigzag" and length % 2:
        raise ValueError(
            f"{NAME}: a rank has two runs of one length in the zigzag layout, got {length} tokens\npad to an even one"
        )
    if method == "ulysses" and (heads % size or kv_heads % size):
        raise ValueError(
            f'{NAME}: method "ulysses" gives each rank the same number of heads, got {heads} query heads and {kv_heads} '
            f'key heads for {size} ranks\npass method="all_gather", which takes any number, or a smaller group'
        )
    if method == "all_gather" and not options.is_causal and (left, right) != (-1, -1):
        raise ValueError(
            f'{NAME}: method "all_gather" takes a window with is_causal=True, got window_size={options.window_size}\n'
            'pass method="ulysses"'
        )
