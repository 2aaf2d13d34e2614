"""Observers of calls of rows and attention: `diffmax.monitor.Monitor` and `diffmax.inspect_attention`, while one exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from diffmax.plugin import AttentionCall


class Watcher(Protocol):
    """An observer. It is called after the result is computed, and changes nothing."""

    def saw_rows(self, X: Tensor, weights: Tensor, e: float | Tensor, dim: int) -> None:
        """Observe a call of the row operator: scores, weights, and 1 - alpha."""

    def saw_attention(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, delta: Tensor) -> None:
        """Observe a call of attention: its arguments, and delta (B, H, L) of its queries."""


watchers: list[Watcher] = []
