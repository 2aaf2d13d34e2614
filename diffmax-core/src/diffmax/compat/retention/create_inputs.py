"""Stands in for retention's module `create_inputs`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from diffmax.compat.power_attention._functions import compute_expanded_dim, default_D
from diffmax.compat.power_attention._samples import Device, Property, learned, normal, on

__all__ = [
    "create_inference_inputs",
    "create_inputs",
    "inference_input_properties",
    "inference_output_properties",
    "input_properties",
    "output_properties",
]
GATE = 6.906768  # the logit of 0.999


def create_inputs(
    b: int = 2,
    t: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 41,
    scale: float = 1.0,
    switch_over_seq_len: int | None = None,
    initial_state: bool = False,
    return_final_state: bool = False,
    fused_normalizer: bool = False,
) -> dict[str, Any]:
    """Arguments of `power_retention`, by their names: Q, K, V from N(0, 1) / sqrt(d), and log_G the logsigmoid of N(0, 1).

    Args:
        b, t, h, d, qhead_ratio: Batch, length, key heads, their size, query heads for one of keys.
        dtype, device: Of the tensors. None: CUDA if there is any, else the CPU.
        gating, initial_state: Whether there are gates, and a state of random numbers.
        chunk_size, deg, scale, switch_over_seq_len, return_final_state: Passed on.
        requires_grad: Whether tensors require gradients.
        seed: Of the numbers, which are retention's. torch's own generator is not used.
        fused_normalizer: Whether a state is in vidrial's layout.
    Example:
        >>> inputs = create_inputs(b=1, t=10, h=2, dtype=torch.float32, device="cpu", initial_state=True)
        >>> inputs["Q"].shape, inputs["initial_state"].shape
        (torch.Size([1, 10, 2, 32]), torch.Size([1, 2, 768, 32]))
    """
    draw = normal(seed, device)
    Q, K, V = (draw(b, t, heads, d, dtype=dtype) / math.sqrt(d) for heads in (h * qhead_ratio, h, h))
    tensors = {"Q": Q, "K": K, "V": V, "log_G": logsigmoid(draw(b, t, h)) if gating else None}
    D = _rows(d, deg, fused_normalizer)
    tensors["initial_state"] = draw(b, h, D, d, dtype=dtype) if initial_state else None
    tensors["sum_of_keys"] = draw(b, h, D).abs() if initial_state else None
    rest = {"return_final_state": return_final_state, "deg": deg, "scale": scale, "chunk_size": chunk_size}
    return learned(tensors, requires_grad) | rest | {"switch_over_seq_len": switch_over_seq_len}


def create_inference_inputs(
    b: int = 2,
    tq: int = 1,
    tk: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 41,
    scale: float = 1.0,
    initial_state: bool = False,
    switch_over_seq_len: int | None = 512,
    fused_normalizer: bool = False,
) -> dict[str, Any]:
    """Arguments of `power_retention_inference`, likewise; gates are near 0.999. No tail if tk is 0.

    Example:
        >>> inputs = create_inference_inputs(b=1, tk=10, h=2, dtype=torch.float32, device="cpu")
        >>> inputs["Q"].shape, inputs["K"].shape
        (torch.Size([1, 1, 2, 32]), torch.Size([1, 10, 2, 32]))
    """
    if tk <= 0 and not initial_state:
        raise ValueError("create_inference_inputs: tk must be positive, or initial_state True, got neither")
    draw = normal(seed, device)
    tensors = {"Q": draw(b, tq, h * qhead_ratio, d, dtype=dtype) / d**0.5, "K": None, "V": None, "log_G": None}
    if tk > 0:
        tensors |= {what: draw(b, tk, h, d, dtype=dtype) / d**0.5 for what in ("K", "V")}
        tensors["log_G"] = logsigmoid(GATE + draw(b, tk, h)) if gating else None
    D = _rows(d, deg, fused_normalizer)
    tensors["initial_state"] = draw(b, h, D, d, dtype=dtype) if initial_state else None
    tensors["sum_of_keys"] = draw(b, h, D).abs()
    return learned(tensors, requires_grad) | {"deg": deg, "scale": scale, "switch_over_seq_len": switch_over_seq_len}


def input_properties(
    b: int = 2,
    t: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 41,
    scale: float = 1.0,
    switch_over_seq_len: int | None = None,
    initial_state: bool = False,
    return_final_state: bool = False,
    fused_normalizer: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of the tensors that `create_inputs` makes for the same arguments, by name."""
    where = on(device)
    found: dict[str, Property] = {
        "Q": ((b, t, h * qhead_ratio, d), dtype, where),
        "K": ((b, t, h, d), dtype, where),
        "V": ((b, t, h, d), dtype, where),
    }
    if gating:
        found["log_G"] = ((b, t, h), torch.float32, where)
    return found | (_state(b, h, d, deg, dtype, where, fused_normalizer) if initial_state else {})


def output_properties(
    b: int = 2,
    t: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 41,
    scale: float = 1.0,
    switch_over_seq_len: int | None = None,
    initial_state: bool = False,
    return_final_state: bool = False,
    fused_normalizer: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of what `power_retention` returns for them."""
    where = on(device)
    found: dict[str, Property] = {"Y": ((b, t, h * qhead_ratio, d), dtype, where)}
    if return_final_state:
        S, s = _state(b, h, d, deg, dtype, where, fused_normalizer and initial_state).values()
        found |= {"final_state": S, "final_sum_of_keys": s}
    return found


def inference_input_properties(
    b: int = 2,
    tq: int = 1,
    tk: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 41,
    scale: float = 1.0,
    initial_state: bool = False,
    switch_over_seq_len: int | None = 512,
    fused_normalizer: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of the tensors that `create_inference_inputs` makes for the same arguments, by name."""
    where = on(device)
    found: dict[str, Property] = {"Q": ((b, tq, h * qhead_ratio, d), dtype, where)}
    if tk > 0:
        found |= dict.fromkeys(("K", "V"), ((b, tk, h, d), dtype, where))
        found |= {"log_G": ((b, tk, h), torch.float32, where)} if gating else {}
    state = _state(b, h, d, deg, dtype, where, fused_normalizer)
    return found | (state if initial_state else {"sum_of_keys": state["sum_of_keys"]})


def inference_output_properties(
    b: int = 2,
    tq: int = 1,
    tk: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 41,
    scale: float = 1.0,
    initial_state: bool = False,
    switch_over_seq_len: int | None = 512,
    fused_normalizer: bool = False,
) -> dict[str, Property | None]:
    """Shape, dtype and device of what `power_retention_inference` returns for them; None for a state that it has not.

    `create_inference_inputs` gives sums of keys without a state too; they are returned.
    """
    where = on(device)
    folds = switch_over_seq_len is not None and tk >= switch_over_seq_len
    S, s = _state(b, h, d, deg, dtype, where, fused_normalizer and (initial_state or not folds)).values()
    found: dict[str, Property | None] = {"Y": ((b, tq, h * qhead_ratio, d), dtype, where)}
    return found | {"state": S if initial_state or folds else None, "sum_of_keys": s}


def _rows(d: int, deg: int, fused_normalizer: bool) -> int:
    return default_D(d, deg) if fused_normalizer else compute_expanded_dim(d, deg)


def _state(b: int, h: int, d: int, deg: int, dtype: torch.dtype, where: Any, fused_normalizer: bool) -> dict[str, Property]:
    D = _rows(d, deg, fused_normalizer)
    return {"initial_state": ((b, h, D, d), dtype, where), "sum_of_keys": ((b, h, D), torch.float32, where)}
