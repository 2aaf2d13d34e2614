"""Argument checks that the public functions share. Each message says the rule, what was got, and what to do."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from diffmax._numerics import FLOAT_DTYPES, accumulation_dtype


def check_scores(name: str, X: Tensor, dim: int, n_iter: int) -> int:
    """Check everything but alpha; return `dim` as a non-negative number."""
    if not isinstance(X, Tensor):
        raise TypeError(f"{name}: X must be a torch.Tensor, got {type(X).__name__}")
    if X.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: X must be float16, bfloat16, float32 or float64, got {_dtype(X)}\n"
            "convert it first, for instance with X.float()"
        )
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{name}: dim must be an int, got {dim!r} of type {type(dim).__name__}")
    ndim = X.ndim or 1
    if not -ndim <= dim < ndim:
        raise ValueError(f"{name}: dim must lie in [{-ndim}, {ndim - 1}] for X of shape {_shape(X)}, got {dim}")
    if not isinstance(n_iter, int) or isinstance(n_iter, bool):
        raise TypeError(f"{name}: n_iter must be an int, got {n_iter!r} of type {type(n_iter).__name__}")
    if n_iter < 1:
        raise ValueError(f"{name}: n_iter must be at least 1, got {n_iter}")
    return dim % ndim


# What else alpha may be where it is called before it is checked.
OR_FUNCTION = ", or a function of no arguments that returns one"


def one_minus_alpha(name: str, X: Tensor, alpha: float | Tensor, dim: int, or_else: str = "") -> tuple[float, Tensor | None]:
    """Check alpha and turn it into e = 1 - alpha, without losing digits: as a float, or as a tensor with a gradient."""
    if type(alpha) is float and 0 < alpha < 1:
        return 1.0 - alpha, None
    if isinstance(alpha, Tensor):
        check_alpha_tensor(name, X, alpha, dim)
        _check_alpha_values(name, alpha)
        acc = accumulation_dtype(X.dtype)
        e_tensor = (1 - alpha.to(torch.promote_types(alpha.dtype, acc))).to(acc)
        return 0.0, e_tensor if e_tensor.device == X.device else e_tensor.to(X.device)
    if not isinstance(alpha, numbers.Real) or isinstance(alpha, bool):
        raise TypeError(f"{name}: alpha must be a float or a tensor{or_else}, got {alpha!r} of type {type(alpha).__name__}")
    if not 0 < alpha < 1:
        raise ValueError(
            f"{name}: alpha must lie strictly between 0 and 1, got {alpha}{_alpha_hint(float(alpha), isinstance(alpha, int))}"
        )
    return 1.0 - float(alpha), None


def _alpha_hint(alpha: float, was_int: bool) -> str:
    if was_int:
        return "\nfor a dimension, write dim: the second argument is alpha, 1 would be torch.softmax and 0 sparsemax"
    if alpha == 1:
        return "\nthe limit alpha -> 1 is torch.softmax"
    if alpha == 0:
        return "\nthe limit alpha -> 0 is sparsemax: take a small alpha, such as 1e-6"
    if 1 < alpha < 2:
        return f"\nif that is entmax's alpha, its equal here is 2 - {alpha:g} = {2 - alpha:g}"
    return ""


def check_alpha_tensor(name: str, X: Tensor, alpha: Tensor, dim: int, what: str = "alpha") -> None:
    """Check dtype, device and shape of a tensor with one number per row: alpha, what alpha is computed from, or `what`."""
    if not alpha.is_floating_point():
        raise TypeError(f"{name}: {what} must be of a floating dtype, got {_dtype(alpha)}")
    if alpha.device != X.device and not (alpha.ndim == 0 and alpha.device.type == "cpu"):
        raise ValueError(f"{name}: {what} and X must be on one device, got {alpha.device} and {X.device}")
    wanted = tuple(1 if axis == dim else size for axis, size in enumerate(X.shape))
    if not broadcasts(alpha, wanted):
        raise ValueError(
            f"{name}: {what} must broadcast against X with dim reduced to 1, got shape {_shape(alpha)}\n"
            f"  X {_shape(X)}   dim {dim}   {what} must broadcast to {wanted}{_shape_hint(X, alpha, wanted, what)}"
        )


def broadcasts(t: Tensor, wanted: tuple[int, ...]) -> bool:
    """Whether t broadcasts to `wanted`. Sizes are compared one by one: torch.compile knows of no size what tuples it is in."""
    if t.ndim > len(wanted):
        return False
    return all(size == 1 or size == among for size, among in zip(t.shape, wanted[len(wanted) - t.ndim :], strict=True))


def has_shape(t: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether t has one of the shapes; compared like those of `broadcasts`."""
    return any(t.ndim == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True)) for shape in shapes)


def _check_alpha_values(name: str, alpha: Tensor) -> None:
    if _readable(alpha) and not bool(((alpha >= 0) & (alpha <= 1)).all()):
        low, high = alpha.detach().aminmax()
        raise ValueError(
            f"{name}: alpha must lie between 0 and 1, got values from {low.item():g} to {high.item():g}\n"
            "a learned alpha stays inside with alpha_map, see diffmax.HillMap"
        )


def _shape_hint(X: Tensor, alpha: Tensor, wanted: tuple[int, ...], what: str) -> str:
    """For an alpha of shape (H,): the shape that puts it on the one axis of its length, heads (axis 1 of 4) before others."""
    axes = [axis for axis, size in enumerate(wanted) if alpha.ndim == 1 and size == alpha.shape[0] and size != 1]
    if not axes:
        return ""
    axis = 1 if X.ndim == 4 and 1 in axes else axes[0]
    shape = (alpha.shape[0],) + (1,) * (X.ndim - axis - 1)
    return f"\nfor one alpha per index of axis {axis}, pass {what}.view{shape}"


def _readable(t: Tensor) -> bool:
    """Whether looking at `t`'s values is possible and free: it is on the CPU, and nothing is tracing or transforming it."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(t) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(int(size) if isinstance(size, Tensor) else size for size in t.shape)  # torch.jit.trace has tensors there


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
