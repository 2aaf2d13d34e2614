"""Stands in for retention's module `_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid

from diffmax.compat.power_attention._samples import Device, Property, learned, normal, on
from diffmax.compat.retention._functions import attention

attention_reference = attention_reference_fwd = attention_triton = attention

__all__ = [
    "attention",
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
    causal: bool = True,
    gating: bool = False,
    head_first: bool = False,
    requires_grad: bool = False,
    seed: int = 41,
    std: float = 1.0,
    norm: bool = True,
    use_log2: bool = False,
    inference: bool = False,
    qhead_ratio: int = 1,
) -> dict[str, Any]:
    """Arguments of `attention` by their names: Q, K, V from N(0, std), and log gates that are all the logsigmoid of 1."""
    draw = normal(seed, device)
    of_query, of_key = _rows(b, t, h, head_first, inference, qhead_ratio)
    tensors = {"Q": draw(*of_query, d, dtype=dtype) * std, **{what: draw(*of_key, d, dtype=dtype) * std for what in ("K", "V")}}
    gates = logsigmoid(torch.ones(of_key, device=on(device))) if gating else None
    rest = {"deg": deg, "causal": causal, "head_first": head_first, "scale": scale, "norm": norm, "use_log2": use_log2}
    return learned({**tensors, "log_G": gates}, requires_grad) | rest


def input_properties(
    b: int = 2,
    t: int = 32,
    h: int = 8,
    d: int = 32,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    gating: bool = False,
    head_first: bool = False,
    inference: bool = False,
    qhead_ratio: int = 1,
    **kwargs: Any,
) -> dict[str, Property]:
    """Shape, dtype and device of them."""
    where, (of_query, of_key) = on(device), _rows(b, t, h, head_first, inference, qhead_ratio)
    found: dict[str, Property] = {"Q": ((*of_query, d), dtype, where)}
    found |= dict.fromkeys(("K", "V"), ((*of_key, d), dtype, where))
    return found | ({"log_G": (of_key, torch.float32, where)} if gating else {})


def output_properties(
    b: int = 2,
    t: int = 32,
    h: int = 8,
    d: int = 32,
    dtype: torch.dtype = torch.float16,
    device: Device = None,
    head_first: bool = False,
    inference: bool = False,
    qhead_ratio: int = 1,
    norm: bool = True,
    **kwargs: Any,
) -> dict[str, Property]:
    """Shape, dtype and device of what `attention` returns for them."""
    where, (rows, _) = on(device), _rows(b, t, h, head_first, inference, qhead_ratio)
    found: dict[str, Property] = {"Y": ((*rows, d), dtype, where)}
    return found if norm else found | {"l": (rows, torch.float32, where), "rowmax": (rows, torch.float32, where)}


def _rows(b: int, t: int, h: int, head_first: bool, inference: bool, ratio: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    of_query, of_key = (1 if inference else t, h * ratio), (t, h)
    return (b, *(of_query[::-1] if head_first else of_query)), (b, *(of_key[::-1] if head_first else of_key))
