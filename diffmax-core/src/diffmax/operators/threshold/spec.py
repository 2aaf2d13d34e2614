"""Registration of threshold attention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffmax.operators.attention.spec import cases
from diffmax.operators.common.spec import Case, Function, KernelSpec, Needed, OperatorSpec, Question, register
from diffmax.operators.threshold import api, operator, sharding

DESCRIBED = {
    "distance_bias": "a learned bias of the scores by distance, inside a window",
    "threshold_softmax": "threshold attention over softmax weights",
    "threshold_diffmax": "threshold attention over diffmax weights",
    "real_power": "threshold attention with a power other than 1 and 2",
}
FEATURES = frozenset(DESCRIBED) | {"gqa", "value_dim", "mask", "varlen", "deterministic"}


def _asks(function: Callable[..., Any], build: Callable[..., Any], *arguments: Any, **options: Any) -> Question:
    bound = inspect.signature(function).bind(*arguments, **options)
    bound.apply_defaults()
    given = dict(bound.arguments)
    backend = given.pop("backend")
    for name in ("return_mass", "normalize"):
        given.pop(name)
    query, key, value, call = build(**given)
    learned = [t for t in (query, key, value, call.theta, call.bias) if t is not None and t.requires_grad]
    return Question(
        "threshold_attention",
        query.device.type,
        query.dtype,
        backward=torch.is_grad_enabled() and bool(learned),
        backend=backend,
        features=operator.features(query, key, value, call),
        head_dim=query.shape[3],
        value_dim=value.shape[3],
    )


def _prepares(needed: Needed) -> Iterator[Case]:
    """Where features of its own are named, as of power attention."""
    for case in cases("threshold_attention", FEATURES, needed):
        if case.features & DESCRIBED.keys():
            yield case


def _flops(*flat: Any, **_: Any) -> int:
    given = operator.FORWARD.rebuild(flat)
    return 2 * _pairs(given.query, given.key) * (given.query.shape[3] + given.value.shape[3])


def _backward_flops(*flat: Any, **_: Any) -> int:
    given = operator.BACKWARD.rebuild(flat)
    return 2 * _pairs(given.query, given.key) * (3 * given.query.shape[3] + 2 * given.value.shape[3])


def _pairs(query: Tensor, key: Tensor) -> int:
    """As torch counts attention: all pairs, whatever is hidden."""
    return math.prod(query.shape[:3]) * key.shape[2]


register(
    OperatorSpec(
        name="threshold",
        rank=50,
        kernels={
            "threshold_attention": KernelSpec(FEATURES),
            "threshold_attention_backward": KernelSpec(FEATURES),
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
        prepares=_prepares,
        selftest="diffmax.testing.threshold.selftest:CHECKS",
        kit="diffmax.testing.threshold_conformance:ThresholdConformance",
    )
)
