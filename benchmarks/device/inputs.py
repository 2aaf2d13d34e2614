"""Queries, keys and values: drawn, or captured from models on real text."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.context import Context, SkipError

FILE = "captured.pt"


def tensors(
    context: Context, scores: str, length: int, heads: int, head_dim: int, alpha: float, sparsity: float, dtype: str
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Query (1, H, L, D), key and value (1, H_kv, L, D), and whether the attention is causal.

    "band": keys lose score linearly with their distance, so that a band of tiles is live; how many, the benchmark measures.
    """
    place = context.place
    if scores not in ("randn", "band"):
        query, key, value = captured(scores, length)
        return (*(t.to(place.device, getattr(torch, dtype)) for t in (query, key, value)), scores != "encoder")
    query, key, value = (context.randn(1, heads, length, head_dim) for _ in range(3))
    if scores == "band":
        e = 1 - alpha
        keys = (1 - math.sqrt(sparsity)) * length  # of the causal triangle, 1 - (1 - keys / length)^2 is live
        # scores that fall by `slope` per key have a band of that many: the sum of (e slope j)^(1/e) over it is 1
        slope = (keys ** (-1 / e - 1) * (1 / e + 1)) ** e / e
        query = query * (slope * keys / 20)  # noise that widens the band by little
        query[..., 0] = math.sqrt(head_dim)
        key[..., 0] = torch.arange(length, device=place.device) * slope
    kind = getattr(torch, dtype)
    return query.to(kind), key.to(kind), value.to(kind), True


def captured(name: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the bundle carries of a model; the encoder's can be captured here, where its package is.

    Raises:
        SkipError: There is nothing of it, or not so long.
    """
    file = Path(os.environ.get("DEVICE_BUNDLE", "")) / FILE
    if file.is_file():
        held: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if name in held:
            query, key, value = held[name]
            if query.shape[2] < length:
                raise SkipError(f"the captured {name} has {query.shape[2]} tokens, not {length}")
            return query[:, :, :length], key[:, :, :length], value[:, :, :length]
    if name != "encoder":
        raise SkipError(f"nothing captured of a {name}: the bundle holds it")
    from benchmarks import captured as capturing

    try:
        return capturing.captured(length)
    except ImportError as error:
        raise SkipError(f"nothing captured of an {name}, and it cannot be here: {error}") from error
