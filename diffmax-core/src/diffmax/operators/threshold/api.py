"""`threshold_attention`: what it means, and its arguments checked. Next: `operator`. Members of the family: `members`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

from torch import Tensor

from diffmax.machine.dispatch import selected
from diffmax.operators.attention.checks import check_tensors
from diffmax.operators.common.autocast import autocast
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_flag
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.parts import warn_of_part
from diffmax.operators.threshold import checks, operator
from diffmax.plugin import ThresholdCall

Weights = Literal["scores", "softmax", "diffmax"]
_NAME = "diffmax.threshold_attention"


def build(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    *,
    weights: str,
    alpha: float | Tensor | None,
    power: float,
    bias: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window_size: tuple[int, int] | None,
    attn_mask: Tensor | None,
    name: str = _NAME,
) -> tuple[Tensor, Tensor, Tensor, ThresholdCall]:
    """The tensors and the call that `threshold_attention`'s arguments mean. Errors name `name`."""
    query, key, value = autocast(query, key, value)
    given = (query, key, value, threshold, weights, alpha, power, bias, scale, is_causal, window_size, attn_mask)
    return query, key, value, checks.build_call(name, *given)


def build_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    weights: str,
    alpha: float | Tensor | None,
    power: float,
    bias: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window_size: tuple[int, int] | None,
    name: str = f"{_NAME}_varlen",
) -> tuple[Tensor, Tensor, Tensor, ThresholdCall]:
    """The tensors (1, H, T, D) and the call that `threshold_attention_varlen`'s arguments mean. Errors name `name`."""
    query, key, value = autocast(query, key, value)
    check_tensors(name, query, key, value, "THD")
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    call = checks.build_call(
        name, query, key, value, threshold, weights, alpha, power, bias, scale, is_causal, window_size, None
    )
    places = checks.packed(name, query, key, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
    return query, key, value, replace(call, **places)


@overload
def threshold_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    *,
    weights: Weights = "scores",
    alpha: float | Tensor | None = None,
    power: float = 1.0,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window_size: tuple[int, int] | None = None,
    attn_mask: Tensor | None = None,
    normalize: bool = False,
    return_mass: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def threshold_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    *,
    weights: Weights = "scores",
    alpha: float | Tensor | None = None,
    power: float = 1.0,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window_size: tuple[int, int] | None = None,
    attn_mask: Tensor | None = None,
    normalize: bool = False,
    return_mass: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def threshold_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    *,
    weights: Weights = "scores",
    alpha: float | Tensor | None = None,
    power: float = 1.0,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window_size: tuple[int, int] | None = None,
    attn_mask: Tensor | None = None,
    normalize: bool = False,
    return_mass: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with weights relu(u - theta)^p, where u are the scores, or their softmax or diffmax.

    s_ij = scale * q_i . k_j + bias[h, i' - j] where 0 <= i' - j < W,  i' = i + S - L
    w_ij = relu(u_ij - theta_i)^p,  out_i = sum_j w_ij v_j,  mass_i = sum_j w_ij

    u is s, softmax(s) or diffmax(s) over the keys that query i sees; a hidden key has no weight, whatever theta.
    docs/lazy.md lists the members of this family.

    Args:
        query: (B, H, L, D), any strides. float16, bfloat16, float32 or float64. Under autocast it is converted as torch would.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), of query's dtype, where H_kv divides H: query head h reads key head
            h // (H / H_kv). The last query has the position of the last key.
        threshold: theta: a float, or a tensor (), (H,), (H, L) or (B, H, L) with sizes of 1 for any, with a gradient.
        weights: "scores", "softmax" or "diffmax": what u is.
        alpha: Of "diffmax" alone: a float in (0, 1), or a tensor () or (H,), with a gradient. None: 0.9.
        power: p, positive. The derivative of a weight at u = theta is 0.
        bias: (H, W), a number per head and distance, with a gradient.
        scale: Factor of the products; None: 1 / sqrt(D).
        is_causal: Query i sees the keys up to its own position; else all.
        window_size: (left, right): how many keys before and after its position a query sees; -1: all.
        attn_mask: Boolean, broadcasts to (B, H, L, S): True where a key is seen, in addition to `is_causal`.
        normalize: Whether to divide out by mass; a query without weights stays 0. It computes in float32 (float64 for float64).
        return_mass: Whether to return the mass too; it has a gradient.
        backend: As in `attention`.
    Returns:
        (B, H, L, D_v), contiguous, in query's dtype; and mass (B, H, L), in float32 (float64 for float64), if requested.
        A query without weights returns zeros.
    Raises:
        TypeError: An argument has the wrong type, or the dtypes differ.
        ValueError: Shapes, devices or values do not fit.
        NoBackendError: No backend can run the call, or the named one cannot.
    Numerics: Scores, weights and sums are computed in float32, for float64 in float64. Second derivatives, forward mode, and
        gradients under torch.func are right, and computed with all weights in memory.
    Source: docs/lazy.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> query, key, value = torch.randn(3, 2, 4, 100, 16).unbind()
        >>> out, mass = diffmax.threshold_attention(query, key, value, 0.5, power=2, return_mass=True)
        >>> out.shape, mass.shape
        (torch.Size([2, 4, 100, 16]), torch.Size([2, 4, 100]))
    """
    if is_captured(query, key, value, threshold, alpha, bias, attn_mask):
        return captured(  # type: ignore[no-any-return]
            threshold_attention, query, key, value, threshold, weights=weights, alpha=alpha, power=power, bias=bias,
            scale=scale, is_causal=is_causal, window_size=window_size, attn_mask=attn_mask, normalize=normalize,
            return_mass=return_mass, backend=backend,
        )  # fmt: skip
    warn_of_part(_NAME)
    return attend(
        _NAME, query, key, value, threshold, weights=weights, alpha=alpha, power=power, bias=bias, scale=scale,
        is_causal=is_causal, window_size=window_size, attn_mask=attn_mask, normalize=normalize, return_mass=return_mass,
        backend=backend,
    )  # fmt: skip


def attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    *,
    normalize: bool,
    return_mass: bool,
    backend: str | None,
    **given: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`threshold_attention`, whose further arguments are `given`; errors name `name`."""
    check_flag(name, "normalize", normalize)
    check_flag(name, "return_mass", return_mass)
    query, key, value, call = build(query, key, value, threshold, name=name, **given)
    out, mass = _computed(query, key, value, call, normalize, backend)
    return (out, mass) if return_mass else out


@overload
def threshold_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    weights: Weights = "scores",
    alpha: float | Tensor | None = None,
    power: float = 1.0,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window_size: tuple[int, int] | None = None,
    normalize: bool = False,
    return_mass: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def threshold_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    weights: Weights = "scores",
    alpha: float | Tensor | None = None,
    power: float = 1.0,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window_size: tuple[int, int] | None = None,
    normalize: bool = False,
    return_mass: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def threshold_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    weights: Weights = "scores",
    alpha: float | Tensor | None = None,
    power: float = 1.0,
    bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window_size: tuple[int, int] | None = None,
    normalize: bool = False,
    return_mass: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`threshold_attention` over packed sequences, each of which attends to itself.

    w_ij = relu(u_ij - theta_i)^p as there, within each sequence.

    Args:
        query: (T_q, H, D).
        key, value: (T_k, H_kv, D) and (T_k, H_kv, D_v), where H_kv divides H. The last query of a sequence has the position of
            its last key.
        threshold: theta: a float, or a tensor (), (H,) or (H, T_q) with sizes of 1 for any, with a gradient.
        cu_seqlens_q, cu_seqlens_k: (N + 1,), int32: where each sequence begins, and the end of the last.
        max_seqlen_q, max_seqlen_k: No sequence is longer.
        weights, alpha, power, bias, scale, is_causal, window_size, normalize, backend: As for `threshold_attention`.
        return_mass: Whether to return the mass too.
    Returns:
        (T_q, H, D_v), in query's dtype; and mass (T_q, H), if requested. Tokens after the last sequence: 0, a CPU refuses them.
    Raises:
        TypeError, ValueError, NoBackendError: As `threshold_attention`; or offsets do not fit the tokens.
    Source: docs/lazy.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> x, ends = torch.randn(10, 2, 8), torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> diffmax.threshold_attention_varlen(x, x, x, 0.0, ends, ends, 6, 6).shape
        torch.Size([10, 2, 8])
    """
    if is_captured(query, key, value, threshold, cu_seqlens_q, cu_seqlens_k, alpha, bias):
        return captured(  # type: ignore[no-any-return]
            threshold_attention_varlen, query, key, value, threshold, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            weights=weights, alpha=alpha, power=power, bias=bias, scale=scale, is_causal=is_causal, window_size=window_size,
            normalize=normalize, return_mass=return_mass, backend=backend,
        )  # fmt: skip
    return attend_packed(
        f"{_NAME}_varlen", query, key, value, threshold, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        weights=weights, alpha=alpha, power=power, bias=bias, scale=scale, is_causal=is_causal, window_size=window_size,
        normalize=normalize, return_mass=return_mass, backend=backend,
    )  # fmt: skip


def attend_packed(
    name: str, *tensors: Any, normalize: bool, return_mass: bool, backend: str | None, **given: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`threshold_attention_varlen`, whose arguments before the star are `tensors`, the others `given`; errors name `name`."""
    check_flag(name, "normalize", normalize)
    check_flag(name, "return_mass", return_mass)
    query, key, value, call = build_packed(*tensors, name=name, **given)
    out, mass = _computed(query, key, value, call, normalize, backend)
    out, mass = out.squeeze(0).transpose(0, 1), mass.squeeze(0).transpose(0, 1)
    return (out, mass) if return_mass else out


def _computed(
    query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The output, divided by mass (0 without mass) if `normalize`, and mass."""
    if not normalize:
        found = operator.threshold_attention(query, key, value, call, selected(backend))
        return found.out, found.mass
    # weights may be too small for float16, and their quotients by mass are not: rounded once, after the division
    exact = accumulation_dtype(query.dtype)
    found = operator.threshold_attention(query.to(exact), key.to(exact), value.to(exact), call, selected(backend))
    mass = found.mass.unsqueeze(-1)
    return (found.out / mass.masked_fill(mass == 0, 1.0)).to(query.dtype), found.mass
