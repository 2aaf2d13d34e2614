"""Stands in for power-attention's module `create_inputs`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from diffmax.compat.power_attention._samples import Device, Property, learned, normal, on

__all__ = ["create_inputs", "input_properties", "output_properties"]


def create_inputs(
    b: int = 2,
    t: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 42,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Arguments of `power_full`, by their names: Q, K, V from N(0, 1) / sqrt(d), and log_G the logsigmoid of N(0, 1).

    Args:
        b, t, h, d, qhead_ratio: Batch, length, key heads, their size, query heads for one of keys.
        dtype, device: Of the tensors. None: CUDA if there is any, else the CPU.
        gating: Whether there are gates.
        chunk_size, deg, scale: Passed on.
        requires_grad: Whether tensors require gradients.
        seed: Of the numbers, which are power-attention's. torch's own generator is not used.
    Example:
        >>> inputs = create_inputs(b=1, t=10, h=2, dtype=torch.float32, device="cpu", gating=True)
        >>> inputs["Q"].shape, inputs["log_G"].shape
        (torch.Size([1, 10, 2, 32]), torch.Size([1, 10, 2]))
    """
    draw = normal(seed, device)
    Q, K, V = (draw(b, t, heads, d, dtype=dtype) / math.sqrt(d) for heads in (h * qhead_ratio, h, h))
    tensors = {"Q": Q, "K": K, "V": V, "log_G": logsigmoid(draw(b, t, h)) if gating else None}
    rest = {"initial_state": None, "return_final_state": False, "deg": deg, "scale": scale, "chunk_size": chunk_size}
    return learned(tensors, requires_grad) | rest


def input_properties(
    b: int = 2,
    t: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 42,
    scale: float = 1.0,
) -> dict[str, Property]:
    """Shape, dtype and device of the tensors that `create_inputs` makes for the same arguments, by name."""
    where = on(device)
    found: dict[str, Property] = {
        "Q": ((b, t, h * qhead_ratio, d), dtype, where),
        "K": ((b, t, h, d), dtype, where),
        "V": ((b, t, h, d), dtype, where),
    }
    return found | ({"log_G": ((b, t, h), torch.float32, where)} if gating else {})


def output_properties(
    b: int = 2,
    t: int = 1024,
    h: int = 8,
    d: int = 32,
    qhead_ratio: int = 1,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    gating: bool = False,
    chunk_size: int | None = None,
    deg: int = 2,
    requires_grad: bool = False,
    seed: int = 42,
    scale: float = 1.0,
) -> dict[str, Property]:
    """Shape, dtype and device of what `power_full` returns for them."""
    return {"Y": ((b, t, h * qhead_ratio, d), dtype, on(device))}
