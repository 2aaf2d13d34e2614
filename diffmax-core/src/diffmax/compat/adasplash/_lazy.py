"""The lazy attention of AdaSplash's authors' ecosystem, by its published names, on `diffmax.lazy_attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffmax.compat.adasplash._functions import _valid_tokens
from diffmax.nn import lazy
from diffmax.operators.attention.checks import check_tensors
from diffmax.operators.threshold.members import lazy_attention


def lazy_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    tau: Tensor,
    window_size: int | None = 512,
    varlen: Tensor | None = None,
) -> Tensor:
    """`diffmax.lazy_attention`, causal, as published: of the first row's weight 1 + tau is left.

    Args:
        q: (B, H, L, D), rotated, if at all.
        k, v: (B, H_kv, S, D) and (B, H_kv, S, D_v), where H_kv divides H.
        bias: (H, W) or (H, W + 1), a number per head and distance, W = window_size; None takes bias as it is.
        tau: (H,).
        varlen: (B,), int32 or int64: the length of each sequence without padding, which is on the right. Padding queries get 0.
    Returns:
        (B, H, L, D_v), like q.
    Raises:
        TypeError, ValueError: As `diffmax.lazy_attention`; or varlen does not fit.
    Source: docs/lazy.md; the signature is that of the published kernel. Written for diffmax.
    Example:
        >>> import torch
        >>> x = torch.randn(2, 4, 100, 24)
        >>> out = lazy_attention_triton(x, x, x, torch.zeros(4, 9), torch.full((4,), -0.5), 8, torch.tensor([100, 60]))
        >>> out[1, :, 60:].abs().max()
        tensor(0.)
    """
    name = "lazy_attention_triton"
    check_tensors(name, q, k, v, "BHLD")
    mask = queries = None
    if varlen is not None:
        queries, keys = _valid_tokens(name, varlen, q.shape, k.shape[2])
        # padding may hold NaN, and 0 times NaN is NaN
        q, k, v, mask = q.masked_fill(~queries, 0), k.masked_fill(~keys, 0), v.masked_fill(~keys, 0), keys.mT
    out = lazy_attention(q, k, v, bias, tau, window_size, attn_mask=mask, first_row="published")
    return out if queries is None else out.masked_fill(~queries, 0)


class LazyAttention(lazy.LazyAttention):
    """`diffmax.nn.LazyAttention` with the published constructor and the published first row, whose weight is 1 + tau.

    Args:
        dim, num_heads, window_size, rope_base: As there.
        settings: Keyword arguments of `diffmax.nn.LazyAttention`.
    Example:
        >>> import torch
        >>> LazyAttention(32, 4, window_size=8)(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 512, rope_base: float = 10000.0, **settings: Any) -> None:
        super().__init__(dim, num_heads, window_size, rope_base, **{"first_row": "published", **settings})

    def forward(self, x: Tensor, mask: Tensor | None = None, **past: Any) -> Any:
        """As `diffmax.nn.LazyAttention`'s."""
        return super().forward(x, mask, **past)
