"""retention's functions, on those of power-attention's compatibility."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffmax.compat.power_attention import _functions, _states
from diffmax.compat.power_attention._functions import given_state
from diffmax.operators.attention.checks import check_tensors
from diffmax.operators.common.checks import as_int, check_flag, check_tensor, is_whole
from diffmax.operators.power import parts
from diffmax.operators.power.checks import check_chunk, check_degree
from diffmax.operators.power.state import PowerState


def attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    deg: int,
    causal: bool = True,
    head_first: bool = False,
    scale: float = 1.0,
    norm: bool = False,
    use_log2: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`diffmax.compat.power_attention.attention`, without r and w."""
    return _functions.attention(
        Q, K, V, log_G, deg, causal=causal, head_first=head_first, scale=scale, norm=norm, use_log2=use_log2
    )


def power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    sum_of_keys: Tensor | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
    original_t: int | None = None,
    *,
    state_layout: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
    """`diffmax.power_attention` in the layout (b, t, h, d), with retention's argument names.

    Args:
        Q: (b, tq, hq, d), any strides.
        K, V: (b, tk, h, d) and (b, tk, h, e), where h divides hq. tk >= tq, and the last query has the position of the last
            key.
        log_G: (b, tk, h), floating, not cumulated: before key j is added, all before it is multiplied by exp(log_G_j).
        initial_state, sum_of_keys: The state before the first key, (b, h, D, e) and (b, h, D), in any layout: which one is
            told by D. Both or neither; may require gradients.
        return_final_state: Whether to return the state after the last key too.
        deg: Degree, even, from 2.
        scale: Factor of the products, not 0; None: 1 / sqrt(d). It cancels, up to rounding.
        chunk_size: Tokens between states; need not divide t. At least t: the quadratic form. None: chosen by cost.
        switch_over_seq_len: Up to this length the quadratic form is taken. Where it is longer than the chunks of a sequence
            without an initial state, there is no final state: keys are to be kept.
        original_t: How many tokens are none of padding: the final state is of the whole chunks among them. None: all.
        state_layout: Of the final state: "tiled" is theirs, for degree 2 and d a multiple of 16; "exact" is diffmax's. None:
            that of `initial_state`; without one, theirs where it exists.
        backend: As in `diffmax.attention`.
    Returns:
        (b, tq, hq, e), contiguous. If requested, also the final state (b, h, D, e), in the dtype of `initial_state` or else of
        Q, and its sums of keys (b, h, D), in float32 (float64 for float64); None twice, if there is none.
    Raises:
        TypeError, ValueError, NoBackendError: As `diffmax.power_attention`; or one of state and sums of keys is missing.
    Source: the signature is retention's (Apache-2.0). Written for diffmax.
    Example:
        >>> import torch
        >>> Q, K, V = torch.randn(3, 2, 100, 4, 32).unbind()
        >>> O, S, s = power_retention(Q, K, V, return_final_state=True, chunk_size=32)
        >>> O, S, s = power_retention(Q, K, V, initial_state=S, sum_of_keys=s, return_final_state=True)
        >>> O.shape, S.shape, s.shape
        (torch.Size([2, 100, 4, 32]), torch.Size([2, 4, 768, 32]), torch.Size([2, 4, 768]))
    """
    name = "power_retention"
    check_tensor(name, "K", K)
    _check_both(name, initial_state, sum_of_keys)
    final = check_flag(name, "return_final_state", return_final_state)
    chunk = check_chunk(name, chunk_size) or None
    switch, original = _count(name, "switch_over_seq_len", switch_over_seq_len), _count(name, "original_t", original_t)
    many = K.shape[1] if K.ndim > 1 else 0
    padded = many if chunk is None else -(-many // chunk) * chunk
    is_short = switch is not None and initial_state is None and padded < switch
    kept = None
    if original is not None and original < padded:
        step = padded if chunk is None else chunk
        kept = min(original // max(step, 1) * step, many)
    found = _functions.retention(
        *(name, Q, K, V, log_G, initial_state, sum_of_keys),
        final=final and not is_short,
        deg=deg,
        scale=scale,
        chunk_size=max(many, 1) if switch is not None and initial_state is None and many <= switch else chunk,
        layout=state_layout,
        backend=backend,
        kept=kept,
    )
    return (found.out, found.S, found.s) if final else found.out


def power_retention_inference(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    sum_of_keys: Tensor | None = None,
    deg: int = 2,
    scale: float | None = None,
    switch_over_seq_len: int | None = 512,
    *,
    state_layout: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A step of decoding with a tail of keys and a state of all before them: `diffmax.power.inference`.

    A tail of `switch_over_seq_len` tokens is folded into the state that is returned: then the next call gets that state, and a
    tail that begins anew.

    Args:
        Q: (b, tq, hq, d): the last tokens, whose keys are the last of the tail.
        K, V: (b, tk, h, d) and (b, tk, h, e), with tk >= tq: the tail. None, both: all is in the state.
        log_G: (b, tk, h), floating, of the tail, not cumulated.
        initial_state, sum_of_keys: The state before the tail, (b, h, D, e) and (b, h, D), in any layout. Sums of keys without
            a state are not used, and returned.
        deg: Degree, even, from 2.
        scale: Factor of the products, not 0; None: 1 / sqrt(d). It cancels, up to rounding.
        switch_over_seq_len: Tokens of a tail that is folded. None: it never is.
        state_layout, backend: As for `power_retention`.
    Returns:
        (b, tq, hq, e), contiguous; the state and its sums of keys: after the tail, if it was folded, or as they were given.
    Raises:
        TypeError, ValueError, NoBackendError: As `power_retention`; or there is neither a tail nor a state.
    Source: the signature is retention's (Apache-2.0). Written for diffmax.
    Example:
        >>> import torch
        >>> Q, K, V = torch.randn(3, 1, 512, 4, 32).unbind()
        >>> O, S, s = power_retention_inference(Q[:, -1:], K, V)
        >>> O, S, s = power_retention_inference(Q[:, :1], K[:, :1], V[:, :1], None, S, s)
        >>> O.shape, S.shape
        (torch.Size([1, 1, 4, 32]), torch.Size([1, 4, 768, 32]))
    """
    name = "power_retention_inference"
    given, sum_of_keys = sum_of_keys, None if initial_state is None else sum_of_keys
    _check_both(name, initial_state, sum_of_keys)
    switch = _count(name, "switch_over_seq_len", switch_over_seq_len)
    if (K is None) != (V is None):
        raise ValueError(f"{name}: K and V must be given both or neither")
    if K is None or V is None:
        if initial_state is None or sum_of_keys is None:
            raise ValueError(f"{name}: there must be a tail or an initial state, got neither")
        if log_G is not None:
            raise ValueError(f"{name}: log_G is of a tail, and there is none")
        return _of_state(name, Q, initial_state, sum_of_keys, deg, scale), initial_state, sum_of_keys
    query, key, value = _functions._heads_first(name, Q, K, V)
    check_tensors(name, query, key, value, "BHLD")
    folds = switch is not None and key.shape[2] >= switch
    found = _functions.retention(
        *(name, Q, K, V, log_G, initial_state, sum_of_keys),
        final=folds,
        deg=deg,
        scale=scale,
        chunk_size=None,
        layout=state_layout,
        backend=backend,
    )
    return (found.out, found.S, found.s) if folds else (found.out, initial_state, given)


def _of_state(name: str, Q: Tensor, S: Tensor, s: Tensor, deg: int, scale: float | None) -> Tensor:
    (query,) = _functions._heads_first(name, Q)
    degree = check_degree(name, deg)
    _states.check_pair(name, S, s, "initial_state", "sum_of_keys")
    like = query[:, :1, :0].expand(-1, S.shape[1] if S.ndim > 1 else 0, -1, -1)
    state, _, _ = given_state(name, query, like, S[..., :0, :] if S.ndim == 4 else like, S, s, degree, None)
    if scale is not None:
        scale = _functions._check_scale(name, query, scale)
    assert isinstance(state, PowerState)  # noqa: S101  # one was given
    return parts.query_state(query, state, degree=degree, scale=scale).transpose(1, 2).contiguous()


def _check_both(name: str, S: Any, s: Any) -> None:
    if (S is None) != (s is None):
        missing = "sum_of_keys" if s is None else "initial_state"
        raise ValueError(f"{name}: initial_state and sum_of_keys must be given both or neither, {missing} is missing")


def _count(name: str, what: str, count: Any) -> int | None:
    if count is None:
        return None
    if not is_whole(count):
        raise TypeError(f"{name}: {what} must be an int or None, got {count!r} of type {type(count).__name__}")
    if count < 0:
        raise ValueError(f"{name}: {what} must not be negative, got {count}")
    return as_int(count)
