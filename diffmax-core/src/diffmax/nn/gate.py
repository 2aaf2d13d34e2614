"""Head gates: a factor per head and token on the output of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffmax.nn._shapes import check_heads
from diffmax.operators.common.capture import captured, is_captured


class HeadGate(nn.Module):
    """Each head's output times 2 sigmoid(W x + b), a factor in (0, 2) computed from the token of the query.

    So a head can output about 0, or more than a weighted mean. Effectively the weights of a row no longer sum to 1, which
    removes the cause of attention sinks and of outliers in the activations. W and b start at 0, where every factor is 1.

    Args:
        embed_dim: Size of the tokens x.
        heads: H.
        bias: Whether to add b.
        device, dtype: Device and dtype of the parameters.
    Source: "Systematic Outliers in Large Language Models" (An et al., 2025), its context-aware scale; "Gated Attention" (Qiu et
        al., 2025). Written for diffmax.
    Example:
        >>> gate, out, x = HeadGate(16, 4), torch.randn(2, 4, 5, 8), torch.randn(2, 5, 16)
        >>> torch.equal(gate(out, x), out)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(embed_dim, heads, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset all factors to 1, for example after `to_empty`."""
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """The gated output (B, H, L, D) of an attention whose queries come from tokens x (B, L, embed_dim)."""
        if is_captured(out, x):
            return captured(self, out, x)  # type: ignore[no-any-return]
        check_heads("HeadGate", out, self.project.out_features, "out")
        return out * (2 * torch.sigmoid(self.project(x))).transpose(1, 2).unsqueeze(3).to(out.dtype)
