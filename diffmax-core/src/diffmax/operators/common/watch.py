"""Observers of calls of rows and attention: only `diffmax.monitor.Monitor`, while one exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from diffmax.plugin import AttentionCall


class Watcher(Protocol):
    """An observer. It is called after the result is computed, and changes nothing."""

    def saw_rows(self, X: Tensor, weights: Tensor, e: float | Tensor, dim: int) -> None:
        """Observe a call of the row operator: scores, weights, and 1 - alpha."""

    def saw_attention(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        """Observe the arguments of a call of attention."""


watchers: list[Watcher] = []
