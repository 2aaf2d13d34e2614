"""Members of the family of `threshold_attention` that have names: lazy attention, and threshold differential attention."""

from __future__ import annotations

import numbers
from typing import Any, Literal, overload

import torch
from torch import Tensor

from diffmax.machine.forked import alone_in_child
from diffmax.operators.attention.checks import _check_floating, check_heads, check_tensors
from diffmax.operators.common.autocast import autocast, without_autocast
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import _shape, check_flag, check_tensor, has_shape, is_whole
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.parts import warn_of_part
from diffmax.operators.threshold.api import attend, attend_packed, threshold_attention
from diffmax.operators.threshold.checks import check_alpha_of, check_power, check_seen, packed

FIRST_ROWS = ("kept", "published")


@overload
def lazy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    tau: float | Tensor,
    window_size: int | None = None,
    *,
    weights: Literal["softmax", "diffmax"] = "softmax",
    alpha: float | Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    attn_mask: Tensor | None = None,
    first_row: Literal["kept", "published"] = "kept",
    return_mass: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def lazy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    tau: float | Tensor,
    window_size: int | None = None,
    *,
    weights: Literal["softmax", "diffmax"] = "softmax",
    alpha: float | Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    attn_mask: Tensor | None = None,
    first_row: Literal["kept", "published"] = "kept",
    return_mass: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@alone_in_child
