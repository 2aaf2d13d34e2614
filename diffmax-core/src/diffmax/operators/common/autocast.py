"""Autocast: what attention computes with under it, and what it must leave alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's own attention computes with under autocast: everything but float64 in autocast's dtype."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and _is_converted(t.dtype) else t for t in tensors)


def _is_converted(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != torch.float64


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """For what was converted before: autocast would round it, and joins no tensors of the 16-bit dtype that is not its own."""
    kind = t.device.type
    enabled = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()
