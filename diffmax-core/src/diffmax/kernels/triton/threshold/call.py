"""The arguments and results of threshold attention's launcher. Symbols: `launch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdCall:
    """What is computed, besides query, key and value.

    Attributes:
        scale: The scores are scale * (query . key) + bias.
        theta: The thresholds, float32, (1 or B, H, L), any strides.
        weights: u is "softmax" of the scores of the visible keys, or the "scores".
        power: Weights are max(u - theta, 0)^power; positive.
        bias: float32 (H, W): entry r is added to the score of the key r places before the query's own; nothing farther away.
        mask: Boolean, (B, H, L, S) with any of them 1; True marks what is visible.
        left, right: Number of keys visible before and after the position of the query; -1: unlimited. Causal: right = 0. The
            last query has the position of the last key.
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,), the sequence starts and the end of packed sequences. Then B = 1.
        max_seqlen_q, max_seqlen_k: No packed sequence is longer.
    """

    scale: float
    theta: Tensor
    weights: str = "scores"
    power: float = 1.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    left: int = -1
    right: int = -1
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


class ThresholdResults(NamedTuple):
    """out (B, H, L, Dv), mass (B, H, L), and the log-sum-exp of softmax's scores (B, H, L), else (0,)."""

    out: Tensor
    mass: Tensor
    statistic: Tensor


class ThresholdSaved(NamedTuple):
    """Of the results, what the backward takes."""

    statistic: Tensor


class ThresholdWanted(NamedTuple):
    """Which gradients are wanted, besides those for query, key, value and theta."""

    bias: bool = False


class ThresholdGradients(NamedTuple):
    """The gradients; theta's is (B, H, L), in float32, and the bias's (0,) if it was not wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    theta: Tensor
    bias: Tensor
