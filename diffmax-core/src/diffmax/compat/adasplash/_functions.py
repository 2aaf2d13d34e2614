"""AdaSplash's functions, implemented with diffmax's; the package and its submodules export them."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from diffmax.operators.attention.api import attention
from diffmax.operators.attention.checks import check_alibi, check_tensors
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import _dtype, _readable, _shape, check_scores, not_an_alpha
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.rows.api import diffmax_bisect, normalize


def adasplash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = True,
    varlen: Tensor | None = None,
    niter: int | None = None,
) -> Tensor:
    """Attention with alpha'-entmax weights, scaled by 1 / sqrt(D): `diffmax.attention` with alpha = 2 - alpha'.

    Args:
        q: (B, H, N, D), any strides.
        k, v: (B, H_kv, M, D), where H is a multiple of H_kv.
        alpha: alpha', in (1, 2]; 2 is sparsemax. A tensor () or (H,) may require a gradient.
        is_causal: Query i sees the keys 0 to i.
        varlen: (B,), int32 or int64: the length of each sequence without padding, which is on the right. Padding queries get 0.
        niter: No effect.
    Returns:
        (B, H, N, D), like q.
    Raises:
        TypeError, ValueError: As `diffmax.attention`; or alpha or varlen does not fit.
    Source: docs/attention.md; the signature is AdaSplash's (BSD-3-Clause). Written for diffmax.
    Example:
        >>> import torch
        >>> x = torch.randn(2, 4, 100, 24)
        >>> adasplash(x, x, x, alpha=1.75, varlen=torch.tensor([100, 60]))[1, :, 60:].abs().max()
        tensor(0.)
    """
    if is_captured(q, k, v, alpha, varlen):
        return captured(adasplash, q, k, v, alpha, is_causal, varlen, niter)  # type: ignore[no-any-return]
    name = "adasplash"
    check_tensors(name, q, k, v, "BHLD")
    mask = None
    if varlen is not None:
        queries, keys = _valid_tokens(name, varlen, q.shape, k.shape[2])
        # padding may hold NaN, and 0 times NaN is NaN
        q, k, v, mask = q.masked_fill(~queries, 0), k.masked_fill(~keys, 0), v.masked_fill(~keys, 0), keys.mT
    out = attention(
        q, k, v, mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1], alpha=_our_alpha(name, alpha, q.device)
    )
    return out if varlen is None else out.masked_fill(~queries, 0)


def adasplash_v1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int = 10,
) -> Tensor:
    """`adasplash`, by default not causal."""
    return adasplash(q, k, v, alpha, is_causal, varlen, niter)


def adasplash_no_block_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int = 10,
) -> Tensor:
    """`adasplash_v1`."""
    return adasplash(q, k, v, alpha, is_causal, varlen, niter)


def adasplash_v2(q: Tensor, k: Tensor, v: Tensor, niter: int = 1, varlen: Tensor | None = None) -> Tensor:
    """`adasplash`, causal and with alpha' = 1.5."""
    return adasplash(q, k, v, 1.5, True, varlen, niter)


adasplash2 = adasplash_v2


def triton_entmax(
    x: Tensor, alpha: float | Tensor = 1.5, n_iter: int = 2, use_histogram: bool = True, fast_math: bool = False
) -> Tensor:
    """alpha'-entmax of the last dimension: `diffmax_bisect` with alpha = 2 - alpha'.

    Args:
        x: Scores, any shape and strides.
        alpha: alpha', in (1, 2]; or a tensor that broadcasts against x with its last dimension reduced to 1.
        n_iter, use_histogram, fast_math: No effect.
    Raises:
        TypeError, ValueError: As `diffmax_bisect`.
    Example:
        >>> import torch
        >>> triton_entmax(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        tensor([0.8307, 0.1693, 0.0000, 0.0000])
    """
    if is_captured(x, alpha):
        return captured(triton_entmax, x, alpha)  # type: ignore[no-any-return]
    dim = check_scores("triton_entmax", x, -1, 50)
    ours = _our_alpha("triton_entmax", alpha, None)
    if isinstance(ours, Tensor) and not isinstance(alpha, Tensor):
        return normalize(x, 1.0, None, dim, 50, True)
    return diffmax_bisect(x, ours)


triton_entmax_v2 = triton_entmax


def triton_entmax_v1(x: Tensor, alpha: float | Tensor = 1.5, n_iter: int = 10, fast_math: bool = True) -> Tensor:
    """`triton_entmax`."""
    return triton_entmax(x, alpha)


def triton_sparsemax(x: Tensor, **kwargs: Any) -> Tensor:
    """`triton_entmax` with alpha' = 2."""
    return triton_entmax(x, 2.0, **kwargs)


