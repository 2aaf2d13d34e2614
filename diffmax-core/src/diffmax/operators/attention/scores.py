"""What acts on attention's scores, written once: softcap, bias, ALiBi, window, padding, mask, sink, in this order.

A `Rule` says which features a call needs for it, what it does to a block of scores, its derivative, and what it makes of an
upper bound. The reference, the CPU kernels, decoding, the Ascend kernels and the integrations apply the same rules; a `Region`
tells how each of them cuts the scores. A new rule is a class here, a field of the call, and one function of the Triton kernels:
docs/decisions/0080-rules-of-the-scores.md. Symbols: docs/theory.md.

Positions are the keys': key j has position j, and each query has the position that causality, windows and ALiBi count from.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffmax.plugin import AttentionCall, KVCacheCall

Call: TypeAlias = "AttentionCall | KVCacheCall"

ALL = slice(None)


class Region(ABC):
    """A block of the scores of one call, (..., queries, keys), and how what the call holds reaches it.

    Attributes:
        in_place: Whether a rule may write into the scores that it gets. Not where autograd records.
    """

    in_place: ClassVar[bool] = False

    @abstractmethod
    def queries(self) -> Tensor:
        """Positions of the queries, (..., queries, 1), to broadcast against the scores."""

    @abstractmethod
    def keys(self) -> Tensor:
        """Positions of the keys, (..., keys), likewise."""

    @abstractmethod
    def of_heads(self, t: Tensor) -> Tensor:
        """Numbers per head, (H,) or (B, H), to broadcast against the scores."""

    def of_scores(self, t: Tensor) -> Tensor:
        """The region's part of a tensor (B, H, L, S), of which dimensions may have size 1, to broadcast against the scores."""
        return t

    def of_sequences(self, t: Tensor) -> Tensor:
        """Numbers per sequence, (B,), to broadcast against the scores."""
        return t.view(-1, 1, 1, 1)

    def padding(self) -> tuple[Tensor, ...]:
        """Booleans, to broadcast against the scores: what lies behind the end of its sequence. Empty where nothing does."""
        return ()

    def edge(self, call: Call, side: str) -> slice | None:
        """The columns among which the window hides some on this side, "left" or "right"; None: it hides none."""
        return ALL

    def add(self, scores: Tensor, term: Tensor, factor: Tensor | None = None) -> Tensor:
        """scores + term, or scores - factor * term."""
        if factor is None:
            return scores.add_(term) if self.in_place else scores + term
        return scores.addcmul_(factor, term, value=-1) if self.in_place else scores - factor * term

    def hide(self, scores: Tensor, hidden: Tensor, columns: slice = ALL) -> Tensor:
        """The scores with -inf where those of some columns are hidden."""
        if not self.in_place:
            return scores.masked_fill(hidden, -torch.inf)
        scores[..., columns].masked_fill_(hidden, -torch.inf)
        return scores


class Pages(NamedTuple):
    """Pages of keys, of which only bounds are known: the scores of a page have an upper bound, (queries, pages).

    Attributes:
        first, last: (pages,), the positions of each page's first and last key.
        queries: (queries, 1), positions.
        slopes: (queries, 1), ALiBi's, if the call has them.
        eps: Of the dtype that scores are computed in: a bound leaves room for their rounding.
    """

    first: Tensor
    last: Tensor
    queries: Tensor
    slopes: Tensor | None
    eps: float


class Rule:
    """What acts on the scores of a call that needs one of its features.

    Attributes:
        fields: Of a call, those that it reads; calls that lack one never need it.
        described: The features, with their meaning.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    described: ClassVar[Mapping[str, str]] = {}

    def features(self, call: Call) -> frozenset[str]:
        """Those of `diffmax.plugin.FEATURES` that the call needs for this rule; none if it has no use for it."""
        raise NotImplementedError

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """The scores after the rule."""
        raise NotImplementedError

    def slope(self, scores: Tensor, call: Call, out: Tensor | None = None) -> Tensor | None:
        """The derivative of the result in the scores before, from the result, written to `out` if given; None: 1."""
        return None

    def bound(self, bound: Tensor, call: KVCacheCall, pages: Pages) -> Tensor:
        """An upper bound of the results from one of the scores before, which may be written into."""
        return bound


class Softcap(Rule):
    """c tanh(score / c), which lies between -c and c."""

    fields = ("softcap",)
    described: ClassVar = {"softcap": "attention with capped scores"}

    def features(self, call: Call) -> frozenset[str]:
        """`softcap`."""
        return _ALONE["softcap"] if call.softcap > 0 else _NOTHING

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """Scores in (-c, c)."""
        if region.in_place:
            return scores.div_(call.softcap).tanh_().mul_(call.softcap)
        return call.softcap * (scores / call.softcap).tanh()

    def slope(self, scores: Tensor, call: Call, out: Tensor | None = None) -> Tensor | None:
        """1 - tanh^2."""
        if out is None:
            return 1 - (scores / call.softcap).square()
        return torch.div(scores, call.softcap, out=out).square_().neg_().add_(1.0)

    def bound(self, bound: Tensor, call: KVCacheCall, pages: Pages) -> Tensor:
        """The function ascends."""
        return call.softcap * (torch.tanh(bound / call.softcap) + 32 * pages.eps)


class Bias(Rule):
    """A tensor that is added; its gradient is the scores', summed over what it broadcasts along."""

    fields = ("bias",)
    described: ClassVar = {"bias": "attention with an additive bias, and its gradient"}

    def features(self, call: Call) -> frozenset[str]:
        """`bias`."""
        return _ALONE["bias"] if _given(call, "bias") is not None else _NOTHING

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """Scores and the bias."""
        return region.add(scores, region.of_scores(_given(call, "bias")).to(scores.dtype))


