"""DTensor: how each diffmax operator may be sharded. Rows are independent, so any dimension but the normalised one may be.

DTensor takes half a second to import, which `import diffmax` must not cost, and no operator is called before it is too late
to ask for a rule. But DTensor first asks an operator's fake kernel for the shapes and only then looks for its rule, in eager
mode, inference mode and under torch.compile: so the fake kernels in `operators.rows.operator` call `register_rules`.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import torch

# Placements of the outputs, and of the arguments (None: not a tensor): one way to run an operator without communication.
Sharding: TypeAlias = "tuple[list[Any], list[Any]]"

_registered = False


def register_rules() -> None:
    """Give DTensor the rules below, once, if it has been imported; torch before 2.5 takes no rules."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    _registered = True
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return
    for name, rule in _RULES.items():
        register_sharding(getattr(torch.ops.diffmax, name).default)(rule)


def _bisect(x: Any, e: float, e_tensor: Any, dim: int, *_: Any) -> list[Sharding]:
    shardings = []
    for shard, of_e in _row_placements(x, e_tensor, dim):
        shardings.append(([shard, shard, shard], [shard, None, of_e]))
    return shardings


def _bisect_backward(
    grad: Any, p: Any, m: Any, delta: Any, x: Any, e: float, e_tensor: Any, dim: int, needs_e: bool, *_: Any
) -> list[Sharding]:
    shardings = []
    for shard, of_e in _row_placements(p, e_tensor, dim):
        grad_e = shard if needs_e else _replicate()
        shardings.append(([shard, grad_e], [shard, shard, shard, shard, None if x is None else shard, None, of_e]))
    return shardings


# An operator that is added to diffmax gets a line here.
_RULES = {"bisect": _bisect, "bisect_backward": _bisect_backward}


def _row_placements(x: Any, e_tensor: Any, dim: int) -> list[tuple[Any, Any]]:
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


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()
