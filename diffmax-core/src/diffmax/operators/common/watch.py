"""Who is told of each call of rows and attention that runs here: `diffmax.monitor.Monitor`, while it exists. Nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from diffmax.plugin import AttentionCall


class Watcher(Protocol):
    """What is told, after the result was computed; it changes nothing."""

    def saw_rows(self, X: Tensor, weights: Tensor, e: float | Tensor, dim: int) -> None:
        """Scores, their weights, and 1 - alpha."""

    def saw_attention(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        """What an attention was given."""


watchers: list[Watcher] = []
