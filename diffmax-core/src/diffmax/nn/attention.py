"""Multi-head attention as a module, on `diffmax.attention`."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffmax._attention import attention
from diffmax._attention_checks import check_mask
from diffmax._capture import captured, is_captured
from diffmax._checks import one_minus_alpha
from diffmax._numerics import accumulation_dtype
from diffmax.maps import AlphaMap
from diffmax.nn._precision import PreciseBuffers
from diffmax.nn.gate import HeadGate
from diffmax.nn.length import LengthScale

_NAME = "DiffmaxAttention"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class DiffmaxAttention(PreciseBuffers):
    """Multi-head attention with diffmax weights: torch.nn.MultiheadAttention, and an alpha per head, fixed or learned.

    Tokens come batch first, and only the output is returned. Its layers are `q_proj`, `k_proj`, `v_proj` and `out_proj`. A
    state dict of torch.nn.MultiheadAttention loads too: `in_proj_weight` and `in_proj_bias` are split, and what that module
    does not have (alphas, sinks, gates) stays as it is. Its `add_zero_attn`, a key and a value that are 0, does not show in the
    state dict: make this module with `sink="null"` then, which is the same.

    Args:
        embed_dim: Size of the query's tokens and of the output.
        num_heads: H.
        num_kv_heads: H_kv, of which H is a multiple: grouped query heads. Default: H.
        alpha: As for `diffmax.attention`. A tensor () or (H,) becomes a buffer, which keeps its dtype where the module becomes
            float16 or bfloat16; an nn.Parameter becomes a parameter of the module.
        alpha_map: A `HillMap`, `TanhMap` or `ExpMap`. With it alpha is learned: one trainable parameter, `log_beta` (H,),
            with which every head starts at `alpha`.
        kdim, vdim: Sizes of key and value tokens. Default: embed_dim.
        head_dim: D. Default: embed_dim / H.
        bias: Whether the projections have one.
        dropout: On the weights, in training.
        window_size: As for `diffmax.attention`.
        sink: "null": a score of 0 that takes weight and has no value. "learned": one score per head, in the parameter `sink`
            (H,), which starts at 0. See `Sink`.
        head_gate: Whether a `HeadGate` follows the attention, at first with all factors 1.
        length_scale: Whether a `LengthScale` goes before it.
        backend: As for `diffmax.attention`.
    Raises:
        TypeError, ValueError: Numbers do not fit each other, alpha is out of range, or an option is unknown.
    Source: written for diffmax.
    Example:
        >>> from diffmax import HillMap
        >>> attend = DiffmaxAttention(32, 4, num_kv_heads=2, alpha=0.85, alpha_map=HillMap(c=0.5))
        >>> attend(torch.randn(2, 10, 32), is_causal=True).shape
        torch.Size([2, 10, 32])
        >>> attend.log_beta.shape, attend.current_alpha.shape
        (torch.Size([4]), torch.Size([4]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        alpha: float | Tensor = 0.9,
        alpha_map: AlphaMap | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        window_size: tuple[int, int] | None = None,
        sink: Literal["null", "learned"] | None = None,
        head_gate: bool = False,
        length_scale: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"{_NAME}: dropout must satisfy 0 <= dropout < 1, got {dropout}")
        if sink not in (None, "null", "learned"):
            raise ValueError(f'{_NAME}: sink must be None, "null" or "learned", got {sink!r}')
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.dropout, self.window_size, self.backend = dropout, window_size, backend
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(kdim or embed_dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(vdim or embed_dim, num_kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias)
        self._set_alpha(alpha, alpha_map)
        self.sink = nn.Parameter(torch.zeros(num_heads)) if sink == "learned" else None
        self.null_sink = sink == "null"
        self.gate = HeadGate(embed_dim, num_heads) if head_gate else None
        self.length_scale = LengthScale(num_heads) if length_scale else None

    def _set_alpha(self, alpha: float | Tensor, alpha_map: AlphaMap | None) -> None:
        self.alpha_map = alpha_map
        if alpha_map is not None and not isinstance(alpha_map, AlphaMap):
            raise TypeError(f"{_NAME}: alpha_map must be a HillMap, TanhMap or ExpMap, got {alpha_map!r}")
        if isinstance(alpha, Tensor):
            if alpha.shape not in ((), (self.num_heads,)):
                raise ValueError(
                    f"{_NAME}: a tensor alpha must have shape () or ({self.num_heads},), got {tuple(alpha.shape)}\n"
                    f"the module has {self.num_heads} query heads"
                )
        else:
            one_minus_alpha(_NAME, torch.empty(1), alpha, 0)
        if alpha_map is not None:
            if isinstance(alpha, Tensor):
                start = alpha_map.inverse(alpha.detach().double()).log()
            else:
                start = torch.tensor(math.log(alpha_map.inverse(float(alpha))))
            self.log_beta = nn.Parameter(start.float().expand(self.num_heads).clone())
        elif isinstance(alpha, Tensor) and not isinstance(alpha, nn.Parameter):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha

    @property
    def current_alpha(self) -> float | Tensor:
        """The alpha that the next call uses: a float, or a tensor that leads back to what is learned."""
        if self.alpha_map is None:
            return self.alpha
        return 1 - self.alpha_map.one_minus_alpha_of_log(self.log_beta)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str = "upper_left",
    ) -> Tensor:
        """Attend, from tokens to tokens.

        Args:
            query: (B, L, embed_dim).
            key: (B, S, kdim). Default: query.
            value: (B, S, vdim). Default: key.
            key_padding_mask: Boolean (B, S), True at padding, which is not seen: as in torch.nn.MultiheadAttention.
            need_weights: False: there are no weights to return.
            attn_mask, is_causal, causal_alignment: As for `diffmax.attention`, and broadcast as there: True marks what is seen,
                the opposite of torch.nn.MultiheadAttention's; floating numbers are added. All masks hold together.
        Returns:
            (B, L, embed_dim).
        Raises:
            ValueError: Shapes do not fit, or need_weights is True.
            TypeError: key_padding_mask is not boolean.
        """
        if is_captured(query, key, value, key_padding_mask, attn_mask):
            masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
            options = {"need_weights": need_weights, "causal_alignment": causal_alignment}
            return captured(self, query, key, value, **masks, **options)  # type: ignore[no-any-return]
        if need_weights:
            raise ValueError(
                f"{_NAME}: need_weights must be False, got True\n"
                "the weights are never in memory at once: compute them with diffmax.diffmax_bisect(scores, alpha), or look at "
                "diffmax.attention(..., return_stats=True)"
            )
        key = query if key is None else key
        value = key if value is None else value
        given = {"query": (query, self.q_proj), "key": (key, self.k_proj), "value": (value, self.v_proj)}
        for what, (tokens, projection) in given.items():
            if tokens.ndim != 3 or tokens.shape[2] != projection.in_features:
                raise ValueError(
                    f"{_NAME}: {what} must have shape (B, tokens, {projection.in_features}), got {tuple(tokens.shape)}"
                )
        q, k, v = (self._heads(projection, tokens) for tokens, projection in given.values())
        mask = _both(attn_mask, key_padding_mask, k)
        if self.length_scale is not None:
            mask = mask if mask is None or hasattr(mask, "variant") else check_mask(_NAME, q, k, mask)
            q = self.length_scale(q, k.shape[2], is_causal, causal_alignment, self.window_size, mask)
        out = attention(
            q,
            k,
            v,
            mask,
            self.dropout if self.training else 0.0,
            is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
            alpha=self._alpha_for(q),
            window_size=self.window_size,
            causal_alignment=causal_alignment,
            sink=q.new_zeros(self.num_heads) if self.null_sink else self.sink,
            backend=self.backend,
        )
        if self.gate is not None:
            out = self.gate(out, query)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result

    def _heads(self, projection: nn.Linear, tokens: Tensor) -> Tensor:
        # no unflatten, of which the older ONNX exporter makes a constant shape
        heads = projection.out_features // self.head_dim
        projected: Tensor = projection(tokens)
        return projected.reshape(*tokens.shape[:2], heads, self.head_dim).transpose(1, 2)

    def _alpha_for(self, q: Tensor) -> float | Tensor:
        if self.alpha_map is None:
            return self.alpha
        # not in half precision, also where the module is: the digits of 1 - alpha are what counts
        dtype = torch.promote_types(self.log_beta.dtype, accumulation_dtype(q.dtype))
        return 1 - self.alpha_map.one_minus_alpha_of_log(self.log_beta.to(dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also from the names of torch.nn.MultiheadAttention."""
        found = {name: state_dict[prefix + name] for name in _OF_TORCH if prefix + name in state_dict}
        if found and not any(prefix + f"{name}.weight" in state_dict for name in _PROJECTIONS):
            for name in found:
                del state_dict[prefix + name]
            for name, tensor in _split(found).items():
                state_dict[prefix + name] = tensor
            for name, tensor in self.state_dict().items():
                if not name.startswith((*_PROJECTIONS, "out_proj")):
                    state_dict.setdefault(prefix + name, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        alpha = f"alpha_map={self.alpha_map}" if self.alpha_map is not None else f"alpha={self.alpha}"
        return f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, {alpha}"


_OF_TORCH = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _split(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights and biases per projection; equal thirds of what torch keeps in one."""
    result = {name.replace("_weight", ".weight"): tensor for name, tensor in found.items() if name[0] != "i"}
    for kind in ("weight", "bias"):
        if f"in_proj_{kind}" in found:
            parts = found[f"in_proj_{kind}"].chunk(3)
            result |= {f"{name}.{kind}": part for name, part in zip(_PROJECTIONS, parts, strict=True)}
    return result


def _check_sizes(embed_dim: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    if heads < 1 or (head_dim is None and embed_dim % heads):
        raise ValueError(
            f"{_NAME}: embed_dim must be a multiple of num_heads, got {embed_dim} and {heads}\n"
            "take another number of heads, or pass head_dim"
        )
    if (embed_dim if head_dim is None else head_dim) < 1:
        raise ValueError(f"{_NAME}: embed_dim and head_dim must be at least 1, got {embed_dim} and {head_dim}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{_NAME}: num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}")


def _both(attn_mask: Tensor | None, key_padding_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """One boolean mask that says what both say."""
    if key_padding_mask is None:
        return attn_mask
    wanted = (key.shape[0], key.shape[2])
    if key_padding_mask.dtype != torch.bool:
        raise TypeError(
            f"{_NAME}: key_padding_mask must be boolean, True at padding, got {key_padding_mask.dtype}\n"
            "of a tokenizer's attention_mask it is attention_mask == 0"
        )
    if key_padding_mask.shape != wanted:
        raise ValueError(f"{_NAME}: key_padding_mask must have shape (B, S) = {wanted}, got {tuple(key_padding_mask.shape)}")
    seen = ~key_padding_mask[:, None, None, :]
    if attn_mask is None:
        return seen
    if hasattr(attn_mask, "variant"):  # torch's CausalBias, which must not be looked into
        raise ValueError(f"{_NAME}: a CausalBias and key_padding_mask exclude each other\npass is_causal=True instead")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(
            f"{_NAME}: attn_mask must be boolean or floating, got {attn_mask.dtype}\n"
            "a boolean mask is True where a key is seen; a floating one is added to the scores"
        )
    return attn_mask & seen if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~seen, -torch.inf)
