"""The loss of a rank's classes, and of a DTensor that is sharded over classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmax.operators.common.checks import OR_FUNCTION, as_int, check_scores, one_minus_alpha
from diffmax.operators.loss import sharded  # noqa: F401 - defines the operator
from diffmax.operators.loss.checks import check_target_of_part, check_weight
from diffmax.operators.loss.terms import row_shape


def loss_of_parts(
    X: Tensor,
    target: Tensor,
    e: float,
    e_tensor: Tensor | None,
    dim: int,
    weight: Tensor | None,
    ignore_index: int,
    n_iter: int,
    group: str,
) -> tuple[Tensor, Tensor | None]:
    """Every row's loss, times its weight, in the accumulation dtype, and its share in the mean, None: 1.

    Arguments as of `diffmax_loss_sharded`, checked; group is a name.
    """
    rows = X.shape[:dim] + X.shape[dim + 1 :]
    flat = (rows.numel(), X.shape[dim])
    is_soft = target.is_floating_point()
    places = target.movedim(dim, -1).reshape(flat) if is_soft else target.reshape(-1)
    if e_tensor is not None:
        whole = e_tensor.numel() == 1
        e_tensor = e_tensor.reshape(1, 1) if whole else e_tensor.expand(row_shape(X, dim)).reshape(-1, 1)
    scores = X.movedim(dim, -1).reshape(flat)
    losses, share, *_ = torch.ops.diffmax.loss_sharded(scores, places, weight, e, e_tensor, ignore_index, as_int(n_iter), group)
    if weight is not None:
        losses = losses * share
    return losses.view(rows), None if is_soft else share.view(rows)


def loss_of_dtensor(
    X: Any, target: Any, alpha: Any, weight: Any, ignore_index: int, n_iter: int
) -> tuple[Tensor, Tensor | None] | None:
    """As `loss_of_parts`, in DTensors, if X is one whose classes are sharded in one dimension of the mesh; else None."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    name, mesh = "diffmax_loss", X.device_mesh
    dim = 0 if X.ndim == 1 else 1
    over = [n for n, placement in enumerate(X.placements) if type(placement) is Shard and placement.dim % X.ndim == dim]
    if len(over) != 1 or not all(type(placement) in (Shard, Replicate) for placement in X.placements):
        return None
    check_scores(name, X, dim, n_iter)
    axes = [placement.dim % X.ndim if isinstance(placement, Shard) else None for placement in X.placements]

    def part(what: str, t: Any, places: list[Any], summed: bool = False) -> Any:
        """This rank's part of a tensor; of its gradient, which is a sum over those who share the tensor."""
        if not isinstance(t, DTensor):
            if t.numel() == 1 and not t.requires_grad:
                return t
            raise TypeError(
                f"{name}: {what} must be a DTensor as X is, got a torch.Tensor\npass distribute_tensor({what}, mesh)"
            )
        shares = [
            Partial() if summed and isinstance(place, Replicate) and axis not in (None, dim) else place
            for place, axis in zip(places, axes, strict=True)
        ]
        return t.redistribute(mesh, places).to_local(grad_placements=shares)

    def places_of(t: Any) -> list[Any]:
        """Where a tensor that broadcasts against X belongs."""
        places: list[Any] = []
        for axis in axes:
            own = -1 if axis is None else axis - (X.ndim - t.ndim)
            places.append(Replicate() if own < 0 or t.shape[own] == 1 else Shard(own))
        return places

    def rows_of(t: Tensor) -> Any:
        rows = X.shape[:dim] + X.shape[dim + 1 :]
        strides = torch.empty(rows, device="meta").stride()
        return DTensor.from_local(t, mesh, row_places, run_check=False, shape=rows, stride=strides)

    x = X.to_local(grad_placements=X.placements)
    is_soft = target.is_floating_point()
    row_places = [Replicate() if axis in (None, dim) else Shard(axis - (axis > dim)) for axis in axes]
    target = part("target", target, list(X.placements) if is_soft else row_places)
    if weight is not None:
        weight = part("weight", weight, [Shard(0) if axis == dim else Replicate() for axis in axes])
    alpha = alpha() if callable(alpha) else alpha
    if isinstance(alpha, Tensor):
        alpha = part("alpha", alpha, places_of(alpha), summed=True)
    check_target_of_part(name, x, target, dim, ignore_index)
    check_weight(name, x, weight, dim)
    e, e_tensor = one_minus_alpha(name, x, alpha, dim, OR_FUNCTION)
    group = mesh.get_group(over[0]).group_name
    losses, share = loss_of_parts(x, target, e, e_tensor, dim, weight, ignore_index, n_iter, group)
    return rows_of(losses), None if share is None else rows_of(share)
