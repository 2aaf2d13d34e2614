"""Affine-scaled attention: weights with a scale and an offset per token and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffmax.nn._precision import PreciseBuffers
from diffmax.nn._shapes import check_heads
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.numerics import accumulation_dtype


class AffineScale(PreciseBuffers):
    """out = [a P + (m - a) / N] V, from the output P V alone: a * (P V) + (m - a) * mean of the visible values.

    a = clamp(0.1 (W x + b) + 0.5, 0, 1) per token and head, m is the moving average of a over training batches, and N is the
    number of keys visible to the query. Rows then sum to m, and weights may be negative. The second term makes the weights
    dense: with `offset=False` it is omitted, and sparse weights stay sparse.

    Args:
        embed_dim: Size of the tokens x.
        heads: H.
        offset: Whether to add the second term.
        momentum: Share of the old m in the new one, in [0, 1); m starts at 0, in the buffer `average` (H,), which keeps its
            dtype in a module of 16 bits. A batch without tokens, or with NaN, leaves it as it is; so does the second forward of
            gradient checkpointing, which reads m as it is then: call the module once between a backward and the next, and
            compile what is checkpointed as a whole or not at all.
    Raises:
        ValueError: momentum is out of range, shapes do not match, or a mask and is_causal are both given.
        TypeError: attn_mask is not boolean.
    Numerics: the mean of the values is computed in float32, for float64 in float64.
    Source: Affine-Scaled Attention (arXiv:2602.23057), with N the number of visible keys instead of all keys: otherwise masked
        keys would contribute. Written for diffmax.
    Example:
        >>> scale, x = AffineScale(16, 4), torch.randn(2, 5, 16)
        >>> out, value = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
        >>> scale(out, value, x, is_causal=True).shape
        torch.Size([2, 4, 5, 8])
    """

    average: Tensor

    def __init__(self, embed_dim: int, heads: int, offset: bool = True, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"AffineScale: momentum must satisfy 0 <= momentum < 1, got {momentum}")
        self.project, self.offset, self.momentum = nn.Linear(embed_dim, heads), offset, momentum
        self.register_buffer("average", torch.zeros(heads))

    def reset_parameters(self) -> None:
        """Initialize W, b and m again, for example after `to_empty`."""
        self.project.reset_parameters()
        nn.init.zeros_(self.average)

    def forward(
        self, out: Tensor, value: Tensor, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The scaled output of an attention (B, H, L, D) over values (B, H_kv, S, D), with queries from tokens x (B, L, E).

        attn_mask is boolean, True where a key is visible; is_causal is aligned at the upper left, as in `diffmax.attention`.
        """
        if is_captured(out, value, x, attn_mask):
            return captured(self, out, value, x, attn_mask, is_causal)  # type: ignore[no-any-return]
        check_heads("AffineScale", out, self.project.out_features, "out")
        a = (0.1 * self.project(x) + 0.5).clamp(0, 1).transpose(1, 2)
        if self.training and not _runs_again():
            with torch.no_grad():
                found = a.to(self.average.dtype).mean((0, 2))
                self.average.copy_(self.average.lerp(found, 1 - self.momentum).where(found.isfinite(), self.average))
        scaled: Tensor = out * a.unsqueeze(3).to(out.dtype)
        if not self.offset:
            return scaled
        shift: Tensor = (self.average.unsqueeze(1) - a).unsqueeze(3).to(out.dtype)
        value = value.repeat_interleave(out.shape[1] // value.shape[1], dim=1)
        return scaled + (shift * _mean_of_visible(value, out.shape[2], attn_mask, is_causal)).to(out.dtype)


def _runs_again() -> bool:
    """Whether this is the second forward of gradient checkpointing, which runs in the backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _mean_of_visible(value: Tensor, queries: int, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Mean of the visible values per query, (B, H, L, D) or with L = 1; 0 for a fully masked query."""
    value = value.to(accumulation_dtype(value.dtype))  # a sum of values may overflow float16
    if attn_mask is not None:
        if is_causal:
            raise ValueError("AffineScale: attn_mask and is_causal=True exclude each other\npass one mask that holds both")
        if attn_mask.dtype != torch.bool:
            raise TypeError(
                f"AffineScale: attn_mask must be boolean, True where a key is seen, got {attn_mask.dtype}\n"
                "of a mask that is added to the scores it is attn_mask != -torch.inf"
            )
        visible = attn_mask.to(value.dtype)
        return (visible @ value) / visible.sum(-1, keepdim=True).clamp_min(1)
    if not is_causal:
        return value.mean(2, keepdim=True)
    last = torch.arange(queries, device=value.device).clamp_max(value.shape[2] - 1)
    return value.cumsum(2)[:, :, last] / (last + 1).to(value.dtype).unsqueeze(1)