class Alibi(Rule):
    """- slope |distance|. The slopes have no gradient."""

    fields = ("alibi",)
    described: ClassVar = {"alibi": "attention with ALiBi's slopes"}

    def features(self, call: Call) -> frozenset[str]:
        """`alibi`."""
        return _ALONE["alibi"] if call.alibi is not None else _NOTHING

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """Scores less the penalty."""
        distance = (region.keys().int() - region.queries().int()).abs_().to(scores.dtype)  # int32 takes half of the memory
        return region.add(scores, distance, region.of_heads(_given(call, "alibi")).to(scores.dtype))

    def bound(self, bound: Tensor, call: KVCacheCall, pages: Pages) -> Tensor:
        """A page's least penalty: at its nearest key, or for a negative slope at its farthest."""
        slopes, first, last = pages.slopes, pages.first - pages.queries, pages.last - pages.queries
        if slopes is None:
            raise ValueError("attention_kvcache: bounds of a call with ALiBi need its slopes, got none")
        near, far = torch.maximum(first, -last).clamp_min(0), torch.maximum(first.abs(), last.abs())
        taken = slopes * torch.where(slopes < 0, far, near)
        return bound.add_(4 * pages.eps * (taken.abs() + bound.abs()) - taken)


class Window(Rule):
    """Keys more than `left` before a query, or more than `right` behind it, are hidden. Causality is right = 0."""

    fields = ("left", "right")
    described: ClassVar = {
        "causal": "attention in which a query sees no later key",
        "window": "attention in which a query sees the keys of a window",
    }

    def features(self, call: Call) -> frozenset[str]:
        """`causal`, `window`."""
        of_causality = _ALONE["causal"] if call.right == 0 else _NOTHING
        return of_causality | _ALONE["window"] if call.left >= 0 or call.right > 0 else of_causality

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """-inf outside."""
        if call.right >= 0 and (columns := region.edge(call, "right")) is not None:
            hidden = _columns(region.keys(), columns) > region.queries() + call.right
            scores = region.hide(scores, hidden, columns)
        if call.left >= 0 and (columns := region.edge(call, "left")) is not None:
            hidden = _columns(region.keys(), columns) < region.queries() - call.left
            scores = region.hide(scores, hidden, columns)
        return scores

    def bound(self, bound: Tensor, call: KVCacheCall, pages: Pages) -> Tensor:
        """-inf for pages that lie outside."""
        if call.right >= 0:
            bound.masked_fill_(pages.first > pages.queries + call.right, -torch.inf)
        if call.left >= 0:
            bound.masked_fill_(pages.last < pages.queries - call.left, -torch.inf)
        return bound


class Padding(Rule):
    """What lies behind the end of its sequence is hidden: the region knows it, as the operator's tensors do."""

    def features(self, call: Call) -> frozenset[str]:
        """None: it comes with packed sequences and caches."""
        return _NOTHING

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """-inf behind the end."""
        for hidden in region.padding():
            scores = region.hide(scores, hidden)
        return scores


class LeftPad(Rule):
    """Keys before the start of their sequence are hidden."""

    fields = ("leftpad",)
    described: ClassVar = {"leftpad": "attention over a cache whose sequences start late"}

    def features(self, call: Call) -> frozenset[str]:
        """`leftpad`."""
        return _ALONE["leftpad"] if _given(call, "leftpad") is not None else _NOTHING

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """-inf before the start."""
        return region.hide(scores, region.keys() < region.of_sequences(_given(call, "leftpad")))


