"""Multi-head power attention as a module, on `diffmax.power_attention`."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from diffmax.nn._alpha import check_alpha_of_heads
from diffmax.nn._checkpoint import AlphaFromSoftmax
from diffmax.operators.attention.api import attention
from diffmax.operators.common.autocast import without_autocast
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_tensor, is_whole
from diffmax.operators.power.api import power_attention
from diffmax.operators.power.checks import check_chunk, check_degree
from diffmax.operators.power.state import PowerState

_NAME = "PowerAttention"
GATE_BIAS = 6.906768
"""Where a gate starts: sigmoid(6.906768) = 0.999."""


class PowerAttentionState(NamedTuple):
    """What `PowerAttention` returns with return_state=True, for the call with the tokens that follow.

    Attributes:
        state: The `diffmax.PowerState` after the last token.
        length: Number of tokens so far: the position of the next one.
    """

    state: PowerState
    length: int


class _GateProjection(nn.Linear):
    """Starts with weights of 0, where every gate is 0.999."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, GATE_BIAS)


class PowerAttention(AlphaFromSoftmax):
    """Causal multi-head power attention, with learned gates and rotary positions: linear time, and constant memory to generate.

    The projections are `q_proj`, `k_proj`, `v_proj` and `out_proj`; of the gates `gate_proj` (embed_dim to H_kv): a token's log
    gate is logsigmoid(gate_proj(x)), in float32. Tokens are batch first.

    Args:
        embed_dim: Size of the tokens.
        num_heads: H.
        num_kv_heads: H_kv, which divides H (grouped query heads). Default: H.
        degree: p, even.
        head_dim: D. Default: embed_dim / H.
        bias: Whether q_proj, k_proj, v_proj and out_proj have a bias.
        gate: Whether there are gates. They start at 0.999.
        rope_base: Base of the rotary positions of queries and keys (the first half of a head is rotated with the second), or
            None for no positions.
        interpolate: t in [0, 1]: the output is (1 - t) times that of softmax or diffmax attention plus t times that of power
            attention, with the same projections. It may be set while training: 0 is a Transformer, 1 power attention alone.
        alpha: Of the attention to blend with: a float, or a tensor () or (H,), which becomes a buffer, or stays a parameter.
            None: softmax.
        chunk_size: As for `diffmax.power_attention`.
        device, dtype: Device and dtype of the parameters.
        backend: As for `diffmax.power_attention`.
    Raises:
        TypeError, ValueError: Sizes do not match, or a number has the wrong type or is out of range.
    Source: the model of Buckman, Gelada and Zhang, "Scaling Context Requires Rethinking Attention", 2025 (arXiv 2507.04239),
        with its initial gate. Written for diffmax.
    Example:
        >>> import torch
        >>> attend, x = PowerAttention(32, 4, num_kv_heads=2), torch.randn(2, 10, 32)
        >>> prompt, state = attend(x[:, :9], return_state=True)
        >>> step, state = attend(x[:, 9:], state, return_state=True)
        >>> torch.allclose(torch.cat([prompt, step], 1), attend(x), atol=1e-5), state.length
        (True, 10)
    """

    alpha: float | Tensor | None
    _interpolate: float

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        degree: int = 2,
        head_dim: int | None = None,
        bias: bool = True,
        gate: bool = True,
        rope_base: float | None = 10000.0,
        interpolate: float = 1.0,
        alpha: float | Tensor | None = None,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = _check_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.degree = check_degree(_NAME, degree)
        check_chunk(_NAME, chunk_size)
        self.rope_base = _check_rope(rope_base, self.head_dim)
        if alpha is not None:
            check_alpha_of_heads(_NAME, alpha, num_heads)
        self.chunk_size, self.backend = chunk_size, backend
        self.interpolate = interpolate
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias, **factory)
        self.gate_proj = _GateProjection(embed_dim, num_kv_heads, **factory) if gate else None
        if alpha is None:  # no buffer, so that it may be set to a float
            self.alpha = None
        else:
            if isinstance(alpha, Tensor) and not isinstance(alpha, nn.Parameter):
                alpha = alpha.to(device)
            self._store("alpha", alpha)

    def reset_parameters(self) -> None:
        """Initialize again, for example after `to_empty`: projections as nn.Linear, gates at 0.999, alpha as given."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]
        super().reset_parameters()

    @property
    def interpolate(self) -> float:
        """The share of power attention in the output."""
        return self._interpolate

    @interpolate.setter
    def interpolate(self, share: float) -> None:
        if not isinstance(share, numbers.Real) or isinstance(share, bool):
            raise TypeError(f"{_NAME}: interpolate must be a float, got {share!r} of type {type(share).__name__}")
        if not 0 <= float(share) <= 1:
            raise ValueError(f"{_NAME}: interpolate must lie in [0, 1], got {share}\n1 is power attention alone")
        self._interpolate = float(share)

    @overload
    def forward(
        self,
        x: Tensor,
        state: PowerAttentionState | None = None,
        return_state: Literal[False] = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: PowerAttentionState | None = None,
        *,
        return_state: Literal[True],
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, PowerAttentionState]: ...

    def forward(
        self,
        x: Tensor,
        state: PowerAttentionState | None = None,
        return_state: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, PowerAttentionState]:
        """Attention among tokens, and to all that came before in `state`.

        Args:
            x: (B, L, embed_dim).
            state: What another call returned, for the tokens before; None at the start.
            return_state: Whether to return the state after the last token too. How tokens are divided among calls changes
                rounding alone.
            key_padding_mask: Boolean (B, L), True at padding: such a token adds nothing to the state and does not let it fade.
        Returns:
            (B, L, embed_dim), and the state, if requested. Outputs at padding mean nothing.
        Raises:
            TypeError, ValueError: Shapes do not match, or a state is used with interpolate below 1, which needs all keys.
        """
        if is_captured(x, key_padding_mask):
            given = {"return_state": return_state, "key_padding_mask": key_padding_mask}
            return captured(self, x, state, **given)  # type: ignore[no-any-return]
        self._check(x, state, return_state, key_padding_mask)
        start = 0 if state is None else state.length
        query, key, value = (self._heads(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_base is not None:
            query, key = _rotated(query, start, self.rope_base), _rotated(key, start, self.rope_base)
        padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(1)
        if padding is not None:  # values too: 0 times NaN would be NaN
            key, value = (t.masked_fill(padding.unsqueeze(3), 0.0) for t in (key, value))
        share, out, after = self.interpolate, None, None
        if share > 0:
            gates = self._log_gates(x)
            if padding is not None:
                gates = None if gates is None else gates.masked_fill(padding, 0.0)
            settings: dict[str, Any] = {"degree": self.degree, "chunk_size": self.chunk_size, "backend": self.backend}
            before = None if state is None else state.state
            if return_state:
                out, after = power_attention(query, key, value, gates, before, return_final_state=True, **settings)
            else:
                out = power_attention(query, key, value, gates, before, **settings)
        if share < 1:
            other = self._other(query, key, value, padding)
            out = other if out is None else other + share * (out - other)
        assert out is not None  # noqa: S101  # a share is above 0 or below 1
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result if after is None else (result, PowerAttentionState(after, start + x.shape[1]))

    def _check(self, x: Tensor, state: Any, return_state: bool, mask: Any) -> None:
        check_tensor(_NAME, "x", x)
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"{_NAME}: x must have shape (B, L, {self.embed_dim}), got {tuple(x.shape)}")
        if state is not None and not isinstance(state, PowerAttentionState):
            raise TypeError(
                f"{_NAME}: state must be a PowerAttentionState, got {type(state).__name__}\n"
                "pass what a call with return_state=True returned"
            )
        if self.interpolate < 1 and (state is not None or return_state):
            raise ValueError(
                f"{_NAME}: interpolate must be 1 for a call with a state, got {self.interpolate}\n"
                "the attention that it blends with needs all keys: pass the whole sequence at once"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{_NAME}: key_padding_mask must be boolean (B, L) = {tuple(x.shape[:2])}, got {got}")

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        projected: Tensor = projection(x)
        return projected.view(*x.shape[:2], projection.out_features // self.head_dim, self.head_dim).transpose(1, 2)

    def _log_gates(self, x: Tensor) -> Tensor | None:
        """(B, H_kv, L), in float32 or float64, whatever autocast says: 1 - 0.999 has few digits in 16 bits."""
        if self.gate_proj is None:
            return None
        wide = torch.promote_types(torch.promote_types(x.dtype, self.gate_proj.weight.dtype), torch.float32)
        with without_autocast(x):
            weight, bias = self.gate_proj.weight.to(wide), self.gate_proj.bias.to(wide)
            gates: Tensor = nn.functional.logsigmoid(nn.functional.linear(x.to(wide), weight, bias))
        return gates.transpose(1, 2)

    def _other(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        """The attention to blend with."""
        mask = None
        if padding is not None:  # padding sees itself, which is better than nothing: softmax would be NaN
            place = torch.arange(query.shape[2], device=query.device)
            mask = (place <= place.unsqueeze(1)) & (~padding.unsqueeze(2) | (place == place.unsqueeze(1)))
        if self.alpha is None:  # torch 2.4 has no enable_gqa
            key, value = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (key, value))
            return nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
        grouped = self.num_heads != self.num_kv_heads
        out: Tensor = attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped, alpha=self.alpha)
        return out

    def extra_repr(self) -> str:
        """The settings that repr shows."""
        sizes = f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, degree={self.degree}"
        return f"{sizes}, gate={self.gate_proj is not None}, rope_base={self.rope_base}, interpolate={self.interpolate}"


def _rotated(t: Tensor, start: int, base: float) -> Tensor:
    """Rotary positions from `start` on; the two halves of a head are rotated with each other. Angles in float32 at least."""
    half, acc = t.shape[3] // 2, torch.promote_types(t.dtype, torch.float32)
    rates = base ** -(torch.arange(half, device=t.device, dtype=acc) / half)
    angles = torch.arange(start, start + t.shape[2], device=t.device, dtype=acc).unsqueeze(1) * rates
    cos, sin = angles.cos(), angles.sin()
    first, second = t[..., :half].to(acc), t[..., half:].to(acc)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], 3).to(t.dtype)


def _check_sizes(embed_dim: Any, heads: Any, kv_heads: Any, head_dim: Any, name: str = _NAME, of: str = "embed_dim") -> int:
    """Check the sizes; return D. of: the name of the first, without which a module has no head_dim."""
    given = {of: embed_dim, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    for what, number in given.items():
        if what == "head_dim" and number is None:
            continue
        if not is_whole(number):
            raise TypeError(f"{name}: {what} must be an int, got {number!r} of type {type(number).__name__}")
        if number < 1:
            raise ValueError(f"{name}: {what} must be at least 1, got {number}")
    if head_dim is None and embed_dim % heads:
        raise ValueError(
            f"{name}: {of} must be a multiple of num_heads, got {embed_dim} and {heads}\n"
            f"take another number of heads{', or pass head_dim' if of == 'embed_dim' else ''}"
        )
    if heads % kv_heads:
        raise ValueError(f"{name}: num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}")
    return int(embed_dim // heads if head_dim is None else head_dim)


def _check_rope(base: Any, head_dim: int, name: str = _NAME) -> float | None:
    if base is None:
        return None
    if not isinstance(base, numbers.Real) or isinstance(base, bool):
        raise TypeError(f"{name}: rope_base must be a float or None, got {base!r} of type {type(base).__name__}")
    if not 0 < float(base) < math.inf:
        raise ValueError(f"{name}: rope_base must be positive and finite, got {base}")
    if head_dim % 2:
        raise ValueError(f"{name}: head_dim must be even for rotary positions, got {head_dim}\npass rope_base=None for none")
    return float(base)
