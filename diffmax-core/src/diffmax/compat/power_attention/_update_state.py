"""Stands in for power-attention's module `_update_state`."""

from __future__ import annotations

from typing import Any

import torch

from diffmax.compat.power_attention import _states
from diffmax.compat.power_attention._functions import compute_expanded_dim, default_D, update_state, update_state_vidrial
from diffmax.compat.power_attention._samples import Device, Property, learned, normal, on

update_state_cuda = update_state_reference = update_state_reference_fwd = update_state_triton = update_state
update_state_vidrial_reference = update_state_vidrial

__all__ = [
    "create_inputs",
    "default_D",
    "input_properties",
    "output_properties",
    "update_state",
    "update_state_cuda",
    "update_state_reference",
    "update_state_reference_fwd",
    "update_state_triton",
    "update_state_vidrial",
    "update_state_vidrial_reference",
]


def create_inputs(
    b: int = 2,
    n: int = 4,
    c: int = 128,
    h: int = 8,
    d: int = 32,
    deg: int = 2,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    seed: int = 42,
    d_tile: int | None = None,
    use_vidrial_layout: bool = False,
    requires_grad: bool = False,
) -> dict[str, Any]:
    """Arguments of `update_state` by their names: K and V (b, n, c, h, d) from N(0, 1) / d^(1/4)."""
    draw = normal(seed, device)
    tensors = {what: draw(b, n, c, h, d, dtype=dtype) / d**0.25 for what in ("K", "V")}
    rest = {"d_tile": _states.vidrial_tile("create_inputs", d, deg, d_tile)} if use_vidrial_layout else {}
    return learned(tensors, requires_grad) | {"deg": deg} | rest


def input_properties(
    b: int = 2,
    n: int = 4,
    c: int = 128,
    h: int = 8,
    d: int = 32,
    deg: int = 2,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    seed: int = 42,
    requires_grad: bool = False,
    d_tile: int | None = None,
    use_vidrial_layout: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of them."""
    return {what: ((b, n, c, h, d), dtype, on(device)) for what in ("K", "V")}


def output_properties(
    b: int = 2,
    n: int = 4,
    c: int = 128,
    h: int = 8,
    d: int = 32,
    deg: int = 2,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    seed: int = 42,
    requires_grad: bool = False,
    d_tile: int | None = None,
    use_vidrial_layout: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of what `update_state` returns for them."""
    D = default_D(d, deg, d_tile) if use_vidrial_layout else compute_expanded_dim(d, deg)
    return {"S": ((b, n, h, D, d), dtype, on(device)), "s": ((b, n, h, D), torch.float32, on(device))}
