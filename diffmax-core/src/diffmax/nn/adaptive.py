"""ASEntmax: scores with a temperature per query, computed from its token, that follows the number of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmax.maps import AlphaMap
from diffmax.nn._shapes import check_heads
from diffmax.nn.bisect import DiffmaxBisectModule
from diffmax.nn.length import seen_by
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.numerics import hides


class AdaptiveLengthScale(nn.Module):
    """Queries scaled by delta + beta (ln(n + 1))^gamma, for n visible keys: the scale of ASEntmax, before any attention.

    beta = softplus(W_beta x) > 0 and gamma = reach * tanh(W_gamma x), in (-reach, reach), are computed per head from the token
    x of the query. A positive gamma sharpens attention as sequences become longer, a negative one flattens it. Keys that
    causality, a window or a mask hides do not count. Where W x = 0, the factor is delta + ln 2 at every length.

    The published formula has ln n, which at n = 1 has no negative power. The authors' code, and this one, has ln(n + 1).

    Args:
        embed_dim: Size of the tokens x.
        heads: H. `project` holds W_beta in its first H rows and W_gamma in the others; it starts as nn.Linear does.
        delta: The part of the scale that does not depend on the length. At least 0.
        reach: Bound of the absolute value of gamma. More than 0.
        device, dtype: Device and dtype of the parameters.
    Raises:
        TypeError: query has no floating-point dtype.
        ValueError: heads, delta or reach is out of range, or query or x has the wrong shape.
    Source: "Long-Context Generalization with Sparse Attention" (Vasylenko et al., 2025, arXiv:2506.16640), ASEntmax; delta,
        reach and no bias are its settings. There it acts on the heads without positions only. Written for diffmax.
    Example:
        >>> scale, query, x = AdaptiveLengthScale(16, 4), torch.randn(1, 4, 6, 8), torch.randn(1, 6, 16)
        >>> scale(query, x, keys=6, is_causal=True).shape
        torch.Size([1, 4, 6, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        delta: float = 1.0,
        reach: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"AdaptiveLengthScale: heads must be at least 1, got {heads}")
        if not 0 <= delta < math.inf:
            raise ValueError(f"AdaptiveLengthScale: delta must be finite and at least 0, got {delta}")
        if not 0 < reach < math.inf:
            raise ValueError(f"AdaptiveLengthScale: reach must be finite and more than 0, got {reach}")
        self.heads, self.delta, self.reach = heads, float(delta), float(reach)
        self.project = nn.Linear(embed_dim, 2 * heads, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialize W again, for example after `to_empty`."""
        self.project.reset_parameters()

    def factor(self, x: Tensor, seen: Tensor) -> Tensor:
        """The factor of each row, (B, H, L), at least float32: tokens x (B, L, embed_dim), counts that broadcast to it."""
        if x.ndim != 3 or x.shape[-1] != self.project.in_features:
            raise ValueError(f"AdaptiveLengthScale: x must have shape (B, L, {self.project.in_features}), got {tuple(x.shape)}")
        projected = self.project(x).mT
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        beta, gamma = projected.split(self.heads, 1)
        power: Tensor = seen.to(beta.dtype).log1p() ** (self.reach * gamma.tanh())
        return self.delta + nn.functional.softplus(beta) * power

    def forward(
        self,
        query: Tensor,
        x: Tensor,
        keys: int,
        is_causal: bool = False,
        causal_alignment: str = "upper_left",
        window_size: tuple[int, int] | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The scaled query (B, H, L, D) of tokens x (B, L, embed_dim); the rest is as for `LengthScale`."""
        if is_captured(query, x, keys, attn_mask):
            options = (is_causal, causal_alignment, window_size, attn_mask)
            return captured(self, query, x, keys, *options)  # type: ignore[no-any-return]
        check_heads("AdaptiveLengthScale", query, self.heads, "query")
        _check_tokens("AdaptiveLengthScale", query, x, "query")
        seen = seen_by(query, keys, is_causal, causal_alignment, window_size, attn_mask)
        return query * self.factor(x, seen).unsqueeze(-1).to(query.dtype)

    def extra_repr(self) -> str:
        """The settings that repr shows."""
        return f"delta={self.delta}, reach={self.reach}"


class ASEntmax(nn.Module):
    """Weights of scores times delta + beta (ln(n + 1))^gamma: ASEntmax over rows, for an attention that forms its scores.

    The factor is that of `AdaptiveLengthScale`, with n counted from the scores that are not -inf. Without the scores: that
    module before `diffmax.attention`, or `DiffmaxAttention(..., length_scale="adaptive")`.

    Args:
        embed_dim, heads, delta, reach: As for `AdaptiveLengthScale`, which is the part `scale`.
        alpha, alpha_map: As for `DiffmaxBisectModule`, which is the part `normalize`. entmax's alpha is 2 - alpha: the
            published 1.5 is 0.5.
    Raises:
        TypeError: scores have no floating-point dtype.
        ValueError: An argument is out of range, or scores or x has the wrong shape.
    Source: as `AdaptiveLengthScale`.
    Example:
        >>> weights = ASEntmax(16, 4)(torch.randn(2, 4, 5, 7), torch.randn(2, 5, 16))
        >>> weights.shape, bool(torch.allclose(weights.sum(-1), torch.ones(2, 4, 5)))
        (torch.Size([2, 4, 5, 7]), True)
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        alpha: float | Tensor = 0.5,
        alpha_map: AlphaMap | None = None,
        delta: float = 1.0,
        reach: float = 2.0,
    ) -> None:
        super().__init__()
        self.scale = AdaptiveLengthScale(embed_dim, heads, delta=delta, reach=reach)
        self.normalize = DiffmaxBisectModule(alpha, alpha_map=alpha_map)

    def forward(self, scores: Tensor, x: Tensor) -> Tensor:
        """Weights of scores (B, H, L, S), whose queries come from tokens x (B, L, embed_dim).

        -inf, or the least number of the dtype, masks.
        """
        if is_captured(scores, x):
            return captured(self, scores, x)  # type: ignore[no-any-return]
        check_heads("ASEntmax", scores, self.scale.heads, "scores")
        _check_tokens("ASEntmax", scores, x, "scores")
        masked = hides(scores)
        factor = self.scale.factor(x, (~masked).sum(-1).clamp_min(1))
        # the factor's gradient would be NaN: -inf times 0; and in float16 the product may be infinite
        scaled = scores.masked_fill(masked, 0.0) * factor.unsqueeze(-1)
        weights: Tensor = self.normalize(scaled.masked_fill(masked, -torch.inf))
        return weights.to(scores.dtype)


def _check_tokens(name: str, given: Tensor, x: Tensor, what: str) -> None:
    """Refuse what is not (B, H, L, ...) of floats with tokens (B, L, embed_dim)."""
    if not given.is_floating_point():
        raise TypeError(f"{name}: {what} must have a floating-point dtype, got {given.dtype}")
    if x.ndim == 3 and x.shape[:2] != (given.shape[0], given.shape[2]):
        wanted = f"({given.shape[0]}, {given.shape[2]}, embed_dim)"
        raise ValueError(f"{name}: x must hold the token of each query, {wanted}, got {tuple(x.shape)}")
