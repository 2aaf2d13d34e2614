"""Registration of attention."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from diffmax.operators.attention import api, operator, sharding
from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.call import Options, build_call, build_packed_call
from diffmax.operators.common.spec import Case, Function, KernelSpec, Needed, OperatorSpec, Question, register
from diffmax.plugin import AttentionCall

DESCRIBED = {
    **rules.described(AttentionCall),
    "gqa": "attention with fewer key heads than query heads",
    "varlen": "attention over packed sequences",
    "value_dim": "attention whose value head dimension differs from the key head dimension",
    "attention_stats": "attention that returns support sizes and live tiles",
    "dropout": "attention with dropout of the weights",
}
BOTH_WAYS = frozenset(DESCRIBED) - {"attention_stats"} | {"tensor_alpha", "deterministic"}


def _asks(function: Callable[..., Any], build: Callable[..., Any], *arguments: Any, **options: Any) -> Question:
    bound = inspect.signature(function).bind(*arguments, **options)
    bound.apply_defaults()
    given = dict(bound.arguments)
    stats, backend = bool(given.pop("return_stats")), given.pop("backend")
    chosen = Options(*(given.pop(name) for name in Options._fields))
    query, key, value, call = build(**given, options=chosen, draws=False)
    learned = [t for t in (query, key, value, call.e, call.bias, call.sink) if isinstance(t, Tensor) and t.requires_grad]
    return Question(
        "attention",
        query.device.type,
        query.dtype,
        tensor_alpha=isinstance(call.e, Tensor),
        alpha_gradient=isinstance(call.e, Tensor) and call.e.requires_grad,
        backward=torch.is_grad_enabled() and bool(learned),
        backend=backend,
        features=operator.features(query, key, value, call, stats),
        head_dim=query.shape[3],
        value_dim=value.shape[3],
    )


def cases(name: str, features: frozenset[str], needed: Needed, implied: frozenset[str] = frozenset()) -> Iterator[Case]:
    """The warmup cases of an operator with heads: every head dimension with every set of supported features."""
    for size, asked in itertools.product(needed.head_dims, needed.features):
        more = frozenset({"value_dim"} if size[0] != size[1] else ())
        yield Case(name, (asked | more | implied) & features, size, size)


def _flops(*flat: Any, **_: Any) -> int:
    given = operator.FORWARD.rebuild(flat)
    return 2 * _pairs(given.query, given.key, given.call) * (given.query.shape[3] + given.value.shape[3])


def _backward_flops(*flat: Any, **_: Any) -> int:
    given = operator.BACKWARD.rebuild(flat)
    # scores again, and the gradients for query and key; those for weights and value
    return 2 * _pairs(given.query, given.key, given.call) * (3 * given.query.shape[3] + 2 * given.value.shape[3])


def _pairs(query: Tensor, key: Tensor, call: AttentionCall) -> int:
    """The number of pairs of a query and a key in one sequence, over all heads."""
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return math.prod(query.shape[:3]) * key.shape[2]
    offsets = (call.cu_seqlens_q, call.cu_seqlens_k)
    if any(t.is_meta or isinstance(t, FakeTensor) for t in offsets):  # lengths are unknown: all sequences count as the longest
        return query.shape[1] * (len(offsets[0]) - 1) * call.max_seqlen_q * call.max_seqlen_k
    lengths_q, lengths_k = (t.diff().long() for t in offsets)
    return query.shape[1] * int((lengths_q * lengths_k).sum())


def _with_bundles(function: Callable[..., Any], version: tuple[int, int]) -> Callable[..., Any]:
    return operator.with_flat_arguments(function) if version < (1, 4) else function


FORWARD = BOTH_WAYS | {"attention_stats"}
register(
    OperatorSpec(
        name="attention",
        rank=10,
        kernels={
            "attention": KernelSpec(FORWARD),
            "attention_backward": KernelSpec(BOTH_WAYS | {"alpha_gradient"}, adapt=_with_bundles),
        },
        functions={
            "attention": Function(
                "attention", partial(_asks, api.attention, build_call), bench="diffmax.testing.attention.bench:BENCH"
            ),
            "attention_varlen": Function(
                "attention", partial(_asks, api.attention_varlen, build_packed_call), frozenset({"varlen"})
            ),
        },
        described=DESCRIBED,
        schemas=(operator.FORWARD, operator.BACKWARD),
        has_heads=True,
        flops={"attention": _flops, "attention_backward": _backward_flops},
        sharding=sharding.RULES,
        prepares=lambda needed: cases("attention", FORWARD, needed),
        selftest="diffmax.testing.attention.selftest:CHECKS",
        kit="diffmax.testing.attention_conformance:AttentionConformance",
    )
)
