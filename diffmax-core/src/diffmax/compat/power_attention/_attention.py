"""Stands in for power-attention's module `_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid

from diffmax.compat.power_attention._functions import attention
from diffmax.compat.power_attention._samples import Device, Property, learned, normal, on

attention_cuda = attention_reference = attention_reference_fwd = attention_triton = attention

__all__ = [
    "attention",
    "attention_cuda",
    "attention_reference",
    "attention_reference_fwd",
    "attention_triton",
    "create_inputs",
    "input_properties",
    "output_properties",
]


def create_inputs(
    b: int = 2,
    t: int = 32,
    h: int = 8,
    d: int = 32,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    scale: float = 1.0,
    deg: int = 2,
    r: int = 1,
    w: int = 1,
    causal: bool = True,
    gating: bool = False,
    head_first: bool = True,
    requires_grad: bool = False,
    seed: int = 42,
    std: float = 1.0,
    norm: bool = True,
    use_log2: bool = False,
) -> dict[str, Any]:
    """Arguments of `attention` by their names: Q, K, V from N(0, std), and cumulated gates, from the logsigmoid of N(0, 1)."""
    draw, rows = normal(seed, device), (b, h, t) if head_first else (b, t, h)
    tensors = {what: draw(*rows, d, dtype=dtype) * std for what in ("Q", "K", "V")}
    gates = logsigmoid(draw(*rows)).cumsum(2 if head_first else 1) if gating else None
    rest = {"deg": deg, "r": r, "w": w, "causal": causal, "head_first": head_first, "scale": scale, "norm": norm}
    return learned({**tensors, "log_G": gates}, requires_grad) | rest | {"use_log2": use_log2}


def input_properties(
    b: int = 2,
    t: int = 32,
    h: int = 8,
    d: int = 32,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    gating: bool = False,
    head_first: bool = True,
    **kwargs: Any,
) -> dict[str, Property]:
    """Shape, dtype and device of them."""
    rows, where = (b, h, t) if head_first else (b, t, h), on(device)
    found: dict[str, Property] = dict.fromkeys(("Q", "K", "V"), ((*rows, d), dtype, where))
    return found | ({"log_G": (rows, torch.float32, where)} if gating else {})


def output_properties(
    b: int = 2,
    t: int = 32,
    h: int = 8,
    d: int = 32,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    head_first: bool = True,
    norm: bool = True,
    **kwargs: Any,
) -> dict[str, Property]:
    """Shape, dtype and device of what `attention` returns for them."""
    rows, where = (b, h, t) if head_first else (b, t, h), on(device)
    found: dict[str, Property] = {"Y": ((*rows, d), dtype, where)}
    return found if norm else found | {"l": (rows, torch.float32, where), "rowmax": (rows, torch.float32, where)}
