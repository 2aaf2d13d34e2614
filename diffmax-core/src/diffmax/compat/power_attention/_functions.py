"""The functions of power-attention and retention, by those of `diffmax.power`; the packages and their submodules export them.

Layout (b, t, h, d), chunks (b, n, c, h, d), states (b, h, D, e). What is theirs and not kept: docstring of the package.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.compat.power_attention import _states
from diffmax.compat.power_attention._states import Layout
from diffmax.operators.attention.checks import check_heads, check_scale, check_tensors
from diffmax.operators.common.autocast import without_autocast
from diffmax.operators.common.checks import _shape, as_int, check_flag, check_tensor, is_whole
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power import parts
from diffmax.operators.power.api import power_attention
from diffmax.operators.power.checks import check_chunk, check_degree
from diffmax.operators.power.state import PowerState
from diffmax.operators.power.symmetric import coefficients, even_power, monomials


class ChunkState(NamedTuple):
    """The state that `power_full` returns and takes.

    Attributes:
        S: (b, h, D, e), in the dtype of the inputs.
        s: (b, h, D), sums of keys, float32 (float64 for float64).
    """

    S: Tensor
    s: Tensor


class Result(NamedTuple):
    """What `retention` returns."""

    out: Tensor
    S: Tensor | None
    s: Tensor | None


def compute_expanded_dim(d: int, deg: int = 2) -> int:
    """D, the number of rows of a state as functions return it by default.

    Theirs, 256 C(d / 16 + 1, 2), for degree 2 and a multiple of 16; else C(d + deg - 1, deg), where they have none.

    Args:
        d: Size of a head.
        deg: Degree.
    Raises:
        TypeError, ValueError: Not integers, or not from 1.
    Example:
        >>> compute_expanded_dim(64, 2), compute_expanded_dim(16, 4), compute_expanded_dim(20, 2)
        (2560, 3876, 210)
    """
    exact = parts.expanded_dim(d, deg)
    layout = _states.default_layout(as_int(d), as_int(deg))
    return exact if layout == "exact" else _states.rows(layout, as_int(d), as_int(deg))


def default_D(d: int, deg: int, d_tile: int | None = None) -> int:  # noqa: N802  # theirs
    """D in vidrial's layout.

    Args:
        d: Size of a head.
        deg: Degree.
        d_tile: Size of a tile, which divides d. None: vidrial's default.
    Raises:
        TypeError, ValueError: As `diffmax.power.tiled_dim`.
    Example:
        >>> default_D(32, 2), default_D(32, 2, d_tile=4), default_D(128, 2)
        (640, 576, 8256)
    """
    return _states.rows(_states.vidrial_tile("default_D", d, deg, d_tile), d, deg)


def attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    deg: int,
    r: int = 1,
    w: int = 1,
    causal: bool = True,
    head_first: bool = False,
    scale: float = 1.0,
    norm: bool = False,
    use_log2: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Power attention by its quadratic form, with gates that are cumulated already.

    Args:
        Q: (b, tq, hq, d), any strides.
        K, V: (b, tk, h, d) and (b, tk, h, e), where h divides hq. The last query has the position of the last key.
        log_G: (b, tk, h), cumulated over time: a weight is multiplied by exp(log_G_i - log_G_j). None: gates of 1.
        deg: Degree, even.
        r: hq / h, or 1: it is found by the shapes.
        w: 1.
        causal: Whether a query sees no key behind its position.
        head_first: Whether heads come before time, (b, h, t, d).
        scale: Factor of the products.
        norm: Whether to divide by the sum of weights.
        use_log2: Whether log_G and rowmax are logarithms to the base 2.
    Returns:
        With `norm` the result (b, tq, hq, e). Else the sums of w v / exp(rowmax), in V's dtype, of w / exp(rowmax) (b, tq,
        hq), and rowmax (b, tq, hq), the logarithm of the largest weight, through which no gradient flows; both float32
        (float64 for float64).
    Raises:
        TypeError, ValueError: As `diffmax.power.attention`.
    Source: the signature is power-attention's (Apache-2.0). Written for diffmax.
    Example:
        >>> x = torch.randn(2, 10, 4, 16)
        >>> Y, l, rowmax = attention(x, x, x, None, 2)
        >>> Y.shape, l.shape
        (torch.Size([2, 10, 4, 16]), torch.Size([2, 10, 4]))
    """
    name = "attention"
    head_first, causal = check_flag(name, "head_first", head_first), check_flag(name, "causal", causal)
    norm, use_log2 = check_flag(name, "norm", norm), check_flag(name, "use_log2", use_log2)
    q, k, v = (Q, K, V) if head_first else _heads_first(name, Q, K, V)
    check_tensors(name, q, k, v, "BHLD")
    check_heads(name, q.shape[1], k.shape[1], True)
    degree, scale = check_degree(name, deg), _check_scale(name, q, scale)
    groups, (length, many) = q.shape[1] // max(k.shape[1], 1), (q.shape[2], k.shape[2])
    if r not in (1, groups) or w != 1:
        raise ValueError(f"{name}: r must be 1 or query heads over key heads, {groups}, and w must be 1, got {r} and {w}")
    if length > many:
        raise ValueError(f"{name}: there must be at least as many keys as queries, got {many} keys and {length} queries")
    axes, given = ("(b, h, tk)", k) if head_first else ("(b, tk, h)", K)
    acc = accumulation_dtype(q.dtype)
    with without_autocast(q):
        scores = parts._grouped(q, k) @ k.to(acc).unsqueeze(2).mT * scale
        away = scores.new_zeros(())
        if log_G is not None:
            g = parts.check_log_gates(name, "log_G", log_G, given, axes)
            g = (g if head_first else g.transpose(1, 2)) * (math.log(2) if use_log2 else 1.0)
            away = (g[..., many - length :].unsqueeze(-1) - g.unsqueeze(-2)).unsqueeze(2)
        hidden = parts._hidden(length, many, q.device) if causal else None
        with torch.no_grad():
            logs = degree * scores.abs().log() + away
            logs = logs if hidden is None else logs.masked_fill(hidden, -torch.inf)
            rowmax = logs.amax(-1, keepdim=True) if many else scores.new_zeros((*scores.shape[:-1], 1))
            rowmax = rowmax.masked_fill(rowmax == -torch.inf, 0.0)
        away = away - rowmax
        away = away if hidden is None else away.masked_fill(hidden, -torch.inf)
        # a power of at most 1: the decay is inside it, where a large score meets a small gate; a score of 0 meets any
        exponent = away / degree
        weights = even_power(scores * torch.where(scores == 0, exponent.clamp_max(40.0), exponent).exp(), degree)
        totals, sums = weights.sum(-1), weights @ v.to(acc).unsqueeze(2)
        if norm:
            out = parts._result(q, sums, totals, True)
            assert isinstance(out, Tensor)  # noqa: S101  # normalised
            return out if head_first else out.transpose(1, 2).contiguous()
        found = [t.reshape(*q.shape[:3], *t.shape[4:]) for t in (sums.to(v.dtype), totals, rowmax.squeeze(-1))]
    Y, totals, rowmax = (t if head_first else t.transpose(1, 2).contiguous() for t in found)
    return Y, totals, rowmax / math.log(2) if use_log2 else rowmax