def lazy_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    tau: float | Tensor,
    window_size: int | None = None,
    *,
    weights: Literal["softmax", "diffmax"] = "softmax",
    alpha: float | Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    attn_mask: Tensor | None = None,
    first_row: Literal["kept", "published"] = "kept",
    return_mass: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Lazy attention (Elastic-Softmax): softmax weights, plus tau / n, without what is then negative.

    w_ij = relu(p_ij + tau_h / n_i),  p_i = softmax of scale * q_i . k_j + bias[h, i' - j],  n_i = keys that query i sees

    The weights are not divided by their sum. Rotary positions, if any, are applied to query and key before.

    Args:
        query: (B, H, L, D); key, value: as for `threshold_attention`. The last query has the position of the last key.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), where H_kv divides H.
        bias: (H, W): a number per head and distance 0 to W - 1; beyond there is none. None: no bias.
        tau: A float, or (H,); below 0 it drops weights, above 0 it adds to those of visible keys. With a gradient, like bias.
        window_size: W or W - 1, which bias is checked against; None: as bias has it. It hides no key.
        weights: "softmax", or "diffmax" in its place.
        alpha: Of "diffmax" alone: a float, or a tensor () or (H,), with a gradient. None: 0.9.
        scale, is_causal, attn_mask, return_mass, backend: As for `threshold_attention`.
        first_row: Of a query that sees one key alone: "kept" gives it the weight 1 + max(tau, 0), "published" 1 + tau, which
            is 0, without a gradient, where tau starts at -1.
    Returns:
        (B, H, L, D_v), contiguous, in query's dtype; and the mass (B, H, L), if requested. A query that sees nothing gets 0.
    Raises:
        TypeError, ValueError, NoBackendError: As `threshold_attention`; or window_size or first_row does not fit.
    Source: arXiv 2601.00919; docs/lazy.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> query, key, value = torch.randn(3, 2, 4, 100, 16).unbind()
        >>> out, mass = diffmax.lazy_attention(query, key, value, torch.zeros(4, 32), -0.5, return_mass=True)
        >>> mass[:, :, 0].unique()
        tensor([1.])
    """
    name = "diffmax.lazy_attention"
    if is_captured(query, key, value, bias, tau, alpha, attn_mask):
        return captured(  # type: ignore[no-any-return]
            lazy_attention, query, key, value, bias, tau, window_size, weights=weights, alpha=alpha, scale=scale,
            is_causal=is_causal, attn_mask=attn_mask, first_row=first_row, return_mass=return_mass, backend=backend,
        )  # fmt: skip
    warn_of_part(name)
    _check_lazy(name, weights, alpha, first_row)
    query, key, value = autocast(query, key, value)
    check_tensors(name, query, key, value, "BHLD")
    check_heads(name, query.shape[1], key.shape[1], True)
    _check_window(name, window_size, bias)
    theta = elastic_threshold(name, query, key, tau, is_causal, attn_mask, first_row == "kept")
    return attend(
        name, query, key, value, theta, weights=weights, alpha=alpha, power=1.0, bias=bias, scale=scale, is_causal=is_causal,
        window_size=None, attn_mask=attn_mask, normalize=False, return_mass=return_mass, backend=backend,
    )  # fmt: skip


@overload
def lazy_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    tau: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_size: int | None = None,
    *,
    weights: Literal["softmax", "diffmax"] = "softmax",
    alpha: float | Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    first_row: Literal["kept", "published"] = "kept",
    return_mass: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def lazy_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    tau: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_size: int | None = None,
    *,
    weights: Literal["softmax", "diffmax"] = "softmax",
    alpha: float | Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    first_row: Literal["kept", "published"] = "kept",
    return_mass: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@alone_in_child
def lazy_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    tau: float | Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_size: int | None = None,
    *,
    weights: Literal["softmax", "diffmax"] = "softmax",
    alpha: float | Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    first_row: Literal["kept", "published"] = "kept",
    return_mass: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lazy_attention` over packed sequences, each of which attends to itself.

    w_ij = relu(p_ij + tau_h / n_i) as there, within each sequence.

    Args:
        query: (T_q, H, D).
        key, value: (T_k, H_kv, D) and (T_k, H_kv, D_v), where H_kv divides H. The last query of a sequence has the position of
            its last key.
        bias, tau: As for `lazy_attention`; distances are counted within a sequence.
        cu_seqlens_q, cu_seqlens_k: (N + 1,), int32: where each sequence begins, and the end of the last.
        max_seqlen_q, max_seqlen_k: No sequence is longer.
        window_size, weights, alpha, scale, is_causal, first_row, return_mass, backend: As for `lazy_attention`.
    Returns:
        (T_q, H, D_v), in query's dtype; and mass (T_q, H), if requested. Tokens after the last sequence: 0, a CPU refuses them.
    Raises:
        TypeError, ValueError, NoBackendError: As `lazy_attention`; or offsets do not fit the tokens.
    Source: arXiv 2601.00919; docs/lazy.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> x, ends = torch.randn(10, 2, 8), torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> out, mass = diffmax.lazy_attention_varlen(x, x, x, None, -0.5, ends, ends, 6, 6, return_mass=True)
        >>> mass[[0, 4]]
        tensor([[1., 1.],
                [1., 1.]])
    """
    name = "diffmax.lazy_attention_varlen"
    if is_captured(query, key, value, bias, tau, cu_seqlens_q, cu_seqlens_k, alpha):
        return captured(  # type: ignore[no-any-return]
            lazy_attention_varlen, query, key, value, bias, tau, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            window_size, weights=weights, alpha=alpha, scale=scale, is_causal=is_causal, first_row=first_row,
            return_mass=return_mass, backend=backend,
        )  # fmt: skip
    _check_lazy(name, weights, alpha, first_row)
    query, key, value = autocast(query, key, value)
    check_tensors(name, query, key, value, "THD")
    check_heads(name, query.shape[1], key.shape[1], True)
    _check_window(name, window_size, bias)
    heads = query.transpose(0, 1).unsqueeze(0), key.transpose(0, 1).unsqueeze(0)
    packed(name, *heads, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k))
    given = _per_head(name, "tau", heads[0], tau)[0]
    theta = _elastic(given, _visible_in_sequence(query, cu_seqlens_q, cu_seqlens_k, is_causal), first_row == "kept")
    return attend_packed(
        name, query, key, value, theta, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, weights=weights, alpha=alpha,
        power=1.0, bias=bias, scale=scale, is_causal=is_causal, window_size=None, normalize=False, return_mass=return_mass,
        backend=backend,
    )  # fmt: skip


def _check_lazy(name: str, weights: Any, alpha: Any, first_row: Any) -> None:
    if first_row not in FIRST_ROWS:
        raise ValueError(f"{name}: first_row must be one of {', '.join(FIRST_ROWS)}, got {first_row!r}")
    if weights not in ("softmax", "diffmax"):
        raise ValueError(f"{name}: weights must be one of softmax, diffmax, got {weights!r}")
    check_alpha_of(name, weights, alpha)


def _check_window(name: str, window_size: Any, bias: Tensor | None) -> None:
    if window_size is None:
        return
    if not is_whole(window_size):
        raise TypeError(f"{name}: window_size must be an int or None, got {window_size!r} of type {type(window_size).__name__}")
    if window_size < 0:
        raise ValueError(f"{name}: window_size must not be negative, got {window_size}")
    if bias is None:
        raise ValueError(
            f"{name}: window_size says how many distances bias has, got {window_size} and no bias\n"
            "to hide keys, pass attn_mask, or call threshold_attention, whose window_size does"
        )
    if isinstance(bias, Tensor) and bias.ndim == 2 and bias.shape[1] - window_size not in (0, 1):
        raise ValueError(f"{name}: bias must have window_size or window_size + 1 columns, {window_size}, got {_shape(bias)}")


