"""Registration of power attention."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diffmax.operators.common.heads import bound, cases_of_its_own, question
from diffmax.operators.common.spec import Function, KernelSpec, OperatorSpec, Question, register
from diffmax.operators.power import api, checks, cost, operator, sharding
from diffmax.operators.power.symmetric import expanded_dim

DESCRIBED = {
    "gates": "power attention whose past decays by gates",
    "state": "power attention that starts from a state, or returns one",
    "high_degree": "power attention of degree 4 or more",
}
FEATURES = frozenset(DESCRIBED) | {"gqa", "value_dim", "deterministic"}


def _asks(*arguments: Any, **options: Any) -> Question:
    given = bound(api.power_attention, *arguments, **options)
    backend, final = given.pop("backend"), given.pop("return_final_state")
    query, key, value = (given[name] for name in ("query", "key", "value"))
    call = checks.build_call("explain", **given, final=final)
    learned = (query, key, value, call.log_gates, call.sums, call.norm)
    return question("power_attention", query, value, learned, operator.features(query, key, value, call), backend)


def _flops(*flat: Any, **_: Any) -> int:
    given = operator.FORWARD.rebuild(flat)
    return _counted(given.query, given.key, given.value, given.call, 1)


def _backward_flops(*flat: Any, **_: Any) -> int:
    given = operator.BACKWARD.rebuild(flat)
    return _counted(given.query, given.key, given.value, given.call, 3)  # forward again, and twice as much for gradients


def _counted(query: Tensor, key: Tensor, value: Tensor, call: Any, times: int) -> int:
    """Of the cheaper of both ways: a product of a query or key with a state, or of a query with a key and a weight's value."""
    length, many, heads = query.shape[2], key.shape[2], query.shape[1] / max(key.shape[1], 1)
    sizes = (query.shape[3], value.shape[3])
    chunk = call.chunk or cost.chosen_chunk(length, many, *sizes, call.degree, heads)
    if chunk >= many:
        pairs = length * many - length * (length - 1) / 2
        each = 2 * pairs * sum(sizes)
    else:
        state = expanded_dim(sizes[0], call.degree) * (sizes[1] + 1)
        each = 2 * many * (chunk / 2 * sum(sizes) + state * (1 + 1 / heads))
    return times * math.prod(query.shape[:2]) * int(each)


register(
    OperatorSpec(
        name="power",
        rank=40,
        kernels={"power_attention": KernelSpec(FEATURES), "power_attention_backward": KernelSpec(FEATURES)},
        functions={"power_attention": Function("power_attention", _asks, bench="diffmax.testing.power.bench:BENCH")},
        described=DESCRIBED,
        schemas=(operator.FORWARD, operator.BACKWARD),
        has_heads=True,
        flops={"power_attention": _flops, "power_attention_backward": _backward_flops},
        sharding=sharding.RULES,
        prepares=lambda needed: cases_of_its_own("power_attention", FEATURES, DESCRIBED, needed),
        selftest="diffmax.testing.power.selftest:CHECKS",
        kit="diffmax.testing.power_conformance:PowerConformance",
    )
)
