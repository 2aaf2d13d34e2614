"""How decoding may be sharded: along heads, and along the batch where each sequence has its own row of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffmax.operators.common.placements import INDEPENDENT, Result, rule
from diffmax.operators.decoding import operator

_AXES = {
    "query": "BLHD",
    "k_cache": "BSHD",
    "v_cache": "BSHD",
    "e_tensor": "H",
    "cache_seqlens": "B",
    "k": "BLHD",
    "v": "BLHD",
    "cache_batch_idx": "B",
    "block_table": "BP",
    "low": "BPHD",  # of a cache in pages, without B
    "high": "BPHD",
    "alibi": "BH",
    "sink": "H",
    "leftpad": "B",
    "codes": "BPHDT",  # as low
}


def _allowed(given: Mapping[str, Any]) -> str:
    """What lies in the cache where: rows or pages that any sequence may name are on no rank alone.

    New tokens must be written where the cache is: a copy of it, brought elsewhere for the call, would keep them for itself.
    """
    shared = "cache_batch_idx" in given or "block_table" in given
    if "k" in given:
        query = given["query"]
        for name in ("k_cache", "v_cache", "low", "high", "codes"):
            cache = given.get(name)
            if cache is None:
                continue
            heads = cache.ndim - 1 - _AXES[name][::-1].index("H")
            for wanted, own in zip(query.placements, cache.placements, strict=True):
                if not _together(wanted, own, heads, cache.shape[heads], shared):
                    raise ValueError(
                        f"diffmax.attention_with_kvcache: new tokens need q and {name} sharded alike, along the batch or the "
                        f"heads{', not along rows or pages that sequences share' if shared else ''}, got {query.placements} "
                        f"and {cache.placements}\nredistribute q, or lay out the cache as q"
                    )
    return "H" if shared else INDEPENDENT


def _together(wanted: Any, own: Any, heads: int, count: int, shared: bool) -> bool:
    """Whether the part of the cache on a rank is that of the part of the queries there, along one dimension of the mesh.

    The cache has so many heads along that dimension of its own.
    """
    if own.is_replicate():
        return bool(wanted.is_replicate() or (wanted.is_shard(2) and count == 1))
    if own.is_shard(heads):
        return bool(wanted.is_shard(2))
    return bool(not shared and own.is_shard(0) and wanted.is_shard(0))


RULES = {
    "attention_kvcache": rule(
        operator.SCHEMA,
        _AXES,
        {
            "out": Result("BLHD"),
            "m": Result("BHL"),
            "delta": Result("BHL"),
            "support": Result("BHL", made=lambda given: given["stats"]),
            "pages": Result("BH", made=lambda given: given["stats"]),
        },
        _allowed,
    )
}
