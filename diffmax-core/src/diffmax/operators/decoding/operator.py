"""torch.ops.diffmax.attention_kvcache: schema, shapes for tracing, what it changes in place.

The arithmetic is in the kernel that `machine.dispatch` chooses, with the signature of `diffmax.reference.decoding`. There is no
gradient: the caches are changed in place, and a value that a backward would need is gone by then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmax.machine.dispatch import kernel
from diffmax.operators.attention import operator as attention_operator
from diffmax.operators.common import portable
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.rows import operator as rows_operator
from diffmax.plugin import KVCacheCall

_LIBRARY = attention_operator._LIBRARY
_LIBRARY.define(
    "attention_kvcache(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor cache_seqlens,"
    " Tensor? cache_batch_idx, Tensor? block_table, Tensor(c!)? low, Tensor(d!)? high, SymInt page_size, bool stats,"
    " float scale, float e, Tensor? e_tensor, SymInt left, SymInt right, float softcap, Tensor? alibi, Tensor? sink,"
    " str backend) -> (Tensor out, Tensor m, Tensor delta, Tensor support, Tensor pages)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
NO_GRADIENT = (
    "diffmax.attention_with_kvcache: it has no gradient, and an argument requires one\n"
    "call it under torch.no_grad() or torch.inference_mode(), or train with diffmax.attention"
)


def features(query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the call needs, alpha's aside."""
    needs = {
        "kv_cache": True,
        "paged": call.block_table is not None,
        "causal": call.right == 0,
        "window": call.left >= 0 or call.right > 0,
        "gqa": query.shape[2] != k_cache.shape[2],
        "value_dim": v_cache.shape[3] != k_cache.shape[3],
        "attention_stats": stats,
        "softcap": call.softcap != 0,
        "alibi": call.alibi is not None,
        "sink": call.sink is not None,
    }
    return frozenset(name for name, needed in needs.items() if needed)


def _packed(call: KVCacheCall, stats: bool, backend: str) -> tuple[Any, ...]:
    """What the operator takes behind the caches."""
    e, e_tensor = (0.0, call.e) if isinstance(call.e, Tensor) else (call.e, None)
    return (
        *(call.k, call.v, call.cache_seqlens, call.cache_batch_idx, call.block_table, call.low, call.high, call.page_size),
        *(stats, call.scale, e, e_tensor, call.left, call.right, call.softcap, call.alibi, call.sink, backend),
    )


def _unpacked(rest: tuple[Any, ...]) -> tuple[KVCacheCall, bool, str]:
    """The reverse."""
    k, v, cache_seqlens, rows, table, low, high, page_size, stats, scale, e, e_tensor, left, right, cap, alibi, sink, name = (
        rest
    )
    call = KVCacheCall(
        scale=scale,
        e=e if e_tensor is None else e_tensor,
        cache_seqlens=cache_seqlens,
        k=k,
        v=v,
        cache_batch_idx=rows,
        block_table=table,
        low=low,
        high=high,
        page_size=page_size,
        left=left,
        right=right,
        softcap=cap,
        alibi=alibi,
        sink=sink,
    )
    return call, stats, name


def attention_kvcache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, call: KVCacheCall, stats: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What torch.ops.diffmax.attention_kvcache gives, by a way that torch.jit.trace can record."""
    if not torch.compiler.is_compiling() and portable.is_tracing():
        return portable.kvcache(query, k_cache, v_cache, call, stats)
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.diffmax.attention_kvcache(
        query, k_cache, v_cache, *_packed(call, stats, backend)
    )
    return results


def _attention_kvcache(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Any:
    call, stats, backend = _unpacked(rest)
    choice = (features(query, k_cache, v_cache, call, stats), query.shape[3], v_cache.shape[3])
    run = kernel("attention_kvcache", query, backend, tensor_alpha=isinstance(call.e, Tensor), attention=choice)
    with torch._C._DisableAutocast():  # a kernel's products are of the dtypes that it chose
        return run(query, k_cache, v_cache, call, stats)


def _attention_kvcache_fake(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, length, heads, _ = query.shape
    stats = rest[8]
    m = query.new_empty((batch, heads, length), dtype=accumulation_dtype(query.dtype))
    support = query.new_empty(m.shape if stats else (0,), dtype=torch.int32)
    pages = query.new_empty((batch, k_cache.shape[2]) if stats else (0,), dtype=torch.int32)
    return query.new_empty((batch, length, heads, v_cache.shape[3])), m, torch.empty_like(m), support, pages


def _attention_kvcache_autograd(*arguments: Any) -> Any:
    if portable.exports_onnx():
        query, k_cache, v_cache, *rest = arguments
        call, stats, _ = _unpacked(tuple(rest))
        return portable.kvcache(query, k_cache, v_cache, call, stats)
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    if rows_operator._differentiates(*tensors) or rows_operator._has_tangent(*tensors):
        raise NotImplementedError(NO_GRADIENT)
    _, k_cache, v_cache, k, _, _, _, _, low, high = arguments[:10]
    if k is not None:
        # what a backward saved of a cache, it must not use after this
        for changed in (k_cache, v_cache, low, high):
            if changed is not None and not changed.is_inference():
                torch.autograd.graph.increment_version(changed)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmax.attention_kvcache(*arguments)


def _attention_kvcache_vmap(*_: Any) -> Any:
    raise NotImplementedError(
        "diffmax.attention_with_kvcache: torch.vmap cannot batch it, since it changes the caches in place\n"
        "its own batch is the first dimension of q: put the sequences there"
    )


_LIBRARY.impl("attention_kvcache", _attention_kvcache, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_kvcache", _attention_kvcache_autograd, "Autograd")
torch.library.register_fake("diffmax::attention_kvcache", _attention_kvcache_fake, lib=_LIBRARY)
if hasattr(torch.library, "register_vmap"):  # torch 2.5
    torch.library.register_vmap("diffmax::attention_kvcache", _attention_kvcache_vmap, lib=_LIBRARY)
