"""What the specs of operators over heads share: questions, warmup cases, FLOP counts."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from diffmax.operators.common.spec import Case, Needed, Question


def bound(function: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """The arguments of a call by name, with defaults."""
    found = inspect.signature(function).bind(*arguments, **options)
    found.apply_defaults()
    return dict(found.arguments)


def question(
    operator: str,
    query: Tensor,
    value: Tensor,
    learned: Collection[object],
    features: frozenset[str],
    backend: str | None,
    e: float | Tensor = 0.0,
) -> Question:
    """What a call asks. `learned`: what may have a gradient; `e`: 1 - alpha, if it may be a tensor."""
    given = [t for t in learned if isinstance(t, Tensor) and t.requires_grad]
    return Question(
        operator,
        query.device.type,
        query.dtype,
        tensor_alpha=isinstance(e, Tensor),
        alpha_gradient=isinstance(e, Tensor) and e.requires_grad,
        backward=torch.is_grad_enabled() and bool(given),
        backend=backend,
        features=features,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
    )


def cases(name: str, features: frozenset[str], needed: Needed, implied: frozenset[str] = frozenset()) -> Iterator[Case]:
    """The warmup cases: every head dimension with every set of supported features."""
    for size, asked in itertools.product(needed.head_dims, needed.features):
        more = frozenset({"value_dim"} if size[0] != size[1] else ())
        yield Case(name, (asked | more | implied) & features, size, size)


def cases_of_its_own(name: str, features: frozenset[str], own: Collection[str], needed: Needed) -> Iterator[Case]:
    """Those that name a feature of its own: kernels take as long to compile as attention's, and few models have both."""
    return (case for case in cases(name, features, needed) if not case.features.isdisjoint(own))


def flops(query: Tensor, key: Tensor, value: Tensor, call: Any) -> int:
    """Of attention's forward: the products with keys and values."""
    return 2 * _pairs(query, key, call) * (query.shape[3] + value.shape[3])


def backward_flops(query: Tensor, key: Tensor, value: Tensor, call: Any) -> int:
    """Scores again, and the gradients for query and key; those for weights and value."""
    return 2 * _pairs(query, key, call) * (3 * query.shape[3] + 2 * value.shape[3])


def _pairs(query: Tensor, key: Tensor, call: Any) -> int:
    """Pairs of a query and a key in one sequence, over all heads, whatever is hidden: as torch counts attention."""
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return math.prod(query.shape[:3]) * key.shape[2]
    offsets = (call.cu_seqlens_q, call.cu_seqlens_k)
    if any(t.is_meta or isinstance(t, FakeTensor) for t in offsets):  # lengths are unknown: all sequences count as the longest
        return int(query.shape[1] * (len(offsets[0]) - 1) * call.max_seqlen_q * call.max_seqlen_k)
    lengths_q, lengths_k = (t.diff().long() for t in offsets)
    return query.shape[1] * int((lengths_q * lengths_k).sum())
