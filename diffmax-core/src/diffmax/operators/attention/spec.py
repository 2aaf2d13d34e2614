"""Registration of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffmax.operators.attention import api, operator, sharding
from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.call import Options, build_call, build_packed_call
from diffmax.operators.common.heads import backward_flops, bound, cases, flops, question
from diffmax.operators.common.spec import Function, KernelSpec, OperatorSpec, Question, register
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
    given = bound(function, *arguments, **options)
    stats, backend = bool(given.pop("return_stats")), given.pop("backend")
    given.pop("return_weights")  # made from what every kernel returns
    chosen = Options(*(given.pop(name) for name in Options._fields))
    query, key, value, call = build(**given, options=chosen, draws=False)
    learned = (query, key, value, call.e, call.bias, call.sink)
    return question("attention", query, value, learned, operator.features(query, key, value, call, stats), backend, call.e)


def _flops(*flat: Any, **_: Any) -> int:
    given = operator.FORWARD.rebuild(flat)
    return flops(given.query, given.key, given.value, given.call)


def _backward_flops(*flat: Any, **_: Any) -> int:
    given = operator.BACKWARD.rebuild(flat)
    return backward_flops(given.query, given.key, given.value, given.call)


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