def elastic_threshold(
    name: str, query: Tensor, key: Tensor, tau: float | Tensor, causal: bool, mask: Tensor | None, keeps_first: bool
) -> Tensor:
    """-tau / n, (B or 1, H or 1, L), with n the keys that a query sees; where that is one alone, min(-tau, 0) if so wanted."""
    return _elastic(_per_head(name, "tau", query, tau), _visible(name, query, key, causal, mask), keeps_first)


def _elastic(tau: Tensor, count: Tensor, keeps_first: bool) -> Tensor:
    theta = -tau / count.to(tau.dtype).clamp_min(1)
    return torch.where(count == 1, theta.clamp_max(0.0), theta) if keeps_first else theta


def _visible_in_sequence(query: Tensor, ends_q: Tensor, ends_k: Tensor, causal: bool) -> Tensor:
    """How many keys of its sequence each packed query sees, (1, T); 0 after the last sequence."""
    place = torch.arange(query.shape[0], device=query.device)
    ends_q, lengths_k = ends_q.long(), ends_k.long().diff()
    of = torch.searchsorted(ends_q[1:], place, right=True).clamp_max(ends_q.shape[0] - 2)
    count = lengths_k[of]
    if causal:
        count = torch.minimum((place - ends_q[1:][of] + count + 1).clamp_min(0), count)
    return count.masked_fill(place >= ends_q[-1], 0).unsqueeze(0)


