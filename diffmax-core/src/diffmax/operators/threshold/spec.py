"""Registration of threshold attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from diffmax.operators.common.heads import backward_flops, bound, cases_of_its_own, flops, question
from diffmax.operators.common.spec import Function, KernelSpec, OperatorSpec, Question, register
from diffmax.operators.threshold import api, operator, sharding

DESCRIBED = {
    "distance_bias": "a learned bias of the scores by distance, inside a window",
    "threshold_softmax": "threshold attention over softmax weights",
    "threshold_diffmax": "threshold attention over diffmax weights",
    "real_power": "threshold attention with a power other than 1 and 2",
}
FEATURES = frozenset(DESCRIBED) | {"gqa", "value_dim", "mask", "window", "varlen", "tensor_alpha", "deterministic"}


def _asks(function: Callable[..., Any], build: Callable[..., Any], *arguments: Any, **options: Any) -> Question:
    given = bound(function, *arguments, **options)
    backend = given.pop("backend")
    for name in ("return_mass", "normalize"):
        given.pop(name)
    query, key, value, call = build(**given)
    learned = (query, key, value, call.theta, call.bias, call.e)
    features = operator.features(query, key, value, call)
    return question("threshold_attention", query, value, learned, features, backend, call.e)


def _flops(*flat: Any, **_: Any) -> int:
    given = operator.FORWARD.rebuild(flat)
    return flops(given.query, given.key, given.value, given.call)


def _backward_flops(*flat: Any, **_: Any) -> int:
    given = operator.BACKWARD.rebuild(flat)
    return backward_flops(given.query, given.key, given.value, given.call)


register(
    OperatorSpec(
        name="threshold",
        rank=50,
        kernels={
            "threshold_attention": KernelSpec(FEATURES),
            "threshold_attention_backward": KernelSpec(FEATURES | {"alpha_gradient"}),
        },
        functions={
            "threshold_attention": Function("threshold_attention", partial(_asks, api.threshold_attention, api.build)),
            "threshold_attention_varlen": Function(
                "threshold_attention", partial(_asks, api.threshold_attention_varlen, api.build_packed), frozenset({"varlen"})
            ),
        },
        described=DESCRIBED,
        schemas=(operator.FORWARD, operator.BACKWARD),
        has_heads=True,
        flops={"threshold_attention": _flops, "threshold_attention_backward": _backward_flops},
        sharding=sharding.RULES,
        prepares=lambda needed: cases_of_its_own("threshold_attention", FEATURES, DESCRIBED, needed),
        selftest="diffmax.testing.threshold.selftest:CHECKS",
        kit="diffmax.testing.threshold_conformance:ThresholdConformance",
    )
)
