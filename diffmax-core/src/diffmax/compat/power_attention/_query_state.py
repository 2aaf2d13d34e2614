"""Stands in for power-attention's module `_query_state`."""

from __future__ import annotations

from typing import Any

import torch

from diffmax.compat.power_attention._functions import compute_expanded_dim, default_D, query_state, query_state_vidrial
from diffmax.compat.power_attention._samples import Device, Property, learned, normal, on

query_state_cuda = query_state_reference = query_state_reference_fwd = query_state_triton = query_state
query_state_vidrial_reference = query_state_vidrial

__all__ = [
    "create_inputs",
    "input_properties",
    "output_properties",
    "query_state",
    "query_state_cuda",
    "query_state_reference",
    "query_state_reference_fwd",
    "query_state_triton",
    "query_state_vidrial",
    "query_state_vidrial_reference",
]


def create_inputs(
    b: int = 2,
    n: int = 3,
    c: int = 128,
    h: int = 1,
    d: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    deg: int = 2,
    zero_initial_state: bool = False,
    seed: int = 42,
    d_tile: int | None = None,
    use_vidrial_layout: bool = False,
    requires_grad: bool = False,
    scale: float = 1.0,
    qhead_ratio: int = 1,
    inference: bool = False,
) -> dict[str, Any]:
    """Arguments of `query_state` by their names, from N(0, 1); sums of keys and of weights are near c, so that none is 0."""
    draw, (tq, hq) = normal(seed, device), (1 if inference else c, h * qhead_ratio)
    D = default_D(d, deg, d_tile) if use_vidrial_layout else compute_expanded_dim(d, deg)
    tensors = {
        "Q": draw(b, n, tq, hq, d, dtype=dtype),
        "S": draw(b, n, h, D, d, dtype=dtype),
        "s": draw(b, n, h, D).abs() + c,
        "Y_attn": draw(b, n, tq, hq, d, dtype=dtype),
        "l_attn": draw(b, n, tq, hq).abs() + c,
    }
    rest = {"rowmax": draw(b, n, tq, hq).abs() + 1.0, "deg": deg, "scale": scale, "zero_initial_state": zero_initial_state}
    return learned(tensors, requires_grad) | rest


def input_properties(
    b: int = 2,
    n: int = 3,
    c: int = 128,
    h: int = 1,
    d: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    deg: int = 2,
    zero_initial_state: bool = False,
    seed: int = 42,
    d_tile: int | None = None,
    use_vidrial_layout: bool = False,
    requires_grad: bool = False,
    scale: float = 1.0,
    qhead_ratio: int = 1,
    inference: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of them."""
    where, (tq, hq) = on(device), (1 if inference else c, h * qhead_ratio)
    D = default_D(d, deg, d_tile) if use_vidrial_layout else compute_expanded_dim(d, deg)
    return {
        "Q": ((b, n, tq, hq, d), dtype, where),
        "S": ((b, n, h, D, d), dtype, where),
        "s": ((b, n, h, D), torch.float32, where),
        "Y_attn": ((b, n, tq, hq, d), dtype, where),
        "l_attn": ((b, n, tq, hq), torch.float32, where),
        "rowmax": ((b, n, tq, hq), torch.float32, where),
    }


def output_properties(
    b: int = 2,
    n: int = 3,
    c: int = 128,
    h: int = 1,
    d: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = None,
    deg: int = 2,
    zero_initial_state: bool = False,
    seed: int = 42,
    d_tile: int | None = None,
    use_vidrial_layout: bool = False,
    requires_grad: bool = False,
    scale: float = 1.0,
    qhead_ratio: int = 1,
    inference: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of what `query_state` returns for them."""
    return {"O": ((b, n, 1 if inference else c, h * qhead_ratio, d), dtype, on(device))}
