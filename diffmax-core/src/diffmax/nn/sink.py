"""A place for weight that no key deserves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffmax.nn._shapes import check_heads
from diffmax.operators.common.capture import captured, is_captured


class Sink(nn.Module):
    """Weights of a row with one more entry, which has no value: what it takes, the keys do not get.

    weights = normalize([x, s])[..., :-1]

    A query for which nothing fits can so look at nothing: an attention whose rows must sum to 1 gives such weight to some token
    that does not matter. With diffmax the slot gets exactly 0 where s is at or below tau, and all where s is above the row's
    largest score by 1 / (1 - alpha) or more. In fused attention this is `diffmax.attention(..., sink=...)`.

    Args:
        normalize: From scores to weights along the last axis, such as a `DiffmaxBisectModule` or torch.softmax at dim -1. It
            is called with one more entry per row.
        heads: None: s is 0, a null slot. H: s is learned, one per head of scores (B, H, L, S), in the parameter `sink`, and
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
        """Begin anew, as after `to_empty`."""
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
