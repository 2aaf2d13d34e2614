"""Lazy attention as a module, on `diffmax.lazy_attention`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffmax.maps import AlphaMap
from diffmax.nn._alpha import HeadAlpha, shown_weights
from diffmax.nn.power import _check_rope, _check_sizes, _rotated
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import _readable, check_flag, check_tensor, is_whole
from diffmax.operators.threshold.checks import check_alpha_of
from diffmax.operators.threshold.members import lazy_attention

_NAME = "LazyAttention"


class LazyAttention(HeadAlpha):
    """Multi-head lazy attention: rotary positions, a learned bias by distance, and relu(softmax + tau / n) as weights.

    Parameters are named as published: `attention_biases` (H, window_size + 1), from 0, and `tau` (H,), from -1, both kept in
    float32 in a module of 16 bits; `q_proj`, `k_proj`, `v_proj` and `o_proj`, without biases.

    Args:
        dim: Size of a token.
        num_heads: H, which divides dim.
        window_size: The largest distance that has a bias.
        rope_base: Base of the rotary positions, of which a head's halves are rotated with each other; None for none.
        num_kv_heads: Heads of keys and values, which divide H; None: H.
        weights, first_row: As for `diffmax.lazy_attention`.
        alpha: Of diffmax weights, as for `diffmax.lazy_attention`; or an nn.Parameter () or (H,).
        alpha_map: A `HillMap`, `TanhMap` or `ExpMap`. With it alpha is learned: one parameter, `log_beta` (H,), starts at
            `alpha`. It must get no weight decay: use `diffmax.nn.param_groups`.
        is_causal: Whether a token sees those up to itself alone.
        device, dtype: Of the parameters.
        backend: As for `diffmax.lazy_attention`.
    Raises:
        TypeError, ValueError: Sizes do not match, or a number has the wrong type or is out of range.
    Source: arXiv 2601.00919; docs/lazy.md. Written for diffmax.
    Example:
        >>> import torch
        >>> attend, x = LazyAttention(32, 4, window_size=8), torch.randn(2, 10, 32)
        >>> start, past = attend(x[:, :9], return_past=True)
        >>> step, past = attend(x[:, 9:], past=past, return_past=True)
        >>> torch.allclose(torch.cat([start, step], 1), attend(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 512,
        rope_base: float | None = 10000.0,
        *,
        num_kv_heads: int | None = None,
        weights: Literal["softmax", "diffmax"] = "softmax",
        alpha: float | Tensor | None = None,
        alpha_map: AlphaMap | None = None,
        first_row: Literal["kept", "published"] = "kept",
        is_causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = _check_sizes(dim, num_heads, num_kv_heads, None, name=_NAME, of="dim")
        for what, given, known in (
            ("weights", weights, ("softmax", "diffmax")),
            ("first_row", first_row, ("kept", "published")),
        ):
            if given not in known:
                raise ValueError(f"{_NAME}: {what} must be one of {', '.join(known)}, got {given!r}")
        if alpha_map is not None and weights != "diffmax":
            raise ValueError(f'{_NAME}: weights must be "diffmax" with alpha_map, got {weights!r}')
        check_alpha_of(_NAME, weights, alpha)
        self._set_alpha(0.9 if alpha is None else alpha, alpha_map, num_heads, device, dtype)
        if not is_whole(window_size) or window_size < 0:
            raise ValueError(f"{_NAME}: window_size must be an int that is not negative, got {window_size!r}")
        self.rope_base = _check_rope(rope_base, self.head_dim, name=_NAME)
        self.dim, self.num_heads, self.num_kv_heads, self.window_size = dim, num_heads, num_kv_heads, window_size
        self.weights, self.first_row, self.backend = weights, first_row, backend
        self.is_causal = check_flag(_NAME, "is_causal", is_causal)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        self.attention_biases = nn.Parameter(torch.empty(num_heads, window_size + 1, device=device, dtype=kept))
        self.tau = nn.Parameter(torch.empty(num_heads, device=device, dtype=kept))
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=False, **factory)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False, **factory)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False, **factory)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False, **factory)
        self._start()

    def _start(self) -> None:
        nn.init.zeros_(self.attention_biases)
        nn.init.constant_(self.tau, -1.0)

    def reset_parameters(self) -> None:
        """Initialize again: projections as nn.Linear, biases at 0, tau at -1, alpha as given."""
        super().reset_parameters()
        self._start()
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert as any module, but keep the biases and tau in float32 at least: .half() rounds them not."""
        exact = {name: getattr(self, name).detach() for name in ("attention_biases", "tau")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            now = getattr(self, name)
            if now.dtype.itemsize < 4:
                now.data = before.to(now.device) if before.device.type != "meta" else now.data.float()
        return self

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        past: tuple[Tensor, Tensor] | None = None,
        return_past: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attention among tokens, and to those before.

        Args:
            x: (B, L, dim).
            mask: Where a key is seen, 1 or True, else 0 or False: (B, S) for padding, (B, L, S) or (1, L, S), or what
                broadcasts to (B, H, L, S); S counts the past. A token that sees nothing has 0 before `o_proj`.
            past: Keys, rotated, and values (B, H_kv, P, D) of the tokens before, which another call returned.
            return_past: Whether to return those after the last token too.
        Returns:
            (B, L, dim), and the past, if requested.
        Raises:
            TypeError, ValueError: Shapes do not match.
        """
        if is_captured(x, mask):
            return captured(self, x, mask, past=past, return_past=return_past)  # type: ignore[no-any-return]
        check_tensor(_NAME, "x", x)
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"{_NAME}: x must have shape (B, L, {self.dim}), got {tuple(x.shape)}")
        start = 0 if past is None else self._check_past(past, x)
        query, key, value = (self._heads(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_base is not None:
            query, key = _rotated(query, start, self.rope_base), _rotated(key, start, self.rope_base)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        out = lazy_attention(
            query, key, value, self.attention_biases, self.tau, weights=self.weights, is_causal=self.is_causal,
            alpha=self._alpha_for(query) if self.weights == "diffmax" else None, first_row=self.first_row,
            attn_mask=None if mask is None else self._seen(mask, x, key.shape[2]), backend=self.backend,
        )  # fmt: skip
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return (result, (key, value)) if return_past else result

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        projected: Tensor = projection(x)
        return projected.view(*x.shape[:2], projection.out_features // self.head_dim, self.head_dim).transpose(1, 2)

    def _check_past(self, past: Any, x: Tensor) -> int:
        """How many tokens the past holds."""
        pair: list[Any] = list(past) if isinstance(past, (tuple, list)) and len(past) == 2 else []
        if not pair or not all(isinstance(t, Tensor) and t.ndim == 4 for t in pair) or not self._continues(pair[0], pair[1], x):
            got = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in pair] or type(past).__name__
            raise ValueError(
                f"{_NAME}: past must be keys and values of shape (B, H_kv, P, D) = "
                f"({x.shape[0]}, {self.num_kv_heads}, P, {self.head_dim}), got {got}\n"
                "pass what an earlier call with return_past=True returned"
            )
        length: int = pair[0].shape[2]  # not converted: a traced or exported call has another past
        return length

    def _continues(self, keys: Tensor, values: Tensor, x: Tensor) -> bool:
        """Whether keys and values have the sizes of this module's, compared one by one: torch.compile cannot compare tuples."""
        for t in (keys, values):
            if t.shape[0] != x.shape[0] or t.shape[1] != self.num_kv_heads or t.shape[3] != self.head_dim:
                return False
        return keys.shape[2] == values.shape[2]

    def _seen(self, mask: Tensor, x: Tensor, many: int) -> Tensor:
        """The mask as boolean (B or 1, H or 1, L or 1, S)."""
        if not isinstance(mask, Tensor):
            raise TypeError(f"{_NAME}: mask must be a tensor, got {type(mask).__name__}")
        if mask.ndim == 2 and tuple(mask.shape) != (x.shape[0], many):
            raise ValueError(
                f"{_NAME}: a mask of two dimensions must be (B, S) = {(x.shape[0], many)}, got {tuple(mask.shape)}\n"
                "for one of queries and keys, pass mask.unsqueeze(0)"
            )
        if mask.is_floating_point() and mask.ndim > 2:
            raise TypeError(
                f"{_NAME}: mask must be boolean, or of ints, where it says what each query sees, got {mask.dtype}\n"
                "of one that is added to scores pass mask == 0, of one that is 1 where a key is seen pass mask.bool()"
            )
        if mask.dtype != torch.bool and _readable(mask) and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"{_NAME}: mask must be 1 or True where a key is seen and 0 or False elsewhere, got other values")
        seen = mask.bool()
        return seen[:, None, None] if seen.ndim == 2 else seen.unsqueeze(1) if seen.ndim == 3 else seen

    def extra_repr(self) -> str:
        """What `print` shows."""
        sizes = f"{self.dim}, {self.num_heads}, window_size={self.window_size}, rope_base={self.rope_base}"
        return f"{sizes}, {shown_weights(self)}"
