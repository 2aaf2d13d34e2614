"""The row operator for rows sharded over the ranks of a process group, without gathering. See docs/distributed.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from diffmax.operators.common.checks import OR_FUNCTION, check_scores, one_minus_alpha
from diffmax.operators.rows import sharded
from diffmax.operators.rows.api import Alpha

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["diffmax_bisect_sharded"]


def diffmax_bisect_sharded(
    X: Tensor,
    alpha: Alpha = 0.9,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """`diffmax_bisect` for rows that are sharded over the ranks of a process group along `dim`, without gathering them.

    The result on each rank is its shard of `diffmax_bisect(torch.cat(all X, dim), alpha, dim)`: for vocabulary-parallel logits,
    or attention scores for sharded keys. All ranks of the group must make the call, and the backward pass.

    Args:
        X: This rank's shard of the scores. Shards may differ in length along `dim`, 0 included, but not in other sizes.
        alpha: As for `diffmax_bisect`, with the same value on every rank. The gradient of a tensor is already summed over all
            shards, the same on every rank: do not all-reduce it again.
        dim: The sharded axis, along which the whole row sums to one.
        n_iter, ensure_sum_one: As for `diffmax_bisect`.
        group: A process group, or a one-dimensional DeviceMesh. None: the default group.
    Returns:
        Tensor of X's shape, dtype and device. A row that is fully masked on all ranks is all 0; a row with NaN or +inf on any
        rank is all NaN on every rank.
    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError: As for `diffmax_bisect`; or X is a DTensor, or group has the wrong type.
        ValueError: As for `diffmax_bisect`; or X is a scalar, this rank is not in the group, or the calls of the ranks differ
            in anything but the length along `dim` and the values of an alpha tensor: then every rank raises.
        NotImplementedError: Forward-mode differentiation or a torch.func transform.
    Communication: For R rows, forward sends 11 integers, which check that the calls agree, then R maxima, then in every
        iteration of Newton's method (Eq. 2) two numbers per row, S and S_1, and one number for the stopping decision. Typical
        scores take 3 to 12 such messages (docs/distributed.md has a table); Eq. 9 bounds their number. Backward sends two
        numbers per row, the sums of Eq. 3, and the gradient of alpha if it is learned. Gathering would send n numbers per row.
    Numerics: Computes in float32, for float64 in float64, with the arithmetic of `diffmax.reference`. Second derivatives are
        exact, and communicate too. Under torch.compile the call is one operator. The host reads the stopping decision, so a
        CUDA graph cannot capture the call.
    Source: docs/theory.md, docs/distributed.md. Written for diffmax.
    Example:
        >>> import torch, torch.distributed as dist
        >>> from diffmax.distributed import diffmax_bisect_sharded
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> diffmax_bisect_sharded(torch.tensor([3.0, 2.0, 1.0, 0.0]), alpha=0.5)
        tensor([0.8307, 0.1693, 0.0000, 0.0000])
        >>> dist.destroy_process_group()
    """
    name = "diffmax_bisect_sharded"
    if not torch.compiler.is_compiling():
        sharded.refuse_transforms()  # also checked here: otherwise vmap would call the operator once per sample
    dim = check_scores(name, X, dim, n_iter)
    if type(X).__name__ == "DTensor":  # compared by name, because the import takes half a second
        raise TypeError(
            f"{name}: X must be this rank's part, got a DTensor\n"
            "pass X.to_local() and group=X.device_mesh, or give the DTensor to diffmax_bisect, which gathers rows"
        )
    if X.ndim == 0:
        raise ValueError(f"{name}: X must have a dimension to be sharded along, got a scalar")
    group_name = _name_of(group)
    e, e_tensor = one_minus_alpha(name, X, alpha() if callable(alpha) else alpha, dim, OR_FUNCTION)
    p: Tensor = torch.ops.diffmax.bisect_sharded(X, e, e_tensor, dim, n_iter, bool(ensure_sum_one), group_name)[0]
    return p


def _name_of(group: dist.ProcessGroup | DeviceMesh | None) -> str:
    """The name of the group for torch's collectives; `sharded` gets only the name, so graphs can contain it."""
    if not dist.is_initialized():
        raise RuntimeError(
            "diffmax_bisect_sharded: torch.distributed must be initialised, got no process group\n"
            "call torch.distributed.init_process_group first; diffmax_bisect needs no group"
        )
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"diffmax_bisect_sharded: group must be a DeviceMesh of one dimension, got {group.ndim}\n"
                "select the one that the rows are sharded over: mesh['its name']"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:  # new_group returns it to ranks outside the group
            raise ValueError("diffmax_bisect_sharded: this rank must be a member of group, got a group without it")
        raise TypeError(
            f"diffmax_bisect_sharded: group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}"
        )
    return str(group.group_name)
