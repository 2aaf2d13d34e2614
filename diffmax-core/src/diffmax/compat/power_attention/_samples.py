"""Random inputs with a seed, the numbers of power-attention and retention; torch's own generator stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Device: TypeAlias = "torch.device | str | None"
Property: TypeAlias = "tuple[tuple[int, ...], torch.dtype, torch.device | str]"


def on(device: Device) -> torch.device | str:
    """Where samples are made: by default on CUDA if there is any, and else on the CPU."""
    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def normal(seed: int, device: Device) -> Callable[..., Tensor]:
    """A function of a shape and a dtype that draws from N(0, 1)."""
    where = on(device)
    generator = torch.Generator(where).manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=where, generator=generator)

    return draw


def learned(inputs: dict[str, Any], requires_grad: bool) -> dict[str, Any]:
    """The inputs, of which floating tensors require gradients if that is asked for."""
    if requires_grad:
        for given in inputs.values():
            if isinstance(given, Tensor):
                given.requires_grad_()
    return inputs
