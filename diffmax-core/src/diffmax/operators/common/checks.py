"""Argument checks shared by the public functions. Each message has the rule, the value, and the remedy."""

from __future__ import annotations

import math
import numbers
from typing import Any, cast

import torch
from torch import Tensor

from diffmax.operators.common.autograd import differentiates, gives_no_values, is_recorded, is_transformed
from diffmax.operators.common.fast_path import is_plain
from diffmax.operators.common.numerics import FLOAT_DTYPES, accumulation_dtype

_NO_FLOAT = 2**1024  # the least integer that is too large
_FEW = 128  # numbers that Python looks at sooner than torch


def to_float(value: Any) -> float:
    """float(value), infinite for an integer that no float holds. Symbolic numbers stay."""
    if isinstance(value, (torch.SymFloat, float)):
        return value  # type: ignore[return-value]
    if isinstance(value, int) and not torch.compiler.is_compiling() and abs(value) >= _NO_FLOAT:  # there it may be a symbol
        return math.inf if value > 0 else -math.inf
    return float(value)


def check_tensor(name: str, what: str, t: Tensor) -> None:
    """Check that `t` is a strided tensor of a supported dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: {what} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in FLOAT_DTYPES:
        way = "dequantize()" if t.is_quantized else "real or .abs()" if t.is_complex() else "float()"
        raise TypeError(
            f"{name}: {what} must be float16, bfloat16, float32 or float64, got {_dtype(t)}\n"
            f"convert it first, for instance with {what}.{way}"
        )
    check_strided(name, what, t)


def check_strided(name: str, what: str, t: Tensor) -> None:
    """Refuse sparse, opaque and nested tensors, which have no strides."""
    if t.layout is torch.strided and not t.is_nested:
        return
    if t.is_nested:
        way = f"pass {what}.values() of a jagged one, its sequences packed, or pad it with {what}.to_padded_tensor(0.0)"
        raise TypeError(f"{name}: {what} must not be nested, got a nested tensor of layout {t.layout}\n{way}")
    raise TypeError(f"{name}: {what} must be a strided tensor, got layout {t.layout}\nconvert it first, with {what}.to_dense()")


def check_flag(name: str, what: str, flag: Any) -> bool:
    """True or False, and nothing that happens to be true."""
    if isinstance(flag, (bool, torch.SymBool)):
        return bool(flag)
    if isinstance(flag, Tensor) and flag.dtype is torch.bool and flag.ndim == 0 and torch._C._get_tracing_state() is not None:
        return bool(flag)  # there sizes are tensors, and so is what comes of a comparison
    raise TypeError(f"{name}: {what} must be True or False, got {flag!r} of type {type(flag).__name__}")


def check_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Check the dtype argument, to which the scores are converted."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: dtype must be a torch.dtype, got {dtype!r} of type {type(dtype).__name__}")
    if dtype not in FLOAT_DTYPES:
        wanted = "float16, bfloat16, float32 or float64"
        raise TypeError(
            f"{name}: dtype, to which X is converted first, must be {wanted}, got {str(dtype).removeprefix('torch.')}"
        )
    return dtype


def check_scores(name: str, X: Tensor, dim: int, n_iter: int) -> int:
    """Check everything but alpha; return `dim` as a non-negative number."""
    check_tensor(name, "X", X)
    _check_whole(name, dim, n_iter)
    ndim = X.ndim or 1
    if not -ndim <= dim < ndim:
        raise ValueError(f"{name}: dim must lie in [{-ndim}, {ndim - 1}] for X of shape {_shape(X)}, got {dim}")
    return as_int(dim) % ndim


def check_settings(name: str, alpha: Any, dim: int, n_iter: int) -> None:
    """Check what a module is made with, as far as it can be without scores."""
    _check_whole(name, dim, n_iter)
    if not isinstance(alpha, Tensor) and not callable(alpha):
        one_minus_alpha(name, torch.empty(1, device="cpu"), alpha, 0, OR_FUNCTION)


def _check_whole(name: str, dim: int, n_iter: int) -> None:
    if not is_whole(dim):
        raise TypeError(f"{name}: dim must be an int, got {dim!r} of type {type(dim).__name__}")
    if not is_whole(n_iter):
        raise TypeError(f"{name}: n_iter must be an int, got {n_iter!r} of type {type(n_iter).__name__}")
    if n_iter < 1:
        raise ValueError(f"{name}: n_iter must be at least 1, got {n_iter}")


def is_whole(n: Any) -> bool:
    """Whether n is an integer: of Python, of NumPy, or a tensor with one entry."""
    if type(n) is int:  # isinstance with an abstract class takes a microsecond
        return True
    if isinstance(n, Tensor):
        return n.ndim == 0 and not n.is_floating_point() and not n.is_complex() and n.dtype != torch.bool
    return isinstance(n, (numbers.Integral, torch.SymInt)) and not isinstance(n, bool)


def as_int(n: Any) -> int:
    """n as a Python int, or as a symbolic one while tracing."""
    if isinstance(n, torch.SymInt):
        return cast(int, n)
    return int(n)


# Added to the message of functions that accept a function as alpha.
OR_FUNCTION = ", or a function of no arguments that returns one"


def one_minus_alpha(name: str, X: Tensor, alpha: float | Tensor, dim: int, or_else: str = "") -> tuple[float, Tensor | None]:
    """Check alpha and turn it into e = 1 - alpha, without losing digits: as a float, or as a tensor with a gradient."""
    if type(alpha) is float and 0 < alpha < 1:
        return 1.0 - alpha, None
    if isinstance(alpha, Tensor):
        check_alpha_tensor(name, X, alpha, dim)
        # one of a batch of one stays a tensor, or its rows would have other bits than in a larger batch
        if alpha.ndim == 0 and (e := plain_complement(alpha, X)) is not None:
            return e, None
        _check_alpha_values(name, alpha)
        e_tensor = complement(alpha, accumulation_dtype(X.dtype))
        return 0.0, e_tensor if e_tensor.device == X.device else e_tensor.to(X.device)
    if not isinstance(alpha, numbers.Real) or isinstance(alpha, bool):
        raise not_an_alpha(name, alpha, or_else)
    if not 0 < alpha < 1:
        raise ValueError(f"{name}: alpha must lie strictly between 0 and 1, got {alpha}{_alpha_hint(name, alpha)}")
    return 1.0 - float(alpha), None


def complement(alpha: Tensor, acc: torch.dtype) -> Tensor:
    """1 - alpha in the accumulation dtype, subtracted in the wider of both."""
    if alpha.dtype == acc:
        return 1 - alpha
    return (1 - alpha.to(torch.promote_types(alpha.dtype, acc))).to(acc)


def plain_complement(alpha: Tensor, X: Tensor) -> float | None:
    """`complement` of one alpha that could as well be a float: in (0, 1), on the CPU, and nothing learns, traces or maps it."""
    if not _readable(alpha) or alpha.numel() != 1 or differentiates(alpha) or is_transformed() or not is_plain(alpha, X):
        return None
    acc = accumulation_dtype(X.dtype)
    e = 1.0 - alpha.item() if alpha.itemsize <= acc.itemsize else complement(alpha, acc).item()
    return e if 0 < e < 1 else None


def not_an_alpha(name: str, alpha: Any, or_else: str = "") -> TypeError:
    """The error for what is neither a number nor a tensor."""
    hint = "\npass torch.tensor(alpha)" if isinstance(alpha, (list, tuple)) else ""
    if callable(alpha) and not or_else:
        hint = "\npass what it returns: alpha=alpha()"
    return TypeError(f"{name}: alpha must be a float or a tensor{or_else}, got {alpha!r} of type {type(alpha).__name__}{hint}")


# Functions whose second argument is alpha, where torch.softmax has its dimension.
_SECOND_IS_ALPHA = ("diffmax_bisect", "diffmax_bisect_monitored")


def _alpha_hint(name: str, alpha: float) -> str:
    """The remedy for a number outside (0, 1); see decision 0074."""
    hint = ""
    if isinstance(alpha, int) and name in _SECOND_IS_ALPHA:
        hint = "\nfor a dimension, write dim: the second argument is alpha"
    if 1 < alpha < 2:
        hint += f"\nif that is entmax's alpha, pass 2 - {alpha:g} = {2 - alpha:g} here"
    elif alpha == 2:
        hint += "\nif that is entmax's alpha, the limit is 0 here, sparsemax: pass torch.tensor(0.0)"
    elif alpha in (0, 1):
        limit = "torch.softmax" if alpha else "sparsemax"
        hint += f"\nthe limit alpha -> {alpha:g} is {limit}: if that is meant, pass torch.tensor({float(alpha)})"
    return hint


def check_alpha(name: str, alpha: Tensor) -> None:
    """Check dtype and values of a tensor alpha that belongs to no scores."""
    _check_floating(name, "alpha", alpha)
    _check_alpha_values(name, alpha)


def _check_floating(name: str, what: str, t: Tensor) -> None:
    check_strided(name, what, t)
    if not t.is_floating_point():
        raise TypeError(f"{name}: {what} must be of a floating dtype, got {_dtype(t)}")


def check_alpha_tensor(name: str, X: Tensor, alpha: Tensor, dim: int, what: str = "alpha") -> None:
    """Check dtype, device and shape of a tensor with one number per row: alpha, or the argument named `what`."""
    _check_floating(name, what, alpha)
    if alpha.device != X.device and not (alpha.ndim == 0 and alpha.device.type == "cpu"):
        raise ValueError(f"{name}: {what} and X must be on one device, got {alpha.device} and {X.device}")
    wanted = tuple(1 if axis == dim else size for axis, size in enumerate(X.shape))
    if not broadcasts(alpha, wanted):
        raise ValueError(
            f"{name}: {what} must broadcast against X with dim reduced to 1, got shape {_shape(alpha)}\n"
            f"  X {_shape(X)}   dim {dim}   {what} must broadcast to {wanted}{_shape_hint(X, alpha, wanted, what)}"
        )


def broadcasts(t: Tensor, wanted: tuple[int, ...]) -> bool:
    """Whether t broadcasts to `wanted`. Sizes are compared with `==`: torch.compile does not trace `size in (1, n)`."""
    if t.ndim > len(wanted):
        return False
    return all(size == 1 or size == among for size, among in zip(t.shape, wanted[len(wanted) - t.ndim :], strict=True))


def has_shape(t: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether t has one of the shapes; compared like those of `broadcasts`."""
    return any(t.ndim == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True)) for shape in shapes)


