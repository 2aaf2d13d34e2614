"""Attention's options, as the arguments that a benchmark of each passes beside query, key and value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALPHA = 0.5


def _learned(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()


# What is passed beside query, key and value, for a length.
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda n: {},
    "causal": lambda n: {"is_causal": True},
    "window": lambda n: {"window_size": (n // 8, n // 8)},
    "mask": lambda n: {"attn_mask": torch.rand(n, n, generator=torch.Generator().manual_seed(2)) > 0.1},
    "bias": lambda n: {"attn_mask": _learned(n, n).detach()},
    "bias that learns": lambda n: {"attn_mask": _learned(n, n)},
    "bias of keys that learns": lambda n: {"attn_mask": _learned(1, n)},
    "ALiBi": lambda n: {"alibi_slopes": torch.full((1,), 1 / 64)},
    "softcap": lambda n: {"softcap": 20.0},
    "sink that learns": lambda n: {"sink": _learned(1)},
    "dropout": lambda n: {"dropout_p": 0.1},
    "alpha as a tensor": lambda n: {"alpha": torch.full((1,), ALPHA)},
    "alpha that learns": lambda n: {"alpha": torch.full((1,), ALPHA, requires_grad=True)},
    "statistics": lambda n: {"return_stats": True},
}


def learned(given: dict[str, Any]) -> list[Tensor]:
    return [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
