"""How rows may be sharded: they are independent, so along any dimension but the normalised one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffmax.operators.common.sharding import Sharding


def _bisect(x: Any, e: float, e_tensor: Any, dim: int, *_: Any) -> list[Sharding]:
    shardings = []
    for shard, of_e in row_placements(x, e_tensor, dim):
        shardings.append(([shard, shard, shard], [shard, None, of_e]))
    return shardings


def _bisect_backward(
    grad: Any, p: Any, m: Any, delta: Any, x: Any, e: float, e_tensor: Any, dim: int, needs_e: bool, *_: Any
) -> list[Sharding]:
    shardings = []
    for shard, of_e in row_placements(p, e_tensor, dim):
        grad_e = shard if needs_e else replicate()
        shardings.append(([shard, grad_e], [shard, shard, shard, shard, None if x is None else shard, None, of_e]))
    return shardings


RULES: dict[str, Callable[..., list[Sharding]]] = {"bisect": _bisect, "bisect_backward": _bisect_backward}


def row_placements(x: Any, e_tensor: Any, dim: int) -> list[tuple[Any, Any]]:
    """For each way to place x: its placement, which m, delta and what else has x's rows share, and that of e_tensor.

    DTensor picks the cheapest one: what is sharded along `dim`, or a partial sum, is brought to it first.
    """
    from torch.distributed.tensor import Replicate, Shard

    def of_e(axis: int) -> Any:
        if e_tensor is None:
            return None
        own_axis = axis - (x.ndim - e_tensor.ndim)  # e_tensor broadcasts: it may lack leading axes, or have size 1
        return Shard(own_axis) if own_axis >= 0 and e_tensor.shape[own_axis] != 1 else Replicate()

    everywhere = (Replicate(), None if e_tensor is None else Replicate())
    return [everywhere, *((Shard(axis), of_e(axis)) for axis in range(x.ndim) if axis != dim)]


def replicate() -> Any:
    """The placement of what every rank has whole; its import takes too long for the head of a module."""
    from torch.distributed.tensor import Replicate

    return Replicate()
