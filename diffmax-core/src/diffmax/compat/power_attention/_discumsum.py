"""Stands in for power-attention's module `_discumsum`."""

from __future__ import annotations

from typing import Any

import torch

from diffmax.compat.power_attention._functions import discumsum
from diffmax.compat.power_attention._samples import Device, Property, learned, normal, on

discumsum_reference = discumsum

__all__ = ["create_inputs", "discumsum", "discumsum_reference", "input_properties", "output_properties"]


def create_inputs(
    b: int = 2,
    n: int = 4,
    h: int = 8,
    D: int = 64,
    d: int = 16,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    requires_grad: bool = False,
) -> dict[str, Any]:
    """Arguments of `discumsum` by their names: X (b, n, h, D, d) from N(0, 1), and gates of exp(-0.01)."""
    X = normal(42, device)(b, n, h, D, d, dtype=dtype)
    return learned({"X": X, "log_G": torch.full((b, n, h), -0.01, device=X.device)}, requires_grad)


def input_properties(
    b: int = 2,
    n: int = 4,
    h: int = 8,
    D: int = 64,
    d: int = 16,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    requires_grad: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of them."""
    return {"X": ((b, n, h, D, d), dtype, on(device)), "log_G": ((b, n, h), torch.float32, on(device))}


def output_properties(
    b: int = 2,
    n: int = 4,
    h: int = 8,
    D: int = 64,
    d: int = 16,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    requires_grad: bool = False,
) -> dict[str, Property]:
    """Shape, dtype and device of what `discumsum` returns for them."""
    return {"cum_X": ((b, n + 1, h, D, d), dtype, on(device))}
