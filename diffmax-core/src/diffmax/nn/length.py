"""Scores that grow with the number of keys, so that attention does not flatten as the sequence grows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffmax.nn._shapes import check_heads


def visible_keys(queries: int, keys: int, is_causal: bool, causal_alignment: str, device: torch.device | None) -> Tensor:
    """How many keys each query sees, (L,), float32; at least 1."""
    if not is_causal:
        return torch.full((queries,), float(max(keys, 1)), device=device)
    shift = keys - queries if causal_alignment == "lower_right" else 0
    return torch.arange(1 + shift, 1 + shift + queries, device=device).clamp(1, max(keys, 1)).float()


class LengthScale(nn.Module):
    """Queries scaled by 1 + exp(-exp(b)) ln n, n the number of keys that the query sees, b learned per head.

    The maximum of n random scores grows like sqrt(2 ln n), and the support of a row with it: at a fixed temperature attention
    spreads as sequences become longer. A query that is multiplied by a number has all of its scores multiplied by it, so
    this goes before any attention, fused or not.

    Args:
        heads: H. The parameter `log_decay` (b, of shape (H,)) has one entry per head.
        start: What b starts at; at 2, ln n counts with 0.0006, nearly not at all.
    Raises:
        ValueError: The query has other than `heads` heads.
    Source: the temperature of Selective Self-Attention (Zhang et al., NeurIPS 2024), its part that depends on the place.
        Written for diffmax.
    Example:
        >>> query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
        >>> longer = LengthScale(4)(query, keys=6, is_causal=True)
        >>> bool((longer[:, :, 0] == query[:, :, 0]).all())  # the first query sees one key, and ln 1 = 0
        True
    """

    def __init__(self, heads: int, start: float = 2.0) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.full((heads,), float(start)))

    def forward(self, query: Tensor, keys: int, is_causal: bool = False, causal_alignment: str = "upper_left") -> Tensor:
        """The scaled query (B, H, L, D); `keys` is S, and causality as in `diffmax.attention`."""
        check_heads("LengthScale", query, len(self.log_decay), "query")
        seen = visible_keys(query.shape[2], keys, is_causal, causal_alignment, query.device)
        factor = 1 + torch.exp(-self.log_decay.exp()).unsqueeze(1) * seen.log()
        return query * factor.unsqueeze(2).to(query.dtype)