def _check_alpha_values(name: str, alpha: Tensor) -> None:
    if not _readable(alpha) or alpha.numel() == 0:
        return
    if alpha.numel() <= _FEW and is_plain(alpha) and all(0 <= a <= 1 for a in alpha.flatten().tolist()):
        return
    low, high = (end.item() for end in alpha.detach().aminmax())
    if not (low >= 0 and high <= 1):  # NaN is neither
        got = "nan" if low != low else f"{low:g}" if low == high else f"values from {low:g} to {high:g}"
        hint = "a learned alpha stays inside with alpha_map, see diffmax.HillMap"
        if low >= 1 and high <= 2:
            hint = "if that is entmax's alpha, pass 2 - alpha here; " + hint
        raise ValueError(f"{name}: alpha must lie between 0 and 1, got {got}\n{hint}")


def _shape_hint(X: Tensor, alpha: Tensor, wanted: tuple[int, ...], what: str) -> str:
    """For an alpha of shape (H,): the view that moves it to the axis of length H, preferably that of heads (axis 1 of 4)."""
    axes = [axis for axis, size in enumerate(wanted) if alpha.ndim == 1 and size == alpha.shape[0] and size != 1]
    if not axes:
        return ""
    axis = 1 if X.ndim == 4 and 1 in axes else axes[0]
    shape = (alpha.shape[0],) + (1,) * (X.ndim - axis - 1)
    return f"\nfor one alpha per index of axis {axis}, pass {what}.view{shape}"


def _readable(t: Tensor) -> bool:
    """Whether the values of `t` can be read without waiting: it is on the CPU, and is not traced or transformed."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(t) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and not is_recorded()
        and not gives_no_values()
    )


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(int(size) if isinstance(size, Tensor) else size for size in t.shape)  # under torch.jit.trace sizes are tensors


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
