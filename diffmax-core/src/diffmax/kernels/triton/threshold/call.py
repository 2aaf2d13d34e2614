"""The arguments and results of threshold attention's launcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdCall:
    """The arguments of a kernel of "threshold_attention" besides query, key and value.

    Attributes:
        scale: The scores are scale * (query . key), and the bias.
        theta: (B or 1, H, L), in the accumulation dtype: what is subtracted before the rectifier.
        weights: What it is subtracted from: "scores", or their "softmax" or "diffmax" over the visible keys.
        power: p, positive.
        e: 1 - alpha of "diffmax", in (0, 1]; else 0.
        bias: (H, W), in the accumulation dtype: bias[h, r] is added to the score of the key r before the query, 0 <= r < W.
        mask: Boolean, (B, H, L, S) with any of them 1; True marks what is visible. Not with packed sequences.
        right: 0: causal; -1: not. Query i of L has the position i + S - L.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: As of attention. Then B = 1, and L and S above are the lengths
            of a single sequence, but theta has an entry for each query.
    """

    scale: float
    theta: Tensor
    weights: str = "scores"
    power: float = 1.0
    e: float = 0.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    right: int = 0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


class ThresholdSaved(NamedTuple):
    """What the forward leaves for the backward.

    Attributes:
        statistic: (B, H, L), in the accumulation dtype: the log-sum-exp of a query's visible scores for "softmax", tau for
            "diffmax", -inf where nothing is visible; (0,) for "scores".
    """

    statistic: Tensor


class ThresholdWanted(NamedTuple):
    """Which gradients are wanted besides those for query, key and value: for theta, for the bias."""

    theta: bool = False
    bias: bool = False


class ThresholdResults(NamedTuple):
    """What a kernel of "threshold_attention" returns."""

    out: Tensor
    mass: Tensor
    statistic: Tensor

    @property
    def saved(self) -> ThresholdSaved:
        """What it leaves for the backward."""
        return ThresholdSaved(self.statistic)


class ThresholdGradients(NamedTuple):
    """What a kernel of "threshold_attention_backward" returns; (0,) for what was not wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    theta: Tensor
    bias: Tensor
