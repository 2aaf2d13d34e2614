"""Stands in for retention's module `_discumsum`."""

from __future__ import annotations

from typing import Any

import torch

from diffmax.compat.power_attention._discumsum import input_properties, output_properties
from diffmax.compat.power_attention._functions import discumsum
from diffmax.compat.power_attention._samples import Device, learned, on

discumsum_reference = discumsum_triton = discumsum

__all__ = ["create_inputs", "discumsum", "discumsum_reference", "discumsum_triton", "input_properties", "output_properties"]


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
    """Arguments of `discumsum` by their names: X (b, n, h, D, d) from N(0, 1), and log gates uniform in [-1, 0]."""
    where = on(device)
    generator = torch.Generator(where).manual_seed(42)
    X = torch.randn(b, n, h, D, d, dtype=dtype, device=where, generator=generator)
    return learned({"X": X, "log_G": torch.rand(b, n, h, device=where, generator=generator) - 1.0}, requires_grad)
