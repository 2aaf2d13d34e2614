"""Differential attention as modules, with softmax or diffmax weights: see docs/differential.md."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention

from diffmax.maps import AlphaMap
from diffmax.nn._alpha import HeadAlpha, shown_weights
from diffmax.nn._multihead import only_weights
from diffmax.operators.attention.api import attention
from diffmax.operators.attention.call import Options, build_call
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_flag, check_tensor, is_whole
from diffmax.reference.attention import weighted

Weights: TypeAlias = Literal["softmax", "diffmax"]
_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
_SCALARS = ("lambda_a", "lambda_b")


class _RMSNorm(nn.RMSNorm):
    """Takes tokens of another dtype than its weight, as under autocast, without torch's warning."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, None, self.eps) * self.weight


class _Differential(HeadAlpha):
    """What both versions share: which weights, and how each map is dropped out and computed."""

    weights: Weights
    fused: bool
    backend: str | None

    def _set_weights(
        self,
        weights: Weights,
        alpha: float | Tensor | None,
        alpha_map: AlphaMap | None,
        fused: bool,
        backend: str | None,
        pairs: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        name = type(self).__name__
        if weights not in ("softmax", "diffmax"):
            raise ValueError(f'{name}: weights must be "softmax" or "diffmax", got {weights!r}')
        self.weights, self.fused, self.backend = weights, check_flag(name, "fused", fused), backend
        if weights == "diffmax":
            if isinstance(alpha, Tensor) and alpha.shape == (2,) and not alpha.requires_grad:
                alpha = alpha.repeat(pairs)
            self._set_alpha(0.9 if alpha is None else alpha, alpha_map, 2 * pairs, device, dtype)
            return
        for what, given in (("alpha", alpha), ("alpha_map", alpha_map), ("backend", backend)):
            if given is not None:
                raise ValueError(f'{name}: {what} must be None for softmax weights, got {given!r}\nor pass weights="diffmax"')
        self.alpha_map = None
        self._store("alpha", None)

    def _difference(
        self, q: Tensor, k: Tensor, v: Tensor, factor: Tensor, mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        """Map 2h minus `factor` times map 2h + 1, times the values, for every pair h.

        q is (B, 2 H, N, D), k (B, H_k, N, D), v has H_k heads or half as many; the result is (B, H, N, D_v).
        """
        check_flag(type(self).__name__, "is_causal", is_causal)
        alpha = None if self.weights == "softmax" else self._alpha_for(q)
        mask = _mask_of_maps(type(self).__name__, mask, q)
        grouped = k.shape[1] != q.shape[1]
        if not self.fused:
            k, v = (_per_head(t, heads) for t, heads in ((k, q.shape[1]), (v, q.shape[1] // 2)))
            one = torch.ones((), device=q.device) if alpha is None else alpha
            options = Options(dropout_p, is_causal, None, False, one, None, None, 0.0, None)
            query, key, _, call = build_call(q, k, k, mask, options, "upper_left")
            maps = only_weights(query, key, call, self.backend)
            if dropout_p == 1:  # a call drops all weights by values of 0, and these are not its values
                maps = maps * 0.0
            return weighted(maps[:, 0::2] - factor * maps[:, 1::2], v).to(query.dtype)
        if v.shape[1] != k.shape[1]:
            v = v.repeat_interleave(2, 1)
        if alpha is None:
            out = _softmax_attention(q, k, v, mask, dropout_p, is_causal, grouped)
        else:
            out = attention(q, k, v, mask, dropout_p, is_causal, None, grouped, alpha=alpha, backend=self.backend)
        return out[:, 0::2] - factor * out[:, 1::2]


class DiffAttention(_Differential):
    """Differential attention: the difference of two attention maps per head, with softmax or diffmax weights.

    out_h = RMSNorm((A_1 - lambda A_2) v_h) (1 - lambda_init), for every head h, then the output projection

    A_1 and A_2 are the maps of query and key heads 2h and 2h + 1, of size hd = dim / num_heads / 2; v_h has twice that size.
    lambda is one number per layer: exp(q1 . k1) - exp(q2 . k2) + lambda_init, of four learned vectors, or with dual_lambda
    exp(a) - exp(b) + lambda_init.

    The first arguments, the parameters' names and the state dict are those of timm's `DiffAttention`, and so are the numbers
    with softmax weights. Unlike it, a mask per head, a mask together with is_causal, and fully masked queries are right on
    both paths, and a fully masked query gives 0 before the output projection.

    Args:
        dim: Size of the tokens.
        num_heads: H, the number of pairs of maps: half as many heads as in a Transformer of the same size. 2 H divides dim.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        qk_norm: Whether queries and keys are normalized, each by a `norm_layer` of size hd.
        scale_norm: Whether there is a `norm_layer` of size dim before the output projection.
        proj_bias: Whether the output projection has a bias.
        attn_drop: Dropout probability of the weights of each map, before the difference; the maps are dropped independently.
        proj_drop: Dropout probability of the output.
        norm_layer: Called with a size, device and dtype. Default: RMSNorm with eps = 1e-6.
        depth: Index of the layer, from 0: lambda_init = 0.8 - 0.6 exp(-0.3 depth), which is not in the state dict.
        dual_lambda: Whether lambda comes from two numbers instead of four vectors. Both stay float32 whatever `dtype` is.
        device, dtype: Device and dtype of the parameters.
        weights: "softmax", or "diffmax" for `diffmax.attention`.
        alpha: For diffmax weights, as for `diffmax.attention`: a float; a tensor (), (2,) with one alpha for the first map of
            each pair and one for the second, or (2 H,) with one per map; or an nn.Parameter () or (2 H,). Default: 0.9.
        alpha_map: A `HillMap`, `TanhMap` or `ExpMap`. With it alpha is learned: one parameter, `log_beta` (2 H,), starts at
            `alpha`. It must get no weight decay: use `diffmax.nn.param_groups`.
        fused: Whether all 2 H maps go through one call of attention and the difference is taken of its outputs. Otherwise the
            weights are computed and subtracted, in the memory of all scores. The same numbers up to rounding; a softmax map's
            dropout draws others.
        backend: For diffmax weights, as for `diffmax.attention`.
    Raises:
        TypeError, ValueError: Sizes do not match, a number is out of range, or an option of diffmax comes with softmax weights.
    Source: Ye et al., "Differential Transformer", 2025 (arXiv 2410.05258); the arguments of timm 1.0.31. Written for diffmax.
    Example:
        >>> import torch
        >>> attend, x = DiffAttention(32, 2, depth=3, weights="diffmax", alpha=0.5), torch.randn(2, 10, 32)
        >>> attend(x, is_causal=True).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        depth: int = 0,
        dual_lambda: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weights: Weights = "softmax",
        alpha: float | Tensor | None = None,
        alpha_map: AlphaMap | None = None,
        fused: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _check_counts(name, dim=dim, num_heads=num_heads)
        if dim % (2 * num_heads):
            raise ValueError(
                f"{name}: dim must be a multiple of 2 * num_heads, got {dim} and {num_heads}\n"
                "a head is a pair of maps of size dim / num_heads / 2: take another number of heads"
            )
        _check_probabilities(name, attn_drop=attn_drop, proj_drop=proj_drop)
        self.num_heads, self.head_dim = num_heads, dim // num_heads // 2
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer = norm_layer or partial(_RMSNorm, eps=1e-6)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **factory) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dual_lambda = dual_lambda
        size = () if dual_lambda else (self.head_dim,)
        for each in _SCALARS + _VECTORS:
            learned = nn.Parameter(torch.empty(size, device=device, dtype=torch.float32))
            self.register_parameter(each, learned if (each in _SCALARS) == dual_lambda else None)
        self.sub_norm = _RMSNorm(2 * self.head_dim, eps=1e-5, **factory)
        self.lambda_init: float
        self.set_lambda_init(depth)
        self._reset_lambda()
        self._set_weights(weights, alpha, alpha_map, fused, backend, num_heads, device, dtype)

    def set_lambda_init(self, depth: float) -> None:
        """Set `lambda_init` to 0.8 - 0.6 exp(-0.3 depth), for the layer of index `depth`, from 0."""
        if not isinstance(depth, numbers.Real) or isinstance(depth, bool):
            raise TypeError(f"{type(self).__name__}: depth must be a number, got {depth!r} of type {type(depth).__name__}")
        if not 0 <= float(depth) < math.inf:
            raise ValueError(f"{type(self).__name__}: depth must be 0 or more, got {depth}\nthe first layer has depth 0")
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * float(depth))

    def reset_parameters(self) -> None:
        """Initialize again, for example after `to_empty`: projections and norms as they do, lambda and alpha as at first."""
        for child in self.children():
            if hasattr(child, "reset_parameters"):
                child.reset_parameters()  # type: ignore[operator]
        self._reset_lambda()
        super().reset_parameters()

    def _reset_lambda(self) -> None:
        for name in _SCALARS if self.dual_lambda else _VECTORS:
            parameter = getattr(self, name)
            if self.dual_lambda:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.1)

    @property
    def current_lambda(self) -> Tensor:
        """lambda (), in float32 or float64, with its gradient."""
        learned: list[Tensor] = [getattr(self, name) for name in (_SCALARS if self.dual_lambda else _VECTORS)]
        wide = torch.promote_types(learned[0].dtype, torch.float32)
        learned = [parameter.to(wide) for parameter in learned]
        if not self.dual_lambda:
            q1, k1, q2, k2 = learned
            learned = [(q1 * k1).sum(), (q2 * k2).sum()]
        return learned[0].exp() - learned[1].exp() + self.lambda_init

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention among tokens.

        Args:
            x: (B, N, dim).
            attn_mask: Broadcasts to (B, H, N, N), for both maps of a head, or to (B, 2 H, N, N), in the order of the maps.
                Boolean: True where a key is visible. Floating: added to the scores, -inf masks; may require a gradient.
            is_causal: Whether query i sees the keys 0 to i alone, of those that attn_mask leaves.
        Returns:
            (B, N, dim).
        Raises:
            TypeError: A mask is not boolean or floating; is_causal is not True or False.
            ValueError: Shapes do not match.
        """
        if is_captured(x, attn_mask):
            return captured(self, x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[no-any-return]
        _check_tokens(type(self).__name__, x, self.qkv.in_features)
        size, pairs = self.head_dim, self.num_heads
        q, k, v = self.qkv(x).chunk(3, dim=2)
        q, k = (_heads(t, 2 * pairs, size) for t in (q, k))
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = self._difference(
            self.q_norm(q), self.k_norm(k), _heads(v, pairs, 2 * size), self.current_lambda, attn_mask, is_causal, dropout_p
        )
        out = self.sub_norm(out) * (1 - self.lambda_init)
        result: Tensor = self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))
        return result

    def extra_repr(self) -> str:
        """The settings that repr shows."""
        return f"{self.qkv.in_features}, {self.num_heads}, lambda_init={self.lambda_init:.4g}, {shown_weights(self)}"


class DiffAttentionV2(_Differential):
    """Differential attention, second version: twice the query heads, the same keys and values, and a gate per token and head.

    out_h = (A_2h - sigmoid(g_h) A_2h+1) v,  g = lambda_proj(x), for every head h, then the output projection

    All 2 H query heads go through one call of attention with H_kv key and value heads; both heads of a pair read the same
    one. There is no lambda_init and no norm. The projections are `q_proj` (embed_dim to 2 H heads), `k_proj`, `v_proj`,
    `lambda_proj` (embed_dim to H, without a bias) and `out_proj`. Positions are the caller's, as a floating attn_mask.

    Args:
        embed_dim: Size of the tokens.
        num_heads: H, the number of heads of the output.
        num_kv_heads: H_kv, which divides H. Default: H.
        head_dim: D. Default: embed_dim / H.
        bias: Whether q_proj, k_proj, v_proj and out_proj have a bias.
        dropout: Dropout probability of the weights of each map, before the difference; the maps are dropped independently.
        weights, alpha, alpha_map, fused, backend: As for `DiffAttention`.
        device, dtype: Device and dtype of the parameters.
    Raises:
        TypeError, ValueError: As for `DiffAttention`.
    Source: the published second version of the Differential Transformer (unilm, January 2026). Written for diffmax.
    Example:
        >>> import torch
        >>> attend = DiffAttentionV2(32, 4, num_kv_heads=2, weights="diffmax", alpha=torch.tensor([0.5, 0.9]))
        >>> attend(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        weights: Weights = "softmax",
        alpha: float | Tensor | None = None,
        alpha_map: AlphaMap | None = None,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_counts(name, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"{name}: embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}\n"
                    "take another number of heads, or pass head_dim"
                )
            head_dim = embed_dim // num_heads
        _check_counts(name, head_dim=head_dim)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}\n"
                "both query heads of a pair read the same key head"
            )
        _check_probabilities(name, dropout=dropout)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout = dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, 2 * num_heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias, **factory)
        self.lambda_proj = nn.Linear(embed_dim, num_heads, bias=False, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **factory)
        self._set_weights(weights, alpha, alpha_map, fused, backend, num_heads, device, dtype)

    def reset_parameters(self) -> None:
        """Initialize again, for example after `to_empty`: projections as nn.Linear, alpha as at construction."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]
        super().reset_parameters()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = True) -> Tensor:
        """Attention among tokens: causal, unless is_causal=False.

        Args:
            x: (B, N, embed_dim).
            attn_mask, is_causal: As for `DiffAttention.forward`; both count.
        Returns:
            (B, N, embed_dim).
        Raises:
            TypeError: A mask is not boolean or floating; is_causal is not True or False.
            ValueError: Shapes do not match.
        """
        if is_captured(x, attn_mask):
            return captured(self, x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[no-any-return]
        _check_tokens(type(self).__name__, x, self.q_proj.in_features)
        q = _heads(self.q_proj(x), 2 * self.num_heads, self.head_dim)
        k, v = (_heads(project(x), self.num_kv_heads, self.head_dim) for project in (self.k_proj, self.v_proj))
        gates = self.lambda_proj(x).sigmoid().transpose(1, 2).unsqueeze(3)
        out = self._difference(q, k, v, gates, attn_mask, is_causal, self.dropout if self.training else 0.0)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result

    def extra_repr(self) -> str:
        """The settings that repr shows."""
        return f"{self.q_proj.in_features}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, {shown_weights(self)}"


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, grouped: bool
) -> Tensor:
    """Torch's attention, with a mask and causal if both are asked for."""
    size, wider = q.shape[3], v.shape[3] - q.shape[3]
    if wider > 0:  # zeros change no score, and torch's fused kernels take heads of one size alone
        q, k = pad(q, (0, wider)), pad(k, (0, wider))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if mask is not None and is_causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    causal = is_causal and mask is None
    if torch.__version__ >= "2.5":
        more: dict[str, Any] = {"enable_gqa": True} if grouped else {}
        return scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, scale=size**-0.5, **more)
    # torch 2.4 knows no groups, reads masks that broadcast wrongly, and gives NaN to queries that see nothing
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if mask is None:
        return scaled_dot_product_attention(q, k, v, None, dropout_p, causal, scale=size**-0.5)
    mask = mask.expand(*q.shape[:3], k.shape[2]).contiguous()
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    blind = ~seen.any(-1, keepdim=True)
    mask = mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0.0)
    return scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=size**-0.5).masked_fill(blind, 0.0)