def update_state(K: Tensor, V: Tensor, deg: int, *, state_layout: str | None = None) -> tuple[Tensor, Tensor]:
    """The state of each chunk by itself.

    Args:
        K, V: (b, n, c, h, d) and (b, n, c, h, e); or (b, c, h, d) and (b, c, h, e), a single chunk.
        deg: Degree, even.
        state_layout: "tiled" is theirs, for degree 2 and d a multiple of 16; "exact" is diffmax's. None: theirs where it
            exists.
    Returns:
        S (b, n, h, D, e) in K's dtype, and s (b, n, h, D), the sums of keys, in float32 (float64 for float64). Both without n
        for a single chunk.
    Raises:
        TypeError, ValueError: As `diffmax.power.update_state`.
    Source: the signature is power-attention's (Apache-2.0). Written for diffmax.
    Example:
        >>> S, s = update_state(torch.randn(1, 2, 100, 4, 32), torch.randn(1, 2, 100, 4, 32), 2)
        >>> S.shape, s.shape
        (torch.Size([1, 2, 4, 768, 32]), torch.Size([1, 2, 4, 768]))
    """
    name = "update_state"
    degree, size = check_degree(name, deg), _size(name, "K", K)
    return _update_state(name, K, V, degree, _states.check_layout(name, state_layout, size, degree))


