"""The argument checks of `diffmax.power_attention`, which run before any backend is chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmax.operators.attention.checks import check_heads, check_scale, check_tensors
from diffmax.operators.common.checks import _dtype, _shape, as_int, check_flag, check_strided, has_shape, is_whole
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power.symmetric import expanded_dim
from diffmax.plugin import PowerCall

_LONGEST = 2**31 - 1
_FLOOR = {torch.float32: -106.0, torch.float64: -748.0}  # exp of this is exactly 0, and of this plus rounding


def build_call(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gates: Tensor | None,
    initial_state: Any,
    degree: int,
    scale: float | None,
    chunk_size: int | None,
    final: bool,
) -> PowerCall:
    """The call that the arguments mean."""
    check_tensors(name, query, key, value, "BHLD")
    check_heads(name, query.shape[1], key.shape[1], True)
    length, many = query.shape[2], key.shape[2]
    if length > many > 0:
        raise ValueError(
            f"{name}: there must be at least as many keys as queries, or none, got {many} keys and {length} queries\n"
            "the last query has the position of the last key"
        )
    degree = check_degree(name, degree)
    scale = check_scale(name, query, scale)
    if not torch.compiler.is_compiling() and scale == 0:
        raise ValueError(f"{name}: scale must not be 0, got {scale}\nit cancels: leave it out")
    sums, norm = check_state(name, query, key, value, initial_state, degree)
    return PowerCall(
        degree=degree,
        scale=check_scale(name, query, None),  # that of the caller cancels, and could leave the range of powers
        chunk=check_chunk(name, chunk_size),
        final=check_flag(name, "return_final_state", final),
        log_gates=check_gates(name, query, key, log_gates),
        sums=sums,
        norm=norm,
    )


def check_degree(name: str, degree: Any) -> int:
    """An even number from 2: an odd power may be negative, and then weights have no sum to divide by."""
    if not is_whole(degree):
        raise TypeError(f"{name}: degree must be an int, got {degree!r} of type {type(degree).__name__}")
    if degree < 2 or degree % 2:
        raise ValueError(f"{name}: degree must be even and at least 2, so that weights are not negative, got {degree}")
    if degree >= 2**31:
        raise ValueError(f"{name}: degree must be below 2**31, got {degree}")
    return as_int(degree)


def check_chunk(name: str, chunk_size: Any) -> int:
    """Tokens of a chunk, 0 for the kernel's choice."""
    if chunk_size is None:
        return 0
    if not is_whole(chunk_size):
        raise TypeError(f"{name}: chunk_size must be an int or None, got {chunk_size!r} of type {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be at least 1, or None for the kernel's choice, got {chunk_size}")
    return min(as_int(chunk_size), _LONGEST)


def check_gates(name: str, query: Tensor, key: Tensor, log_gates: Any) -> Tensor | None:
    """The log gates (B, H_kv, S) in the accumulation dtype, where a gate of 0 is finite."""
    if log_gates is None:
        return None
    wanted = tuple(key.shape[:3])
    _check_floating(name, "log_gates", log_gates, query)
    if not has_shape(log_gates, wanted):
        hint = ""
        if has_shape(log_gates, (wanted[0], wanted[2], wanted[1])):
            hint = "\nheads come before tokens: pass log_gates.transpose(1, 2)"
        raise ValueError(
            f"{name}: log_gates must have a number for each key, shape (B, H_kv, S) = {wanted}, got {_shape(log_gates)}{hint}"
        )
    return finite_gates(log_gates.to(accumulation_dtype(query.dtype)))


def finite_gates(log_gates: Tensor) -> Tensor:
    """Log gates (..., S) of float32 or float64 in which a gate of 0 is finite, so that their sums have differences.

    After it the state starts anew, however much later gates let it grow. Larger negative numbers would cost digits of the sums.
    """
    growth = log_gates.detach().nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0).sum(-1, keepdim=True)
    gates: Tensor = log_gates.clamp_min(_FLOOR[log_gates.dtype] - growth)
    return gates


def check_state(
    name: str, query: Tensor, key: Tensor, value: Tensor, state: Any, degree: int
) -> tuple[Tensor | None, Tensor | None]:
    """The sums and the norm of a state, in the accumulation dtype."""
    if state is None:
        return None, None
    if not (isinstance(state, tuple) and len(state) == 2):
        raise TypeError(
            f"{name}: initial_state must be a PowerState or a pair (sums, norm), got {type(state).__name__}\n"
            "pass what a call with return_final_state=True returned"
        )
    rows = (*key.shape[:2], expanded_dim(key.shape[3], degree))
    acc = accumulation_dtype(query.dtype)
    for what, t, wanted in (("sums", state[0], (*rows, value.shape[3])), ("norm", state[1], rows)):
        _check_floating(name, f"initial_state.{what}", t, query)
        if not has_shape(t, wanted):
            raise ValueError(
                f"{name}: initial_state.{what} must have shape {tuple(wanted)} for heads of {key.shape[3]} entries and degree "
                f"{degree}, got {_shape(t)}\nof other layouts: diffmax.power.from_tiled"
            )
    return state[0].to(acc), state[1].to(acc)


def _check_floating(name: str, what: str, t: Any, query: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = _dtype(t) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: {what} must be a floating tensor, got {got}")
    check_strided(name, what, t)
    if t.device != query.device:
        raise ValueError(f"{name}: {what} and query must be on one device, got {t.device} and {query.device}")
