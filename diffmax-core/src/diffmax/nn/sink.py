"""Attention sinks, null or learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffmax.nn._shapes import check_heads
from diffmax.operators.common.capture import captured, is_captured


class Sink(nn.Module):
    """Weights of a row with an extra score, whose weight is discarded (attention sink).

    weights = normalize([x, s])[..., :-1]

    So a query with no relevant key can attend to nothing; without a sink its weights must sum to 1 over irrelevant keys. With
    diffmax the sink gets exactly 0 if s is at or below tau, and all of the weight if s exceeds the largest score of the row by
    1 / (1 - alpha) or more. In fused attention this is `diffmax.attention(..., sink=...)`.

    Args:
        normalize: Maps scores to weights along the last axis, such as a `DiffmaxBisectModule` or torch.softmax with dim -1.
            It is called with one more entry per row.
        heads: None: s is 0, a null sink. H: s is learned, one per head of scores (B, H, L, S), in the parameter `sink`, and
            starts at 0.
    Raises:
        ValueError: The scores do not have `heads` heads.
    Source: for softmax, "Attention is off by one" (E. Miller, 2023), and the sinks of gpt-oss. Written for diffmax.
    Example:
        >>> from diffmax.nn import DiffmaxBisectModule
        >>> Sink(DiffmaxBisectModule(0.5))(torch.tensor([[1.0, 0.5, -4.0], [-2.0, -3.0, -4.0]]))
        tensor([[0.6242, 0.2917, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """

    def __init__(self, normalize: Callable[[Tensor], Tensor], heads: int | None = None) -> None:
        super().__init__()
        self.normalize = normalize
        self.sink = None if heads is None else nn.Parameter(torch.zeros(heads))

    def reset_parameters(self) -> None:
        """Reset the sink to 0, for example after `to_empty`."""
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def forward(self, scores: Tensor) -> Tensor:
        """Weights (..., S) of scores (..., S); their sum is at most 1."""
        if is_captured(scores):
            return captured(self, scores)  # type: ignore[no-any-return]
        if self.sink is None:
            slot = scores.new_zeros(()).expand(*scores.shape[:-1], 1)
        else:
            check_heads("Sink", scores, len(self.sink), "scores")
            slot = self.sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return self.normalize(torch.cat([scores, slot], -1))[..., :-1]
