"""Argument checks of the losses. Each message has the rule, the value, and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmax.operators.common.checks import _dtype, _readable, _shape, check_strided, is_whole

REDUCTIONS = ("mean", "sum", "none")

# Tolerance for the sum of a target's probabilities: wide enough for rounding to bfloat16.
_SUM_SLACK = 1e-2


def check_reduction(name: str, reduction: str, allowed: tuple[str, ...] = REDUCTIONS) -> None:
    """Check that `reduction` is one of `allowed`."""
    if reduction not in allowed:
        raise ValueError(f"{name}: reduction must be one of {', '.join(map(repr, allowed))}, got {reduction!r}")


def check_target(name: str, X: Tensor, target: Tensor, dim: int, ignore_index: int) -> None:
    """Check class indices or probabilities for scores X: dtype, device, shape and, where they can be read, values."""
    _check_kind(name, X, target, ignore_index)
    if X.shape[dim] == 0:
        raise ValueError(f"{name}: X must have at least one class, got shape {_shape(X)} with the classes along dim {dim}")
    if target.is_floating_point():
        _check_shape_of_probabilities(name, X, target, ignore_index)
        _check_probabilities(name, target, dim)
    else:
        _check_shape_of_indices(name, X, target, dim)
        _check_indices(name, X, target, dim, ignore_index)


def check_target_of_part(name: str, X: Tensor, target: Tensor, dim: int, ignore_index: int) -> None:
    """As `check_target`, where X is a part of the classes, and may have none: all but the values."""
    _check_kind(name, X, target, ignore_index)
    if target.is_floating_point():
        _check_shape_of_probabilities(name, X, target, ignore_index)
    else:
        _check_shape_of_indices(name, X, target, dim)


def _check_kind(name: str, X: Tensor, target: Tensor, ignore_index: int) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: target must be a torch.Tensor, got {type(target).__name__}")
    check_strided(name, "target", target)
    if target.device != X.device:
        raise ValueError(f"{name}: target and X must be on one device, got {target.device} and {X.device}")
    check_ignore_index(name, ignore_index)


def check_ignore_index(name: str, ignore_index: int) -> None:
    """Check that `ignore_index` is an int."""
    if not is_whole(ignore_index):
        raise TypeError(f"{name}: ignore_index must be an int, got {ignore_index!r} of type {type(ignore_index).__name__}")


def check_weight(name: str, X: Tensor, weight: Tensor | None, dim: int) -> None:
    """Check the class weights: one number per class, or None."""
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = _dtype(weight) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: weight must be a tensor of a floating dtype, got {got}")
    check_strided(name, "weight", weight)
    if weight.shape != X.shape[dim : dim + 1]:
        raise ValueError(
            f"{name}: weight must hold one number per class, shape ({X.shape[dim]},), got shape {_shape(weight)}\n"
            f"  X {_shape(X)}   classes along dim {dim}"
        )
    if weight.device != X.device:
        raise ValueError(f"{name}: weight and X must be on one device, got {weight.device} and {X.device}")
    if weight.requires_grad:
        raise ValueError(f"{name}: weight must not require a gradient, there is none for it\npass weight.detach()")


def _check_shape_of_indices(name: str, X: Tensor, target: Tensor, dim: int) -> None:
    rows = (*X.shape[:dim], *X.shape[dim + 1 :])
    if target.dtype != torch.int64:
        raise TypeError(
            f"{name}: target must hold class indices as int64, or probabilities in a floating dtype, got {_dtype(target)}\n"
            "convert indices with target.long()"
        )
    if target.shape != rows:
        raise ValueError(
            f"{name}: a target of class indices must have shape {rows}, got {_shape(target)}\n"
            f"  X {_shape(X)}   classes along dim {dim}"
        )


def _check_indices(name: str, X: Tensor, target: Tensor, dim: int, ignore_index: int) -> None:
    if _readable(target) and not bool((fine := ((target >= 0) & (target < X.shape[dim])) | (target == ignore_index)).all()):
        raise ValueError(
            f"{name}: class indices must lie in [0, {X.shape[dim] - 1}] or equal ignore_index = {ignore_index}, got "
            f"{target[~fine][0].item()}"
        )


def _check_shape_of_probabilities(name: str, X: Tensor, target: Tensor, ignore_index: int) -> None:
    if target.shape != X.shape:
        raise ValueError(
            f"{name}: a target of probabilities must have X's shape {_shape(X)}, got {_shape(target)}\n"
            "a target of class indices must be of dtype int64"
        )
    if target.requires_grad:
        raise ValueError(f"{name}: target must not require a gradient, there is none for it\npass target.detach()")
    if ignore_index >= 0:
        raise ValueError(f"{name}: ignore_index is for class indices, got {ignore_index} with a target of probabilities")


def _check_probabilities(name: str, target: Tensor, dim: int) -> None:
    if _readable(target) and target.numel():
        low, sums = target.min(), target.sum(dim, dtype=torch.float64)
        if not bool((low >= 0) & ((sums - 1).abs() <= _SUM_SLACK).all()):
            raise ValueError(
                f"{name}: probabilities must not be negative and must sum to 1 along dim {dim}, got a smallest of "
                f"{low.item():g} and sums from {sums.min().item():g} to {sums.max().item():g}"
            )
