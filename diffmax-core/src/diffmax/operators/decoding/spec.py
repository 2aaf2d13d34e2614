"""Registration of attention over a cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from diffmax.operators.attention import scores as rules
from diffmax.operators.common.heads import bound, cases
from diffmax.operators.common.spec import Case, Function, KernelSpec, Needed, OperatorSpec, Question, register
from diffmax.operators.decoding import api, operator, sharding
from diffmax.plugin import KVCacheCall

DESCRIBED = {
    **rules.described(KVCacheCall),
    "kv_cache": "attention over a cache, to which new keys and values are appended",
    "paged": "attention over a paged cache",
    "rounded_keys": "attention over a cache with its keys in 4 bits too, which say what to read",
}
FEATURES = frozenset(DESCRIBED) | {"tensor_alpha", "deterministic", "gqa", "value_dim", "attention_stats"}
ALWAYS = frozenset({"kv_cache"})


def _asks(*arguments: Any, **named: Any) -> Question:
    given = bound(api.attention_with_kvcache, *arguments, **named)
    options = api.Options(*(given[name] for name in api.Options._fields))
    q, k_cache, v_cache, call = api.build_call(given["q"], given["k_cache"], given["v_cache"], given["k"], given["v"], options)
    return Question(
        "attention_kvcache",
        q.device.type,
        q.dtype,
        tensor_alpha=isinstance(call.e, Tensor),
        backend=given["backend"],
        features=operator.features(q, k_cache, v_cache, call, bool(given["return_stats"])),
        head_dim=q.shape[3],
        value_dim=v_cache.shape[3],
    )


def _prepares(needed: Needed) -> Iterable[Case]:
    return cases("attention_kvcache", FEATURES, needed, ALWAYS) if needed.decoding else ()


def _flops(*flat: Any, **_: Any) -> int:
    given = operator.SCHEMA.rebuild(flat)
    query, k_cache, table = given.query, given.k_cache, given.call.block_table
    keys = k_cache.shape[1] * (1 if table is None else table.shape[1])
    return 2 * math.prod(query.shape[:3]) * keys * (query.shape[3] + given.v_cache.shape[3])


register(
    OperatorSpec(
        name="decoding",
        rank=20,
        kernels={"attention_kvcache": KernelSpec(FEATURES)},
        functions={
            "attention_with_kvcache": Function("attention_kvcache", _asks, ALWAYS, "diffmax.testing.decoding.bench:BENCH")
        },
        described=DESCRIBED,
        schemas=(operator.SCHEMA,),
        has_heads=True,
        flops={"attention_kvcache": _flops},
        sharding=sharding.RULES,
        prepares=_prepares,
        selftest="diffmax.testing.decoding.selftest:CHECKS",
        kit="diffmax.testing.kvcache_conformance:KVCacheConformance",
    )
)
