"""Multi-head attention as a module, on `diffmax.attention`."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from diffmax.maps import AlphaMap
from diffmax.nn._alpha import HeadAlpha
from diffmax.nn._multihead import SeparateProjections, merge_masks, with_weights
from diffmax.nn.adaptive import AdaptiveLengthScale
from diffmax.nn.gate import HeadGate
from diffmax.nn.length import LengthScale
from diffmax.operators.attention.api import attention
from diffmax.operators.attention.call import Options, build_call
from diffmax.operators.attention.checks import check_mask
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_tensor

_NAME = "DiffmaxAttention"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class DiffmaxAttention(HeadAlpha):
    """Multi-head attention with diffmax weights: torch.nn.MultiheadAttention with an alpha per head, fixed or learned.

    Called with query, key and value it behaves like that module: same masks, and a pair as result. So it also works inside
    torch's TransformerEncoderLayer, TransformerDecoderLayer and Transformer. Called without value, masks are those of
    `diffmax.attention`, and only the tokens are returned: see `forward`. Tokens are batch first, unless batch_first=False.

    The projections are `q_proj`, `k_proj`, `v_proj` and `out_proj`. A state dict of torch.nn.MultiheadAttention loads too:
    `in_proj_weight` and `in_proj_bias` are split, and parameters that it lacks (alphas, sinks, gates) keep their values.
    `from_torch` converts that module to this one, `to_torch` converts back.

    Args:
        embed_dim: Size of the query's tokens and of the output.
        num_heads: H.
        num_kv_heads: H_kv, the number of key/value heads, which divides H (grouped query heads). Default: H.
        alpha: As for `diffmax.attention`. A tensor () or (H,) becomes a buffer, which keeps its dtype if the module is
            converted to float16 or bfloat16; an nn.Parameter becomes a parameter of the module.
        alpha_map: A `HillMap`, `TanhMap` or `ExpMap`. With it alpha is learned: one trainable parameter, `log_beta` (H,),
            and every head starts at `alpha`. It must get no weight decay: use `diffmax.nn.param_groups`.
        kdim, vdim: Sizes of key and value tokens. Default: embed_dim.
        head_dim: D. Default: embed_dim / H.
        bias: Whether the projections have a bias.
        dropout: Dropout probability of the weights, in training.
        batch_first: Whether tokens are (B, L, embed_dim) instead of (L, B, embed_dim). The default of torch's own layers is
            False, and a module inside them needs the same value.
        add_zero_attn: As in torch.nn.MultiheadAttention; the same as `sink="null"`.
        add_bias_kv: Must be False.
        window_size: As for `diffmax.attention`.
        sink: "null": an extra score of 0 whose weight is discarded. "learned": one score per head, in the parameter `sink`
            (H,), which starts at 0. See `Sink`.
        head_gate: Whether to apply a `HeadGate` after the attention; all factors start at 1.
        length_scale: Whether to apply a `LengthScale` before the attention. "adaptive": an `AdaptiveLengthScale`, ASEntmax's.
        device, dtype: Device and dtype of the parameters.
        backend: As for `diffmax.attention`.
    Raises:
        TypeError, ValueError: Sizes do not match, alpha is out of range, or an option is unknown.
    Source: written for diffmax.
    Example:
        >>> from diffmax import HillMap
        >>> attend = DiffmaxAttention(32, 4, num_kv_heads=2, alpha=0.85, alpha_map=HillMap(c=0.5))
        >>> attend(torch.randn(2, 10, 32), is_causal=True).shape
        torch.Size([2, 10, 32])
        >>> attend.log_beta.shape, attend.current_alpha.shape
        (torch.Size([4]), torch.Size([4]))
        >>> x = torch.randn(2, 10, 32)
        >>> out, weights = attend(x, x, x)
        >>> weights.shape
        torch.Size([2, 10, 10])
    """

    _qkv_same_embed_dim = True  # torch's encoder reads it before its fast path: see `SeparateProjections`

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
        length_scale: bool | Literal["adaptive"] = False,
        batch_first: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        if not 0 <= dropout <= 1:
            raise ValueError(f"{_NAME}: dropout must satisfy 0 <= dropout <= 1, got {dropout}")
        if add_bias_kv:
            raise ValueError(f'{_NAME}: add_bias_kv must be False, got True\na score that is learned, per head: sink="learned"')
        if add_zero_attn and sink == "learned":
            raise ValueError(f'{_NAME}: add_zero_attn and sink="learned" exclude each other, got both\npass one of them')
        sink = "null" if add_zero_attn else sink
        if sink not in (None, "null", "learned"):
            raise ValueError(f'{_NAME}: sink must be None, "null" or "learned", got {sink!r}')
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.dropout, self.window_size, self.backend, self.batch_first = dropout, window_size, backend, batch_first
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, **factory)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * self.head_dim, **factory)
        self.v_proj = nn.Linear(self.vdim, num_kv_heads * self.head_dim, **factory)
        self.out_proj = nn.Linear(num_heads * self.head_dim, embed_dim, **factory)
        self._set_alpha(alpha, alpha_map, num_heads, device, dtype)
        self.sink = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sink == "learned" else None
        self.null_sink = sink == "null"
        self.gate = HeadGate(embed_dim, num_heads, device=device, dtype=dtype) if head_gate else None
        self.length_scale = _length_scale(length_scale, embed_dim, num_heads, device, dtype)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Any) -> DiffmaxAttention:
        """Convert a torch.nn.MultiheadAttention, with its weights and settings; `options` are the constructor's, such as alpha.

        Raises:
            TypeError: The module is another one.
            ValueError: The module has add_bias_kv=True, which is not supported.
        Example:
            >>> layer = torch.nn.TransformerEncoderLayer(32, 4)
            >>> layer.self_attn = DiffmaxAttention.from_torch(layer.self_attn, alpha=0.85)
            >>> layer(torch.randn(10, 2, 32)).shape
            torch.Size([10, 2, 32])
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"{cls.__name__}.from_torch: module must be a nn.MultiheadAttention, got {type(module).__name__}")
        weight = module.out_proj.weight
        settings: dict[str, Any] = {name: getattr(module, name) for name in ("kdim", "vdim", "dropout", "batch_first")}
        settings |= {"bias": module.in_proj_bias is not None, "device": weight.device, "dtype": weight.dtype}
        settings |= {"add_bias_kv": module.bias_k is not None, "add_zero_attn": module.add_zero_attn}
        made = cls(module.embed_dim, module.num_heads, **settings | options)
        made.load_state_dict(module.state_dict())
        return made.train(module.training)

    def to_torch(self) -> nn.MultiheadAttention:
        """The torch.nn.MultiheadAttention with these weights: the same function where every alpha is 1.

        Raises:
            ValueError: torch.nn.MultiheadAttention does not support an option of this module.
        Example:
            >>> DiffmaxAttention(32, 4, alpha=0.85).to_torch().in_proj_weight.shape
            torch.Size([96, 32])
        """
        unsupported = {
            "num_kv_heads": self.num_kv_heads != self.num_heads,
            "head_dim": self.num_heads * self.head_dim != self.embed_dim,
            "window_size": self.window_size is not None,
            'sink="learned"': self.sink is not None,
            "head_gate": self.gate is not None,
            "length_scale": self.length_scale is not None,
        }
        if any(unsupported.values()):
            names = ", ".join(name for name, lacks in unsupported.items() if lacks)
            raise ValueError(f"{_NAME}: to_torch must have a module that nn.MultiheadAttention can be, got one with {names}")
        weight, packed = self.q_proj.weight, self.kdim == self.vdim == self.embed_dim
        converted = nn.MultiheadAttention(
            *(self.embed_dim, self.num_heads, self.dropout, self.q_proj.bias is not None, False, self.null_sink),
            *(self.kdim, self.vdim, self.batch_first, weight.device, weight.dtype),
        )
        state = self.state_dict()
        parts = {
            kind: [state[key] for name in _PROJECTIONS if (key := f"{name}.{kind}") in state] for kind in ("weight", "bias")
        }
        given = {name: tensor for name, tensor in state.items() if name.startswith("out_proj")}
        if packed:
            given["in_proj_weight"] = torch.cat(parts["weight"])
        else:
            given |= {f"{name}_weight": tensor for name, tensor in zip(_PROJECTIONS, parts["weight"], strict=True)}
        if self.q_proj.bias is not None:
            given["in_proj_bias"] = torch.cat(parts["bias"])
        converted.load_state_dict(given)
        return converted.train(self.training)

    def reset_parameters(self) -> None:
        """Initialize again, for example after `to_empty`: projections as nn.Linear, alpha and the rest as at construction."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]
        super().reset_parameters()
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    _reset_parameters = reset_parameters  # the name that nn.MultiheadAttention has

    @property
    def in_proj_weight(self) -> SeparateProjections:
        """A placeholder that keeps torch's layers from bypassing this module; it holds no weights."""
        return SeparateProjections()

    @property
    def in_proj_bias(self) -> SeparateProjections | None:
        """As `in_proj_weight`; None without a bias."""
        return None if self.q_proj.bias is None else SeparateProjections()

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        causal_alignment: str = "upper_left",
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        causal_alignment: str = "upper_left",
    ) -> tuple[Tensor, Tensor | None]: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        causal_alignment: str = "upper_left",
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attention from tokens to tokens. With `value` it follows nn.MultiheadAttention, without it `diffmax.attention`.

        With query, key and value, masks have the meaning of nn.MultiheadAttention, and the result is a pair. Without value,
        masks have the meaning of `diffmax.attention`, and the result is one tensor.

        Args:
            query: (B, L, embed_dim); (L, B, embed_dim) for a module with batch_first=False; (L, embed_dim) for one sequence.
                Or nested (B, j, embed_dim) of layout torch.jagged, without masks and weights.
            key: (B, S, kdim), in the same layout. Default: query.
            value: (B, S, vdim), in the same layout. Default: key.
            key_padding_mask: Boolean (B, S), or (S,) for one sequence, True at padding, which is masked. With value also
                floating, added to the scores.
            need_weights: Whether to return the weights, which need the memory of all scores. Default with value: True; without
                value no weights are returned.
            attn_mask: Without value as for `diffmax.attention`, also its broadcasting: True marks *visible* keys. With value
                (L, S) or (B * H, L, S), as in nn.MultiheadAttention: True marks *masked* keys. A floating mask is added.
            average_attn_weights: Whether the weights are averaged over heads.
            is_causal, causal_alignment: As for `diffmax.attention`, combined with attn_mask. With value and attn_mask,
                is_causal=True states, as in nn.MultiheadAttention, that the mask is causal.
        Returns:
            Without value the tokens, (B, L, embed_dim) or in the layout of query. With value the pair of tokens and weights:
            (B, L, S), (B, H, L, S) if not averaged, or None. With a sink the weights have one more column, the sink's.
        Raises:
            ValueError: Shapes do not match, or an argument is not valid for the call.
            TypeError: A mask is not boolean or floating.
        """
        if is_captured(query, key, value, key_padding_mask, attn_mask):
            masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask, "is_causal": is_causal}
            options = {
                "need_weights": need_weights,
                "average_attn_weights": average_attn_weights,
                "causal_alignment": causal_alignment,
            }
            return captured(self, query, key, value, **masks, **options)  # type: ignore[no-any-return]
        is_torch_call = value is not None
        if is_torch_call and key is None:
            raise ValueError(f"{_NAME}: value must come with key, got value alone\npass both, or leave value out")
        if not is_torch_call and (need_weights or not average_attn_weights):
            raise ValueError(
                f"{_NAME}: need_weights and average_attn_weights belong to a call with query, key and value, got no value\n"
                "write out, weights = attend(x, x, x); boolean masks are then True where hidden"
            )
        key = query if key is None else key
        for what, tokens in (("query", query), ("key", key), ("value", value)):
            if tokens is not None and not (isinstance(tokens, Tensor) and tokens.is_nested):
                check_tensor(_NAME, what, tokens)
        if query.is_nested:
            self._check_nested(query, attn_mask, key_padding_mask, is_torch_call and need_weights is not False)
        batched = self._check_tokens(query, key, key if value is None else value)
        query, key, value = (self._batch_first(t) for t in (query, key, key if value is None else value))
        q, k, v = (
            self._heads(projection, tokens)
            for projection, tokens in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        needs_weights = is_torch_call and need_weights is not False
        mask, is_causal = merge_masks(
            _NAME, attn_mask, key_padding_mask, is_causal, q, k, batched, is_torch_call, needs_weights
        )
        if self.length_scale is not None:
            mask = mask if mask is None or hasattr(mask, "variant") else check_mask(_NAME, q, k, mask)
            given = (q, query) if isinstance(self.length_scale, AdaptiveLengthScale) else (q,)
            q = self.length_scale(*given, k.shape[2], is_causal, causal_alignment, self.window_size, mask)
        out, weights = self._attend(q, k, v, mask, is_causal, causal_alignment, needs_weights)
        if self.gate is not None:
            out = self.gate(out, query)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            result, weights = result.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            result = result.transpose(0, 1)
        if not is_torch_call:
            return result
        return result, weights if weights is None or not average_attn_weights else weights.mean(-3)

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Check the shapes; return whether there is a batch."""
        given = {"query": (query, self.q_proj), "key": (key, self.k_proj), "value": (value, self.v_proj)}
        axes = "B, tokens" if self.batch_first else "tokens, B"
        for what, (tokens, projection) in given.items():
            if tokens.ndim not in (2, 3) or tokens.ndim != query.ndim or tokens.shape[-1] != projection.in_features:
                size = projection.in_features
                raise ValueError(
                    f"{_NAME}: {what} must have shape ({axes}, {size}), or all three (tokens, size), got {tuple(tokens.shape)}"
                )
        return query.ndim == 3

    def _check_nested(self, query: Tensor, attn_mask: Any, key_padding_mask: Any, needs_weights: bool) -> None:
        """Check that the options support a nested query."""
        if query.layout is not torch.jagged:
            raise TypeError(f"{_NAME}: a nested query must be of layout torch.jagged, got {query.layout}")
        unsupported = {
            "attn_mask": attn_mask is not None,
            "key_padding_mask": key_padding_mask is not None,
            "need_weights": needs_weights,
            "batch_first=False": not self.batch_first,
            "head_gate": self.gate is not None,
            "length_scale": self.length_scale is not None,
        }
        if any(unsupported.values()):
            names = ", ".join(name for name, given in unsupported.items() if given)
            raise ValueError(
                f"{_NAME}: a nested query supports no masks, weights, gate or length scale, and is batch first, got {names}\n"
                "its sequences have no padding; pad them with .to_padded_tensor(0.0) for the rest"
            )

    def _batch_first(self, tokens: Tensor) -> Tensor:
        if tokens.ndim == 2:
            return tokens.unsqueeze(0)
        return tokens if self.batch_first else tokens.transpose(0, 1)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        causal_alignment: str,
        needs_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout if self.training else 0.0
        sink = torch.zeros(self.num_heads, dtype=q.dtype, device=q.device) if self.null_sink else self.sink
        shared = (dropout_p, is_causal, None, self.num_kv_heads != self.num_heads)
        alpha, window_size = self._alpha_for(q), self.window_size
        if not needs_weights:
            of_call: dict[str, Any] = {"alpha": alpha, "window_size": window_size, "causal_alignment": causal_alignment}
            return attention(q, k, v, mask, *shared, **of_call, sink=sink, backend=self.backend), None
        options = Options(*shared, alpha, window_size, None, 0.0, sink)
        out, weights = with_weights(*build_call(q, k, v, mask, options, causal_alignment), self.backend)
        return out, weights * 0.0 if dropout_p == 1 else weights

    def _heads(self, projection: nn.Linear, tokens: Tensor) -> Tensor:
        heads = projection.out_features // self.head_dim
        projected: Tensor = projection(tokens)
        if tokens.is_nested:
            split: Tensor = projected.unflatten(-1, (heads, self.head_dim))  # type: ignore[no-untyped-call]
            return split.transpose(1, 2)
        # not unflatten: the older ONNX exporter makes its shape a constant
        return projected.reshape(*tokens.shape[:2], heads, self.head_dim).transpose(1, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also accepts the parameter names of torch.nn.MultiheadAttention."""
        found = {name: state_dict[prefix + name] for name in _TORCH_PARAMETERS if prefix + name in state_dict}
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
        """The settings that repr shows."""
        alpha = f"alpha_map={self.alpha_map}" if self.alpha_map is not None else f"alpha={self.alpha}"
        return f"{self.embed_dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, {alpha}"


_TORCH_PARAMETERS = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _split(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights and biases per projection; torch's packed ones are split into equal thirds."""
    result = {name.replace("_weight", ".weight"): tensor for name, tensor in found.items() if name[0] != "i"}
    for kind in ("weight", "bias"):
        if f"in_proj_{kind}" in found:
            parts = found[f"in_proj_{kind}"].chunk(3)
            result |= {f"{name}.{kind}": part for name, part in zip(_PROJECTIONS, parts, strict=True)}
    return result


def _length_scale(
    asked: bool | str, embed_dim: int, heads: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> LengthScale | AdaptiveLengthScale | None:
    if asked not in (False, True, "adaptive"):
        raise ValueError(f'{_NAME}: length_scale must be False, True or "adaptive", got {asked!r}')
    if asked == "adaptive":
        return AdaptiveLengthScale(embed_dim, heads, device=device, dtype=dtype)
    return LengthScale(heads, device=device, dtype=dtype) if asked else None


def _check_sizes(embed_dim: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    if isinstance(kv_heads, float):  # the third argument of nn.MultiheadAttention is dropout
        raise TypeError(
            f"{_NAME}: num_kv_heads must be an int, got {kv_heads!r}\npass dropout by its name: dropout={kv_heads!r}"
        )
    if heads < 1 or (head_dim is None and embed_dim % heads):
        raise ValueError(
            f"{_NAME}: embed_dim must be a multiple of num_heads, got {embed_dim} and {heads}\n"
            "take another number of heads, or pass head_dim"
        )
    if (embed_dim if head_dim is None else head_dim) < 1:
        raise ValueError(f"{_NAME}: embed_dim and head_dim must be at least 1, got {embed_dim} and {head_dim}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{_NAME}: num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}")