def triton_entmax15(x: Tensor, **kwargs: Any) -> Tensor:
    """`triton_entmax` with alpha' = 1.5."""
    return triton_entmax(x, 1.5, **kwargs)


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    varlen: Tensor | None = None,
    is_causal: bool = False,
    padding: str = "right",
    niter: int = 2,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`adasplash` with padding on either side, causality aligned at the lower right, and ALiBi slopes that are added.

    Args:
        q: (B, H, N, D), any strides.
        k, v: (B, H, M, D).
        alpha: alpha', in (1, 2], or a tensor.
        varlen: (B,): the length of each sequence without padding. Padding queries get 0 if N equals M.
        is_causal: Aligned at the lower right: the last query has the position of the last key.
        padding: "right" or "left": the side of the padding.
        niter: No effect.
        alibi_slopes: (H,): slope * (j - i) is added to the score of key j; for a single query, slope * (j - M + 1).
    Returns:
        (B, H, N, D), like q.
    Raises:
        TypeError, ValueError: As `adasplash`; or padding is neither side.
    Example:
        >>> import torch
        >>> x = torch.randn(2, 4, 10, 24)
        >>> entmax_attention(x, x, x, varlen=torch.tensor([10, 6]), padding="left")[1, :, :4].abs().max()
        tensor(0.)
    """
    name = "entmax_attention"
    check_tensors(name, q, k, v, "BHLD")
    if padding not in ("right", "left"):
        raise ValueError(f'{name}: padding must be "right" or "left", got {padding!r}')
    length, num_keys = q.shape[2], k.shape[2]
    mask: Tensor | None = None
    queries: Tensor | None = None
    if varlen is not None:
        inside, keys = _valid_tokens(name, varlen, q.shape, num_keys)
        if padding == "left":
            inside, keys = inside.flip(2), keys.flip(2)
        k, v, mask = k.masked_fill(~keys, 0), v.masked_fill(~keys, 0), keys.mT
        queries = inside if length == num_keys else None
        q = q if queries is None else q.masked_fill(~queries, 0)
    if alibi_slopes is not None:
        check_alibi(name, q, alibi_slopes, (q.shape[1],))
        first = num_keys - 1 if length == 1 else 0
        position = torch.arange(length, device=q.device).unsqueeze(1) + first
        bias = alibi_slopes.detach().to(accumulation_dtype(q.dtype)).view(-1, 1, 1) * (
            torch.arange(num_keys, device=q.device) - position
        )
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    out = attention(
        *(q, k, v, mask),
        is_causal=is_causal,
        enable_gqa=q.shape[1] != k.shape[1],
        alpha=_our_alpha(name, alpha, q.device),
        causal_alignment="lower_right",
    )
    return out if queries is None else out.masked_fill(~queries, 0)


def _our_alpha(name: str, alpha: float | Tensor, device: torch.device | None) -> float | Tensor:
    """2 - alpha'; for sparsemax a tensor, because diffmax accepts the limit alpha = 0 only as a tensor."""
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"{name}: alpha must be of a floating dtype, got {_dtype(alpha)}")
        if _readable(alpha) and not bool(((alpha >= 1) & (alpha <= 2)).all()):
            low, high = alpha.detach().aminmax()
            raise ValueError(f"{name}: alpha must lie in [1, 2], got values from {low.item():g} to {high.item():g}")
        return 2 - alpha
    if not isinstance(alpha, numbers.Real) or isinstance(alpha, bool):
        raise not_an_alpha(name, alpha)
    if not 1 < alpha <= 2:
        raise ValueError(
            f"{name}: alpha must lie in (1, 2], got {alpha}\nit is entmax's: 2 is sparsemax, and the limit 1 is torch.softmax"
        )
    return torch.zeros((), device=device) if alpha == 2 else 2 - float(alpha)


def _valid_tokens(name: str, varlen: Tensor, shape: torch.Size, keys: int) -> tuple[Tensor, Tensor]:
    """Masks of the queries and keys that are not padding, (B, 1, N, 1) and (B, 1, M, 1)."""
    batch, _, length, _ = shape
    if not isinstance(varlen, Tensor) or varlen.dtype not in (torch.int32, torch.int64) or varlen.shape != (batch,):
        got = f"{_shape(varlen)} {_dtype(varlen)}" if isinstance(varlen, Tensor) else type(varlen).__name__
        raise ValueError(f"{name}: varlen must be int32 or int64 of shape ({batch},), one length per sequence, got {got}")
    longest = max(length, keys)
    if _readable(varlen) and not bool(((varlen >= 0) & (varlen <= longest)).all()):
        raise ValueError(f"{name}: varlen must lie between 0 and the sequences' length, {longest}, got {varlen.tolist()}")
    lengths = varlen.view(-1, 1, 1, 1)
    queries, visible = (torch.arange(n, device=varlen.device).view(-1, 1) < lengths for n in (length, keys))
    return queries, visible
