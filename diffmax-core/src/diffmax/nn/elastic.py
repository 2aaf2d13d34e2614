"""Elastic softmax: a second, learned threshold on the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffmax.nn._shapes import check_heads
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.numerics import hides


class Elastic(nn.Module):
    """weights = [P - c / n]_+ for P = normalize(x), n the number of visible keys, and c in (0, 1) learned per head.

    Weights below c times the uniform weight become exactly zero, even with softmax. Zeros stay zero. Because c < 1, no row
    becomes all 0: the largest of n weights that sum to 1 is at least 1 / n. After a `Sink`, which takes part of the weight,
    rows may be all 0.

    Args:
        normalize: Maps scores to weights along the last axis, such as a `DiffmaxBisectModule`.
        heads: H, of scores (B, H, L, S). The parameter `logit` (H,) holds ln(c / (1 - c)).
        start: Initial value of c.
        renormalize: Whether to divide by the sum. If not, rows sum to less than 1.
    Raises:
        ValueError: start is not in (0, 1), or the scores do not have `heads` heads.
    Source: Elastic-Softmax (arXiv:2601.00919), with its offset bounded: with c = 1 the first row of a causal attention would be
        0, and a negative c would give masked keys a weight. Written for diffmax.
    Example:
        >>> weights = Elastic(lambda x: x.softmax(-1), heads=1)(torch.tensor([[[[3.0, 2.0, 0.0, -1.0]]]]))
        >>> weights
        tensor([[[[0.5714, 0.1312, 0.0000, 0.0000]]]], grad_fn=<ReluBackward0>)
    """

    def __init__(
        self, normalize: Callable[[Tensor], Tensor], heads: int, start: float = 0.5, renormalize: bool = False
    ) -> None:
        super().__init__()
        if not 0 < start < 1:
            raise ValueError(f"Elastic: start must lie strictly between 0 and 1, got {start}")
        self.normalize, self.renormalize = normalize, renormalize
        self.start = start
        self.logit = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset c to `start`, for example after `to_empty`."""
        nn.init.constant_(self.logit, math.log(self.start / (1 - self.start)))

    def forward(self, scores: Tensor) -> Tensor:
        """Weights of scores (B, H, L, S), in which -inf, or the least number of the dtype, masks; a fully masked row is 0."""
        if is_captured(scores):
            return captured(self, scores)  # type: ignore[no-any-return]
        check_heads("Elastic", scores, len(self.logit), "scores")
        visible = ~hides(scores)
        empty = ~visible.any(-1, keepdim=True)
        threshold = self.logit.sigmoid().view(-1, 1, 1) / visible.sum(-1, keepdim=True).clamp_min(1)
        # softmax of a fully masked row would be NaN, and so would its gradient
        weights = self.normalize(scores.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)
        weights = (weights - threshold.to(weights.dtype)).relu()
        if not self.renormalize:
            return weights
        total = weights.sum(-1, keepdim=True)
        return weights / total.masked_fill(total == 0, 1.0)