def _mask_of_maps(name: str, mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask, with two entries for each head if it differs by head."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{name}: attn_mask must be boolean or floating, got {got}\n"
            "a boolean mask is True where a key is visible; a floating one is added to the scores"
        )
    batch, maps, length = q.shape[:3]
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    sizes = ((1, batch), (1, maps // 2, maps), (1, length), (1, length))
    if len(shape) != 4 or any(size not in fitting for size, fitting in zip(shape, sizes, strict=True)):
        raise ValueError(
            f"{name}: attn_mask must broadcast to (B, H, N, N) = {(batch, maps // 2, length, length)} or to "
            f"(B, 2 H, N, N), got {tuple(mask.shape)}\na mask of padding, (B, N), is mask[:, None, None]"
        )
    mask = mask.reshape(shape)  # torch's attention takes no mask of fewer than two dimensions
    return mask.repeat_interleave(2, 1) if shape[1] not in (1, maps) else mask


def _per_head(t: Tensor, heads: int) -> Tensor:
    """Groups as heads: torch.export fixes a length where grouped heads are stacked along the queries."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def _heads(t: Tensor, heads: int, size: int) -> Tensor:
    # not unflatten: the older ONNX exporter makes its shape a constant
    return t.reshape(*t.shape[:2], heads, size).transpose(1, 2)


def _check_tokens(name: str, x: Any, size: int) -> None:
    check_tensor(name, "x", x)
    if x.ndim != 3 or x.shape[2] != size:
        raise ValueError(f"{name}: x must have shape (B, N, {size}), got {tuple(x.shape)}")


def _check_counts(name: str, **counts: Any) -> None:
    for what, number in counts.items():
        if not is_whole(number):
            raise TypeError(f"{name}: {what} must be an int, got {number!r} of type {type(number).__name__}")
        if number < 1:
            raise ValueError(f"{name}: {what} must be at least 1, got {number}")


def _check_probabilities(name: str, **given: Any) -> None:
    for what, p in given.items():
        if not isinstance(p, numbers.Real) or isinstance(p, bool):
            raise TypeError(f"{name}: {what} must be a number, got {p!r} of type {type(p).__name__}")
        if not 0 <= float(p) <= 1:  # NaN is neither
            raise ValueError(f"{name}: {what} must satisfy 0 <= {what} <= 1, got {p}")
