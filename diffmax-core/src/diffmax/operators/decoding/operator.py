"""torch.ops.diffmax.attention_kvcache: schema, fake implementation for tracing, in-place mutation.

The arithmetic is in the kernel that `machine.dispatch` selects, with the signature of `diffmax.reference.decoding`. There is no
gradient: the call overwrites values in the caches that a backward would need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.machine.dispatch import kernel
from diffmax.operators.attention import scores as rules
from diffmax.operators.common import portable
from diffmax.operators.common.autograd import differentiates, has_tangent, is_transformed
from diffmax.operators.common.fast_path import is_plain
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.wiring import enter
from diffmax.operators.decoding import checks
from diffmax.plugin import KVCacheCall, KVCacheResults


class Arguments(NamedTuple):
    """Arguments of torch.ops.diffmax.attention_kvcache. `stats`: whether to compute statistics."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    stats: bool
    call: KVCacheCall
    backend: str = ""


SCHEMA = Schema(
    "attention_kvcache", Arguments, KVCacheResults, mutated=("k_cache", "v_cache", "low", "high", "codes"), sizes=True
)


def features(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the call needs, alpha's aside."""
    return rules.features(
        call,
        kv_cache=True,
        paged=call.block_table is not None,
        rounded_keys=call.codes is not None,
        gqa=query.shape[2] != k_cache.shape[2],
        value_dim=v_cache.shape[3] != k_cache.shape[3],
        attention_stats=stats,
    )


def attention_kvcache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool, backend: str
) -> KVCacheResults:
    """What torch.ops.diffmax.attention_kvcache gives, on the shortest way there; torch.jit.trace can record it."""
    if not torch.compiler.is_compiling():
        if portable.is_tracing():
            return portable.kvcache(query, k_cache, v_cache, call, stats)
        tensors = (query, k_cache, v_cache, *vars(call).values())
        if not is_transformed() and is_plain(*tensors) and not differentiates(call.low, call.high):  # others are refused
            _caches_change(k_cache, v_cache, call)
            with torch._C._AutoDispatchBelowAutograd():
                return _run(query, k_cache, v_cache, stats, call, backend)
    return KVCacheResults(*SCHEMA(query, k_cache, v_cache, stats, call, backend))


def _attention_kvcache(*flat: Any) -> KVCacheResults:
    arguments = SCHEMA.rebuild(flat)
    checks.check_values(arguments.k_cache, arguments.call)
    return _run(*arguments)


def _run(query: Tensor, k_cache: Tensor, v_cache: Tensor, stats: bool, call: KVCacheCall, backend: str) -> KVCacheResults:
    run = kernel(
        "attention_kvcache",
        query,
        backend,
        tensor_alpha=isinstance(call.e, Tensor),
        features=features(query, k_cache, v_cache, call, stats),
        head_dims=(query.shape[3], v_cache.shape[3]),
    )
    if call.k is not None:
        query, call = checks.apart(query, k_cache, v_cache, call)
    with torch._C._DisableAutocast():  # the kernel chooses the dtypes of its products itself
        return KVCacheResults(*run(query, k_cache, v_cache, call, stats))


def _attention_kvcache_fake(*flat: Any) -> KVCacheResults:
    query, k_cache, v_cache, stats, *_ = SCHEMA.rebuild(flat)
    batch, length, heads, _ = query.shape
    m = query.new_empty((batch, heads, length), dtype=accumulation_dtype(query.dtype))
    support = query.new_empty(m.shape if stats else (0,), dtype=torch.int32)
    pages = query.new_empty((batch, k_cache.shape[2]) if stats else (0,), dtype=torch.int32)
    out = query.new_empty((batch, length, heads, v_cache.shape[3]))
    return KVCacheResults(out, m, torch.empty_like(m), support, pages)


def _attention_kvcache_returned(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool
) -> KVCacheResults:
    return _attention_kvcache_fake(*SCHEMA.flatten(query, k_cache, v_cache, stats, call, ""))


def _attention_kvcache_autograd(*flat: Any) -> Any:
    query, k_cache, v_cache, stats, call, _ = SCHEMA.rebuild(flat)
    if portable.exports_onnx():
        return portable.kvcache(query, k_cache, v_cache, call, stats)
    tensors = [t for t in flat if isinstance(t, Tensor)]
    if differentiates(*tensors) or has_tangent(*tensors):
        raise NotImplementedError(checks.NO_GRADIENT)
    _caches_change(k_cache, v_cache, call)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.attention_kvcache(*flat)


def _caches_change(k_cache: Tensor, v_cache: Tensor, call: KVCacheCall) -> None:
    """What a backward saved of a cache, it must not use after tokens are appended."""
    if call.k is not None:
        for changed in (k_cache, v_cache, call.low, call.high, call.codes):
            if changed is not None and not changed.is_inference():
                torch.autograd.graph.increment_version(changed)


def _attention_kvcache_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        "diffmax.attention_with_kvcache: torch.vmap cannot batch it, since it changes the caches in place\n"
        "its own batch is the first dimension of q: put the sequences there"
    )


enter(
    SCHEMA,
    run=_attention_kvcache,
    autograd=_attention_kvcache_autograd,
    fake=_attention_kvcache_fake,
    vmap=_attention_kvcache_vmap,
    returned=_attention_kvcache_returned,
)