def _visible(name: str, query: Tensor, key: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """How many keys each query sees, (B or 1, H or 1, L)."""
    length, many = query.shape[2], key.shape[2]
    position = torch.arange(length, device=query.device) + (many - length)
    if mask is None:
        return (position + 1 if causal else torch.full_like(position, many)).clamp(0, many).view(1, 1, length)
    seen = check_seen(name, query, key, mask)
    seen = seen.expand(*seen.shape[:3], many)
    if causal and seen.shape[2] == 1:  # of padding: counted without a matrix
        sums = torch.cat([torch.zeros_like(seen[..., :1], dtype=torch.long), seen.long().cumsum(3)], 3).squeeze(2)
        return sums[..., (position + 1).clamp_min(0)]
    if causal:
        seen = seen & (torch.arange(many, device=query.device) <= position.unsqueeze(1))
    return seen.sum(3).expand(*seen.shape[:2], length)


def _per_head(name: str, what: str, query: Tensor, given: float | Tensor) -> Tensor:
    """A number, or one per head, as (1, H or 1, 1) in the accumulation dtype."""
    acc, heads = accumulation_dtype(query.dtype), query.shape[1]
    if not isinstance(given, Tensor):
        if not isinstance(given, numbers.Real) or isinstance(given, bool):
            raise TypeError(f"{name}: {what} must be a float or a tensor, got {given!r} of type {type(given).__name__}")
        return query.new_full((1, 1, 1), float(given), dtype=acc)
    _check_floating(name, what, given, query)
    if not has_shape(given, (), (1,), (heads,)):
        raise ValueError(f"{name}: {what} must be a float or of shape () or ({heads},), got {_shape(given)}")
    return given.to(acc).view(1, -1, 1)


@alone_in_child
def threshold_rectified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: float | Tensor,
    relu_power: float = 2,
    *,
    normalize: bool = True,
    is_causal: bool = True,
    return_mass: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cosines above an analytic threshold, to a power: one map of threshold differential attention.

    w_ij = relu(cos(q_i, k_j) - beta sqrt(2 ln(n_i + 1) / D))^p,  n_i = position of query i + 1;  out_i = sum_j w_ij v_j

    Args:
        q: (B, H, L, D).
        k, v: (B, H_kv, S, D) and (B, H_kv, S, D_v), where H_kv divides H. The last query has the position of the last key.
        beta: A float, or a tensor () or (H,), with a gradient.
        relu_power: p, positive.
        normalize: Whether queries and keys are divided by their norms here; else products are taken as they are.
        is_causal: As for `threshold_attention`; if not, n_i = S.
        return_mass: Whether to return the mass (B, H, L) too.
        backend: As for `threshold_attention`.
    Returns:
        (B, H, L, D_v), in q's dtype.
    Raises:
        TypeError, ValueError, NoBackendError: As `threshold_attention`.
    Source: arXiv 2601.12145; docs/lazy.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> q, k, v = torch.randn(3, 2, 4, 50, 16).unbind()
        >>> diffmax.threshold_rectified_attention(q, k, v, 0.5).shape
        torch.Size([2, 4, 50, 16])
    """
    name = "diffmax.threshold_rectified_attention"
    check_flag(name, "return_mass", return_mass)
    dtype, out, mass = _rectified(name, q, k, v, beta, relu_power, normalize, is_causal, backend)
    return (out.to(dtype), mass) if return_mass else out.to(dtype)


def _rectified(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: float | Tensor,
    relu_power: float,
    normalize: bool,
    is_causal: bool,
    backend: str | None,
) -> tuple[torch.dtype, Tensor, Tensor]:
    """The dtype of the result; the result, which is not rounded yet where cosines were taken; and mass."""
    check_flag(name, "normalize", normalize)
    check_power(name, relu_power, "relu_power")
    q, k, v = autocast(q, k, v)
    check_tensors(name, q, k, v, "BHLD")
    check_heads(name, q.shape[1], k.shape[1], True)
    given = _per_head(name, "beta", q, beta)
    count = _visible(name, q, k, is_causal, None).to(given.dtype)
    theta = given * (2 * torch.log1p(count) / max(q.shape[3], 1)).sqrt()
    dtype = q.dtype
    if normalize:
        q, k, v = _unit(q), _unit(k), v.to(accumulation_dtype(dtype))
    with without_autocast(q):
        out, mass = threshold_attention(
            q, k, v, theta, power=relu_power, scale=1.0, is_causal=is_causal, return_mass=True, backend=backend
        )
    return dtype, out, mass


def _unit(t: Tensor) -> Tensor:
    """Vectors divided by their norm, in the accumulation dtype, where squares may be no floats; 0 stays 0.

    So do subnormal numbers, whose digits are lost, and whose gradient no float holds.
    """
    t = t.to(accumulation_dtype(t.dtype))
    if t.shape[-1] == 0:
        return t
    largest = t.detach().abs().amax(-1, keepdim=True)
    none = largest < torch.finfo(t.dtype).tiny
    t = (t / largest.masked_fill(none, 1.0)).masked_fill(none, 0.0)
    norm = t.square().sum(-1, keepdim=True)  # from 1 to D, or 0
    return t * norm.masked_fill(norm == 0, 1.0).rsqrt()


@alone_in_child
def threshold_differential_attention(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    v: Tensor,
    beta: float | Tensor,
    lambda_: float | Tensor,
    relu_power: float = 2,
    normalize: bool = True,
    *,
    is_causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Threshold differential attention: the difference of two maps of `threshold_rectified_attention`.

    out = (w(q1, k1) - lambda w(q2, k2)) v

    Args:
        q1, q2: (B, H, L, D).
        k1, k2, v: (B, H_kv, S, D) and (B, H_kv, S, D_v).
        beta, lambda_: A float, or a tensor () or (H,), with gradients. lambda is taken as it is.
        relu_power, normalize, is_causal, backend: As there.
    Returns:
        (B, H, L, D_v), in q1's dtype.
    Raises:
        TypeError, ValueError, NoBackendError: As there.
    Source: arXiv 2601.12145; docs/lazy.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> q1, q2, k1, k2, v = torch.randn(5, 2, 4, 50, 16).unbind()
        >>> diffmax.threshold_differential_attention(q1, q2, k1, k2, v, 0.5, 0.3).shape
        torch.Size([2, 4, 50, 16])
    """
    name = "diffmax.threshold_differential_attention"
    for what, first, second in (("q", q1, q2), ("k", k1, k2)):
        check_tensor(name, f"{what}1", first)
        check_tensor(name, f"{what}2", second)
        if first.shape[:-1] != second.shape[:-1]:
            raise ValueError(
                f"{name}: {what}1 and {what}2 must have the same shape but for the last size, got {_shape(first)} and "
                f"{_shape(second)}\n"
                "the second map is subtracted from the first, weight by weight"
            )
    share = _per_head(name, "lambda_", q1, lambda_).unsqueeze(3)
    (dtype, positive, _), (_, negative, _) = (
        _rectified(name, q, k, v, beta, relu_power, normalize, is_causal, backend) for q, k in ((q1, k1), (q2, k2))
    )
    return (positive - share * negative).to(dtype)