def update_state_vidrial(K: Tensor, V: Tensor, deg: int, d_tile: int | None = None) -> tuple[Tensor, Tensor]:
    """`update_state` in vidrial's layout of tiles of `d_tile`, by default vidrial's."""
    name = "update_state_vidrial"
    degree = check_degree(name, deg)
    return _update_state(name, K, V, degree, _states.vidrial_tile(name, _size(name, "K", K), degree, d_tile))


def _update_state(name: str, K: Tensor, V: Tensor, degree: int, layout: Layout) -> tuple[Tensor, Tensor]:
    check_tensor(name, "V", V)
    if K.ndim not in (4, 5) or K.ndim != V.ndim or K.shape[:-1] != V.shape[:-1]:
        raise ValueError(
            f"{name}: K and V must have shapes (b, n, c, h, d) and (b, n, c, h, e), got {_shape(K)} and {_shape(V)}"
        )
    key, value = (t.movedim(-2, -3).flatten(0, -4) for t in (K, V))
    found = parts.update_state(key, value, degree=degree)
    S, s = _states.from_exact(found, layout, K.shape[-1], degree, K.dtype)
    if K.ndim == 5:
        return S.view(*K.shape[:2], *S.shape[1:]), s.view(*K.shape[:2], *s.shape[1:])
    return S, s


def query_state(
    Q: Tensor,
    S: Tensor,
    s: Tensor,
    Y_attn: Tensor | None,
    l_attn: Tensor | None,
    rowmax: Tensor | None,
    deg: int,
    scale: float,
    zero_initial_state: bool = True,
) -> Tensor:
    """What queries read of the states before their chunks, put together with attention inside the chunks.

    Args:
        Q: (b, n, c, hq, d); or (b, c, hq, d) with a state (b, h, D, e). With gates times exp(G / deg), G the sum since the
            chunk began.
        S, s: (b, n, h, D, e) and (b, n, h, D), where h divides hq, in any of the layouts: which one is told by D.
        Y_attn, l_attn, rowmax: What `attention` returned, (b, n, c, hq, e) and twice (b, n, c, hq). None, all three: the
            states alone.
        deg: Degree, even.
        scale: The factor of the products in `attention`.
        zero_initial_state: No effect: it chose between stabilisers.
    Returns:
        (b, n, c, hq, e) in Q's dtype, divided by the sum of weights; 0 where that is.
    Raises:
        TypeError, ValueError: Types, shapes, devices or values do not fit.
    Source: the signature is power-attention's (Apache-2.0). Written for diffmax.
    Example:
        >>> K, V = torch.randn(2, 1, 100, 4, 32).unbind()
        >>> query_state(torch.randn(1, 10, 4, 32), *update_state(K, V, 2), None, None, None, 2, 1.0).shape
        torch.Size([1, 10, 4, 32])
    """
    name = "query_state"
    size, degree = _size(name, "Q", Q), check_degree(name, deg)
    _states.check_pair(name, S, s, "S", "s")
    layout = _states.layout_of(name, "S", S.shape[-2], size, degree)
    return _query_state(name, Q, S, s, (Y_attn, l_attn, rowmax), degree, scale, layout)


