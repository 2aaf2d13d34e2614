"""How the loss may be sharded: its rows are independent, so along any dimension but that of the classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from diffmax.operators.common.sharding import Sharding
from diffmax.operators.loss.terms import CPU_BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS
from diffmax.operators.rows.sharding import replicate, row_placements


def _loss(x: Any, target: Any, e: float, e_tensor: Any, dim: int, *_: Any) -> list[Sharding]:
    kept = 0 < math.prod(x.shape) <= (CPU_BLOCK_ELEMENTS if x.mesh.device_type == "cpu" else DEVICE_BLOCK_ELEMENTS)
    return [
        ([shard, shard if kept else replicate()], [shard, shard, None, of_e])
        for shard, of_e in row_placements(x, e_tensor, dim)
    ]


def _loss_backward(
    grad: Any, x: Any, weights: Any, target: Any, e: float, e_tensor: Any, dim: int, *more: Any
) -> list[Sharding]:
    _, needs_x, needs_e, *_ = more
    shardings = []
    for shard, of_e in row_placements(x, e_tensor, dim):
        results = [shard if needed else replicate() for needed in (needs_x, needs_e)]
        # weights that the whole did not keep are empty, and a part that did keep them is what they stand for
        kept = shard if weights.ndim == x.ndim else replicate()
        shardings.append((results, [shard, shard, kept, shard, None, of_e]))
    return shardings


RULES: dict[str, Callable[..., list[Sharding]]] = {"loss": _loss, "loss_backward": _loss_backward}