class Mask(Rule):
    """A boolean tensor: what is False is hidden."""

    fields = ("mask",)
    described: ClassVar = {"mask": "attention with a boolean mask"}

    def features(self, call: Call) -> frozenset[str]:
        """`mask`."""
        return _ALONE["mask"] if _given(call, "mask") is not None else _NOTHING

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """-inf where it is False."""
        return region.hide(scores, ~region.of_scores(_given(call, "mask")))


class Sink(Rule):
    """One more score for each query, behind the keys', which nothing before acts on and which has no value.

    Its gradient is its score's. Kernels that cut the scores by keys add its column themselves, by `with_sink`.
    """

    fields = ("sink",)
    described: ClassVar = {"sink": "attention with a learned sink, and its gradient"}

    def features(self, call: Call) -> frozenset[str]:
        """`sink`."""
        return _ALONE["sink"] if call.sink is not None else _NOTHING

    def apply(self, scores: Tensor, call: Call, region: Region) -> Tensor:
        """(..., queries, keys + 1)."""
        return with_sink(scores, region.of_heads(_given(call, "sink")))


RULES: tuple[Rule, ...] = (Softcap(), Bias(), Alibi(), Window(), Padding(), LeftPad(), Mask(), Sink())
"""In the order in which they act."""


def described(kind: type) -> dict[str, str]:
    """The features that calls of a kind may need for the rules, with their meaning."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: text for rule in RULES if known >= {*rule.fields} for name, text in rule.described.items()}


def features(call: Call, **more: bool) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the rules of a call need, and those of `more` that are true."""
    return _features(*[rule.features(call) for rule in RULES], **more)


@cache
def _features(*of_rules: frozenset[str], **more: bool) -> frozenset[str]:
    return frozenset(name for name, needed in more.items() if needed).union(*of_rules)


def acting(call: Call, sink: bool = True) -> tuple[Rule, ...]:
    """The rules that a call needs, without the sink's if not `sink`: asked once for all blocks of a call."""
    select = _selected if torch.compiler.is_compiling() else _selected_before  # torch.compile warns of a cache
    return select(sink, *[rule.features(call) for rule in RULES])


def _selected(sink: bool, *found: frozenset[str]) -> tuple[Rule, ...]:
    needed = (rule for rule, own in zip(RULES, found, strict=True) if own or type(rule) is Padding)
    return tuple(rule for rule in needed if sink or type(rule) is not Sink)


_selected_before = cache(_selected)


def apply(scores: Tensor, call: Call, region: Region, some: tuple[Rule, ...] | None = None) -> Tensor:
    """Scaled products of queries and keys, which may be given up, after every rule, or after those of `some`."""
    for rule in acting(call) if some is None else some:
        scores = rule.apply(scores, call, region)
    return scores


def apply_with_slope(
    scores: Tensor, call: Call, region: Region, some: tuple[Rule, ...] | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `apply`, and the derivative of each score in the product before the rules, written to `out` if given; None: 1."""
    slope = None
    for rule in acting(call) if some is None else some:
        scores = rule.apply(scores, call, region)
        own = rule.slope(scores, call, out if slope is None else None)
        if own is not None:
            slope = own if slope is None else slope * own
    return scores, slope


def has_slope(call: Call) -> bool:
    """Whether the rules of a call change scores by more than a sum."""
    return any(rule.features(call) and type(rule).slope is not Rule.slope for rule in RULES)


def bounds(bound: Tensor, call: KVCacheCall, pages: Pages) -> Tensor:
    """An upper bound of a page's scores after every rule, from one of its products, which is given up."""
    for rule in RULES:
        if rule.features(call):
            bound = rule.bound(bound, call, pages)
    return bound


def with_sink(scores: Tensor, sink: Tensor) -> Tensor:
    """The scores with the sink's behind them."""
    return torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)


def visible_span(first: Any, last: Any, left: int, right: int, keys: Any) -> tuple[Any, Any]:
    """The first key, and one behind the last, that a window leaves to queries at the positions `first` to `last`.

    Positions and the number of keys are ints, or tensors of them. The span may be empty, or end before it begins.
    """
    low = first - left if left >= 0 else first * 0
    high = last + right + 1 if right >= 0 else last * 0 + keys
    if isinstance(low, Tensor):
        # a number that becomes a tensor is a constant to torch.compile, and one that clamps is not
        return low.clamp_min(0), torch.minimum(high, keys) if isinstance(keys, Tensor) else high.clamp_max(keys)
    return max(low, 0), min(high, keys)


def _columns(keys: Tensor, columns: slice) -> Tensor:
    return keys if columns is ALL else keys[..., columns]


def _given(call: Call, field: str) -> Any:
    """A field that calls of one kind may lack."""
    return getattr(call, field, None)


_NOTHING = frozenset[str]()
_ALONE = {name: frozenset({name}) for rule in RULES for name in rule.described}