def query_state_vidrial(
    Q: Tensor,
    S: Tensor,
    s: Tensor,
    Y_attn: Tensor | None,
    l_attn: Tensor | None,
    rowmax: Tensor | None,
    deg: int,
    scale: float,
    zero_initial_state: bool = True,
    d_tile: int | None = None,
) -> Tensor:
    """`query_state` of states in vidrial's layout of tiles of `d_tile`, by default vidrial's."""
    name = "query_state_vidrial"
    size, degree = _size(name, "Q", Q), check_degree(name, deg)
    _states.check_pair(name, S, s, "S", "s")
    tile = _states.vidrial_tile(name, size, degree, d_tile)
    if S.shape[-2] != _states.rows(tile, size, degree):
        raise ValueError(f"{name}: S must have {_states.rows(tile, size, degree)} rows for tiles of {tile}, got {S.shape[-2]}")
    return _query_state(name, Q, S, s, (Y_attn, l_attn, rowmax), degree, scale, tile)


def _query_state(
    name: str, Q: Tensor, S: Tensor, s: Tensor, inside: tuple[Any, Any, Any], degree: int, scale: float, layout: Layout
) -> Tensor:
    if Q.ndim not in (4, 5) or S.ndim != Q.ndim:
        raise ValueError(
            f"{name}: Q and S must have shapes (b, n, c, hq, d) and (b, n, h, D, e), got {_shape(Q)} and {_shape(S)}"
        )
    if Q.shape[:-3] != S.shape[:-3]:
        raise ValueError(f"{name}: Q and S must have the same batch and chunks, got {_shape(Q)} and {_shape(S)}")
    heads = S.shape[-3]
    check_heads(name, Q.shape[-2], heads, True)
    scale, size, acc = _check_scale(name, Q, scale), Q.shape[-1], accumulation_dtype(Q.dtype)
    with without_autocast(Q):
        state = _states.to_exact(S, s, layout, size, degree, acc)
        q = (Q.to(acc) * scale).movedim(-2, -3)
        q = q.reshape(*q.shape[:-3], heads, q.shape[-3] // max(heads, 1), *q.shape[-2:])
        phi = monomials(q, degree)
        phi = phi * coefficients(size, degree, phi)  # (..., h, hq / h, c, P)
        Y = (phi @ state.sums.unsqueeze(-3)).flatten(-4, -3).movedim(-3, -2)
        totals = (phi @ state.norm.unsqueeze(-2).unsqueeze(-1)).squeeze(-1).flatten(-3, -2).movedim(-2, -1)
        if any(t is not None for t in inside):
            if not all(isinstance(t, Tensor) for t in inside):
                raise TypeError(f"{name}: Y_attn, l_attn and rowmax must be tensors, or all None")
            for what, t, wanted in zip(
                ("Y_attn", "l_attn", "rowmax"), inside, (Y.shape, totals.shape, totals.shape), strict=True
            ):
                if t.shape != wanted:
                    raise ValueError(f"{name}: {what} must have shape {tuple(wanted)}, got {_shape(t)}")
            logs = inside[2].detach().to(acc)
            least = logs.clamp_min(0.0)  # of what is read in units of exp(least), nothing overflows
            own, read = (logs - least).exp(), (-least).exp()
            Y = Y * read.unsqueeze(-1) + inside[0].to(acc) * own.unsqueeze(-1)
            totals = totals * read + inside[1].to(acc) * own
        return _divided(Y, totals).to(Q.dtype)


def discumsum(X: Tensor, log_G: Tensor | None) -> Tensor:
    """`diffmax.power.discumsum` in the layout (b, t, h, ...): the states before each chunk and after the last.

    Args:
        X: (b, t, h, ...), any t and any further dimensions.
        log_G: (b, t, h), floating. None: gates of 1.
    Returns:
        (b, t + 1, h, ...), of which the first is 0, in X's dtype.
    Raises:
        TypeError, ValueError: As `diffmax.power.discumsum`.
    Source: the signature is power-attention's (Apache-2.0). Written for diffmax.
    Example:
        >>> discumsum(torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    name = "discumsum"
    check_tensor(name, "X", X)
    if X.ndim < 3:
        raise ValueError(f"{name}: X must have 3 dimensions (b, t, h, ...) or more, got {_shape(X)}")
    return parts.sum_over_time(X, parts.check_log_gates(name, "log_G", log_G, X, "(b, t, h)"), 1)


def power_full(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    *,
    state_layout: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ChunkState]:
    """`diffmax.power_attention` in the layout (b, t, h, d), with power-attention's argument names.

    Args:
        Q: (b, tq, hq, d), any strides.
        K, V: (b, tk, h, d) and (b, tk, h, e), where h divides hq. tk >= tq, and the last query has the position of the last
            key.
        log_G: (b, tk, h), floating, not cumulated: before key j is added, all before it is multiplied by exp(log_G_j).
        initial_state: The state before the first key, a pair (S, s) as this function returns it, in any layout; may require
            gradients. Gates apply to it.
        return_final_state: Whether to return the state after the last key too.
        deg: Degree, even, from 2.
        scale: Factor of the products, not 0; None: 1 / sqrt(d). It cancels, up to rounding.
        chunk_size: Tokens between states; need not divide t. At least t: the quadratic form. None: chosen by cost.
        state_layout: Of the state that is returned: "tiled" is theirs, for degree 2 and d a multiple of 16; "exact" is
            diffmax's.
            None: that of `initial_state`; without one, theirs where it exists.
        backend: As in `diffmax.attention`.
    Returns:
        (b, tq, hq, e), contiguous; and a `ChunkState`, if requested, in the dtype of `initial_state` or else of Q.
    Raises:
        TypeError, ValueError, NoBackendError: As `diffmax.power_attention`; or the initial state has no sums of keys.
    Source: the signature is power-attention's (Apache-2.0). Written for diffmax.
    Example:
        >>> Q, K, V = torch.randn(3, 2, 100, 4, 32).unbind()
        >>> O, state = power_full(Q, K, V, return_final_state=True, chunk_size=32)
        >>> O, state = power_full(Q, K, V, initial_state=state, return_final_state=True)
        >>> O.shape, state.S.shape
        (torch.Size([2, 100, 4, 32]), torch.Size([2, 4, 768, 32]))
    """
    return _power_full(
        "power_full", Q, K, V, log_G, initial_state, return_final_state, deg, scale, chunk_size, state_layout, backend
    )


def power_full_vidrial(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, ChunkState]:
    """`power_full` with states in vidrial's layout of its default tiles."""
    name = "power_full_vidrial"
    tile = _states.vidrial_tile(name, _size(name, "K", K), check_degree(name, deg), None)
    return _power_full(name, Q, K, V, log_G, initial_state, return_final_state, deg, scale, chunk_size, tile, None)


def _power_full(
    name: str,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Any,
    final: bool,
    deg: int,
    scale: float | None,
    chunk_size: int | None,
    layout: Any,
    backend: str | None,
) -> Tensor | tuple[Tensor, ChunkState]:
    S = s = None
    if initial_state is not None:
        if not (isinstance(initial_state, tuple) and len(initial_state) == 2):
            raise TypeError(
                f"{name}: initial_state must be a pair (S, s), got {type(initial_state).__name__}\n"
                "S alone does not say what its sums are divided by: pass what a call with return_final_state=True returned"
            )
        S, s = initial_state
    found = retention(
        *(name, Q, K, V, log_G, S, s),
        final=check_flag(name, "return_final_state", final),
        deg=deg,
        scale=scale,
        chunk_size=check_chunk(name, chunk_size) or None,
        layout=layout,
        backend=backend,
    )
    if found.S is None or found.s is None:
        return found.out
    return found.out, ChunkState(found.S, found.s)


def retention(
    name: str,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    S: Tensor | None,
    s: Tensor | None,
    *,
    final: bool,
    deg: int,
    scale: float | None,
    chunk_size: int | None,
    layout: Any,
    backend: str | None,
    kept: int | None = None,
) -> Result:
    """`power_attention` in the layout (b, t, h, d); `kept`: how many of the keys the final state is of, None for all."""
    query, key, value = _heads_first(name, Q, K, V)
    check_tensors(name, query, key, value, "BHLD")
    degree, size = check_degree(name, deg), key.shape[3]
    scale = None if scale is None else _check_scale(name, query, scale)
    gates = None if log_G is None else parts.check_log_gates(name, "log_G", log_G, K, "(b, tk, h)").transpose(1, 2)
    state, own, dtype = given_state(name, query, key, value, S, s, degree, layout)
    options: dict[str, Any] = {"degree": degree, "scale": scale, "chunk_size": chunk_size, "backend": backend}
    if final and kept is None:
        out, end = power_attention(query, key, value, gates, state, return_final_state=True, **options)
    else:
        out, end = power_attention(query, key, value, gates, state, **options), None
        if final:
            some = None if gates is None else gates[:, :, :kept]
            end = parts.update_state(key[:, :, :kept], value[:, :, :kept], some, state, degree=degree)
    out = out.transpose(1, 2).contiguous()
    if end is None:
        return Result(out, None, None)
    return Result(out, *_states.from_exact(end, own, size, degree, dtype))


def given_state(
    name: str, query: Tensor, key: Tensor, value: Tensor, S: Tensor | None, s: Tensor | None, degree: int, layout: Any
) -> tuple[PowerState | None, Layout, torch.dtype]:
    """The initial state in diffmax's layout, and the layout and dtype of the state that is returned."""
    size = key.shape[3]
    is_tile = is_whole(layout)
    if not is_tile and (layout is not None or S is None):
        own: Layout = _states.check_layout(name, layout, size, degree)
    else:
        own = layout if is_tile else "exact"
    if S is None:
        return None, own, query.dtype
    _states.check_pair(name, S, s, "initial_state", "sum_of_keys")
    if S.ndim != 4 or S.shape[:2] != key.shape[:2] or S.shape[3] != value.shape[3]:
        wanted = (*key.shape[:2], "D", value.shape[3])
        raise ValueError(f"{name}: initial_state must have shape (b, h, D, e) = {wanted}, got {_shape(S)}")
    theirs = own if is_tile else _states.layout_of(name, "initial_state", S.shape[2], size, degree)
    if is_tile and S.shape[2] != _states.rows(own, size, degree):
        raise ValueError(f"{name}: initial_state must have {_states.rows(own, size, degree)} rows, got {S.shape[2]}")
    if layout is None:
        own = theirs
    assert s is not None  # noqa: S101  # `check_pair` saw it
    return _states.to_exact(S, s, theirs, size, degree, accumulation_dtype(query.dtype)), own, S.dtype


def _check_scale(name: str, query: Tensor, scale: float | None) -> float:
    found = check_scale(name, query, scale)
    if found == 0:
        raise ValueError(f"{name}: scale must not be 0, where every weight is, got {scale}\nfor 1 / sqrt(d), pass None")
    return found


def _heads_first(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    for what, t in zip("QKV", tensors, strict=False):
        check_tensor(name, what, t)
        if t.ndim != 4:
            raise ValueError(f"{name}: {what} must have 4 dimensions (b, t, h, d), got {_shape(t)}")
    return tuple(t.transpose(1, 2) for t in tensors)


def _size(name: str, what: str, t: Any) -> int:
    check_tensor(name, what, t)
    if t.ndim == 0:
        raise ValueError(f"{name}: {what} must have a last dimension, got {_shape(t)}")
    return int(t.shape[-1])


def _divided(sums: Tensor, totals: Tensor) -> Tensor:
    empty = (totals == 0).unsqueeze(-1)
    return (sums / totals.unsqueeze(-1).masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
