"""Learned relative position bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmax.operators.common.capture import captured, is_captured


class RelativePositionBias(nn.Embedding):
    """T5's relative position bias, for `attn_mask` of `diffmax.attention`: a learned number per head and bucket of distances.

    Half of the buckets hold one distance each. The other buckets are logarithmic in the distance, up to `max_distance`; the
    last one also holds all larger distances.

    Args:
        num_heads: H.
        num_buckets: Rows of the table; its `weight` is (num_buckets, H), as in T5's `relative_attention_bias`.
        max_distance: All distances from this one on share a bucket.
        bidirectional: Whether half of the buckets are for keys after the query, as in T5's encoder. If not, such keys count as
            distance 0, as in its causal decoder.
    Raises:
        ValueError: There are fewer buckets than four (bidirectional) or two, or max_distance is not larger than the number of
            buckets that hold a single distance.
    Source: Raffel et al., "Exploring the limits of transfer learning", arXiv:1910.10683, section 2.1; the buckets are those of
        its released models. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> bias, x = RelativePositionBias(4), torch.randn(1, 4, 10, 16)
        >>> diffmax.attention(x, x, x, bias(10, 10), alpha=0.85).shape
        torch.Size([1, 4, 10, 16])
    """

    def __init__(self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        one_way = num_buckets // 2 if bidirectional else num_buckets
        if one_way < 2:
            raise ValueError(
                f"RelativePositionBias: num_buckets must be at least {4 if bidirectional else 2}, got {num_buckets}"
            )
        if max_distance <= one_way // 2:
            raise ValueError(
                f"RelativePositionBias: max_distance must be larger than {one_way // 2}, got {max_distance}\n"
                f"  of {num_buckets} buckets so many hold one distance each"
            )
        super().__init__(num_buckets, num_heads)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the sizes of an embedding do not determine the buckets
        cls, embeddings: Tensor, freeze: bool = True, max_distance: int = 128, bidirectional: bool = True
    ) -> RelativePositionBias:
        """A bias with a given table (num_buckets, H) as `weight`, such as T5's; with `freeze` it is not trained."""
        bias = cls(embeddings.shape[1], embeddings.shape[0], max_distance, bidirectional)
        bias.weight = nn.Parameter(embeddings, requires_grad=not freeze)
        return bias

    def forward(self, length: int, keys: int, first: int = 0) -> Tensor:  # type: ignore[override]  # sizes, not indices
        """The bias (1, H, length, keys) for query positions from `first` on, and key positions from 0 on."""
        if is_captured(length, keys, first):
            return captured(self, length, keys, first)  # type: ignore[no-any-return]
        query = torch.arange(first, first + length, device=self.weight.device).unsqueeze(1)
        key = torch.arange(keys, device=self.weight.device)
        return super().forward(self.buckets(key - query)).permute(2, 0, 1).unsqueeze(0)

    def buckets(self, ahead: Tensor) -> Tensor:
        """The rows of the table for relative positions `ahead`: key position minus query position."""
        one_way, first = self.num_embeddings, torch.zeros_like(ahead)
        if self.bidirectional:
            one_way //= 2
            first = torch.where(ahead > 0, one_way, 0)
            distance = ahead.abs()
        else:
            distance = (-ahead).clamp_min(0)
        exact = one_way // 2
        # in float32 and in this order, as in the released models: if the logarithm is an integer, rounding decides
        octaves = torch.log(distance.clamp_min(1).float() / exact) / math.log(self.max_distance / exact)
        shared = (exact + (octaves * (one_way - exact)).long()).clamp_max(one_way - 1)
        return first + torch.where(distance < exact, distance, shared)

    def extra_repr(self) -> str:
        """The settings that repr shows."""
        shape = f"num_heads={self.embedding_dim}, num_buckets={self.num_embeddings}"
        return f"{shape}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"
