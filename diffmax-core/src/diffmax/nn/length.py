"""Length scaling: scores that grow with the number of keys, so that attention does not flatten in long sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffmax.nn._shapes import check_heads
from diffmax.operators.attention.checks import check_window
from diffmax.operators.attention.scores import visible_span
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.numerics import hides


def visible_keys(
    queries: int,
    keys: int,
    is_causal: bool,
    causal_alignment: str,
    window_size: tuple[int, int] | None,
    attn_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The number of keys visible to each query, (L,) or with a mask (..., L), float32; at least 1."""
    left, right = check_window("LengthScale", window_size, is_causal)
    place = torch.arange(queries, device=device) + (keys - queries if causal_alignment == "lower_right" else 0)
    first, end = (torch.as_tensor(at).clamp(0, keys) for at in visible_span(place, place, left, right, keys))
    if attn_mask is None:
        return (end - first).clamp_min(1).float()
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"LengthScale: attn_mask must be boolean or floating, got {attn_mask.dtype}\npass attn_mask.bool()")
    seen = attn_mask if attn_mask.dtype == torch.bool else ~hides(attn_mask)
    # from a cumulative sum over keys instead of a sum per query: a padding mask has one row for all queries
    so_far = seen.expand(*seen.shape[:-1], keys).cumsum(-1, dtype=torch.int32)
    before = nn.functional.pad(so_far, (1, 0)).expand(*seen.shape[:-2], queries, -1)
    counts = [before.gather(-1, at.unsqueeze(1).expand(*before.shape[:-1], 1)) for at in (first, end)]
    return (counts[1] - counts[0]).squeeze(-1).clamp_min(1).float()


def seen_by(
    query: Tensor,
    keys: int,
    is_causal: bool,
    causal_alignment: str,
    window_size: tuple[int, int] | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """`visible_keys` of a query (B, H, L, D), also with one of torch's CausalBias as mask."""
    variant = getattr(attn_mask, "variant", None)  # its values must not be read
    if variant is not None:
        is_causal, causal_alignment, attn_mask = True, variant.name.lower(), None
    return visible_keys(query.shape[2], keys, is_causal, causal_alignment, window_size, attn_mask, query.device)


class LengthScale(nn.Module):
    """Queries scaled by 1 + exp(-exp(b)) ln n, where n is the number of visible keys of the query and b is learned per head.

    The maximum of n random scores grows like sqrt(2 ln n), and so does the support of a row: at a fixed temperature attention
    spreads as sequences become longer. Scaling a query scales all of its scores, so this module works before any attention,
    fused or not. Keys that causality, a window or a mask hides do not count; a floating mask hides by -inf or the least number
    of its dtype.

    Args:
        heads: H. The parameter `log_decay` (b, of shape (H,)) has one entry per head.
        start: Initial value of b; at 2, the factor of ln n is 0.0006, nearly 0.
        device, dtype: Device and dtype of the parameter.
    Raises:
        ValueError: The query does not have `heads` heads.
    Source: the position-dependent part of the temperature of Selective Self-Attention (Zhang et al., NeurIPS 2024). Written
        for diffmax.
    Example:
        >>> query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
        >>> longer = LengthScale(4)(query, keys=6, is_causal=True)
        >>> bool((longer[:, :, 0] == query[:, :, 0]).all())  # the first query sees one key, and ln 1 = 0
        True
    """

    def __init__(
        self,
        heads: int,
        start: float = 2.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.start = float(start)
        self.log_decay = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset b to `start`, for example after `to_empty`."""
        nn.init.constant_(self.log_decay, self.start)

    def forward(
        self,
        query: Tensor,
        keys: int,
        is_causal: bool = False,
        causal_alignment: str = "upper_left",
        window_size: tuple[int, int] | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The scaled query (B, H, L, D); `keys` is S, and the options that hide keys are those of `diffmax.attention`."""
        if is_captured(query, keys, attn_mask):
            options = (is_causal, causal_alignment, window_size, attn_mask)
            return captured(self, query, keys, *options)  # type: ignore[no-any-return]
        check_heads("LengthScale", query, len(self.log_decay), "query")
        seen = seen_by(query, keys, is_causal, causal_alignment, window_size, attn_mask)
        factor = 1 + torch.exp(-self.log_decay.exp()).unsqueeze(1) * seen.log()
        return query * factor.unsqueeze(-1).to(query.dtype)
