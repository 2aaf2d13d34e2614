"""A shape check that the modules share."""

from __future__ import annotations

from torch import Tensor


def check_heads(name: str, given: Tensor, heads: int, what: str) -> None:
    """Check that a tensor is (B, H, ..., ...)."""
    if given.ndim != 4 or given.shape[1] != heads:
        raise ValueError(f"{name}: {what} must have 4 dimensions, the second of them {heads} heads, got {tuple(given.shape)}")
