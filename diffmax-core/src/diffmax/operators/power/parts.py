"""What `power_attention` is made of, each part by itself: symmetric powers, quadratic form, states, sums over time, decoding.

Plain PyTorch on any device, differentiable any number of times. Tensors are (B, H, tokens, ...), as everywhere.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from diffmax.operators.attention.checks import check_heads, check_scale, check_tensors
from diffmax.operators.common.autocast import without_autocast
from diffmax.operators.common.checks import _dtype, _shape, as_int, check_flag, check_strided, check_tensor, has_shape, is_whole
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.power import symmetric
from diffmax.operators.power.api import power_attention
from diffmax.operators.power.checks import check_degree, check_gates, check_state
from diffmax.operators.power.state import PowerState
from diffmax.reference.power import cumulated

FEW = 64  # keys whose monomials are computed at once; more go through the operator, which holds a slice of them
State = PowerState | tuple[Tensor, Tensor]


def expanded_dim(size: int, degree: int = 2) -> int:
    """P = C(D + p - 1, p): the number of rows of a state, and of monomials of degree p in D variables.

    Args:
        size: D.
        degree: p, odd or even.
    Raises:
        TypeError, ValueError: Not integers, or not from 1.
    Example:
        >>> expanded_dim(64), expanded_dim(64, 4)
        (2080, 766480)
    """
    return symmetric.expanded_dim(*_size_and_degree("diffmax.power.expanded_dim", size, degree))


def indices(size: int, degree: int = 2) -> Tensor:
    """The variables of each monomial, ascending: the order of a state's rows.

    Args:
        size, degree: As for `expanded_dim`.
    Returns:
        (p, P), int64, on the CPU; its columns are in lexicographic order.
    Raises:
        TypeError, ValueError: As `expanded_dim`.
    Example:
        >>> indices(3).mT.tolist()
        [[0, 0], [0, 1], [0, 2], [1, 1], [1, 2], [2, 2]]
    """
    return symmetric.indices(*_size_and_degree("diffmax.power.indices", size, degree)).clone()


def multiplicities(size: int, degree: int = 2) -> Tensor:
    """How often each monomial occurs in (x_1 + ... + x_D)^p: the multinomial coefficients.

    Args:
        size, degree: As for `expanded_dim`.
    Returns:
        (P,), float64, on the CPU.
    Raises:
        TypeError, ValueError: As `expanded_dim`.
    Example:
        >>> multiplicities(3).tolist()
        [1.0, 2.0, 2.0, 1.0, 2.0, 1.0]
    """
    return symmetric.multiplicities(*_size_and_degree("diffmax.power.multiplicities", size, degree)).clone()


def symmetric_power(x: Tensor, degree: int = 2, multiplicities: bool = False) -> Tensor:
    """The monomials of degree p of vectors; with multiplicities on one side, products of two are powers of products.

    sum(symmetric_power(q, p, True) * symmetric_power(k, p)) = (q . k)^p

    Args:
        x: (..., D), floating.
        degree: p, from 1, odd or even.
        multiplicities: Whether to multiply by them, as `power_attention` does for queries.
    Returns:
        (..., P), in x's dtype.
    Raises:
        TypeError, ValueError: x is not floating or has no dimension, or the degree is not an integer from 1.
    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> symmetric_power(x).tolist()
        [1.0, 2.0, 3.0, 4.0, 6.0, 9.0]
        >>> float((symmetric_power(x, multiplicities=True) * symmetric_power(x)).sum()), float((x @ x) ** 2)
        (196.0, 196.0)
    """
    name = "diffmax.power.symmetric_power"
    check_tensor(name, "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x must have a last dimension of at least 1, got {_shape(x)}")
    size, degree = _size_and_degree(name, x.shape[-1], degree)
    found = symmetric.monomials(x, degree)
    if check_flag(name, "multiplicities", multiplicities):
        found = found * symmetric.coefficients(size, degree, x)
    return found


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gates: Tensor | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    is_causal: bool = True,
    normalize: Literal[True] = True,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gates: Tensor | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    is_causal: bool = True,
    normalize: Literal[False],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gates: Tensor | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    is_causal: bool = True,
    normalize: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Power attention by its quadratic form, with all weights in memory: causal or not, divided by their sum or beside it.

    w_ij = (scale * q_i . k_j)^p exp(G_i - G_j),  G = cumsum(log_gates)

    Args:
        query: (B, H, L, D). float16, bfloat16, float32 or float64.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), of query's dtype, where H_kv divides H.
        log_gates: (B, H_kv, S), floating. The last query has the position of the last key, and there are as many keys or more.
            A key behind its query, if that is seen, is divided by the gates between them.
        degree: p, even, from 2.
        scale: Factor of the products; None: 1 / sqrt(D). It cancels if weights are divided by their sum.
        is_causal: Whether a query sees no key behind its position.
        normalize: Whether to divide by the sum of weights. Otherwise both are returned, to be added to those of other keys.
    Returns:
        (B, H, L, D_v) in query's dtype, 0 where all weights are; or, without `normalize`, the sums of w v (B, H, L, D_v) and of
        w (B, H, L), in float32 (float64 for float64).
    Raises:
        TypeError, ValueError: Types, shapes, devices or values do not fit.
    Numerics: Computed in float32, for float64 in float64.
    Source: docs/theory.md, Eq. 30. Written for diffmax.
    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 10, 16).unbind()
        >>> sums, totals = attention(q, k, v, normalize=False)
        >>> torch.allclose(sums / totals.unsqueeze(-1), attention(q, k, v), atol=1e-5)
        True
    """
    name = "diffmax.power.attention"
    check_tensors(name, query, key, value, "BHLD")
    check_heads(name, query.shape[1], key.shape[1], True)
    degree, scale = check_degree(name, degree), check_scale(name, query, scale)
    is_causal, normalize = check_flag(name, "is_causal", is_causal), check_flag(name, "normalize", normalize)
    gates = check_gates(name, query, key, log_gates)
    length, many = query.shape[2], key.shape[2]
    if length > many and (is_causal or gates is not None):
        raise ValueError(
            f"{name}: there must be at least as many keys as queries, got {many} keys and {length} queries\n"
            "the last query has the position of the last key"
        )
    with without_autocast(query):
        q, k, v = _grouped(query, key), *(t.to(accumulation_dtype(query.dtype)).unsqueeze(2) for t in (key, value))
        weights = symmetric.even_power(q @ k.mT * scale, degree)
        if gates is not None:
            g = cumulated(gates)
            away = g[..., many - length :].unsqueeze(-1) - g.unsqueeze(-2)
            if is_causal:
                away = away.masked_fill(_hidden(length, many, query.device), -torch.inf)
            weights = weights * away.exp().to(weights.dtype).unsqueeze(2)
        elif is_causal:
            weights = weights.masked_fill(_hidden(length, many, query.device), 0.0)
        return _result(query, weights @ v, weights.sum(-1), normalize)


def update_state(
    key: Tensor,
    value: Tensor,
    log_gates: Tensor | None = None,
    initial_state: State | None = None,
    *,
    degree: int = 2,
) -> PowerState:
    """The state after some keys: what `power_attention` returns with `return_final_state=True`.

    sums = sum_j exp(G_S - G_j) m(k_j) v_j,  norm = sum_j exp(G_S - G_j) m(k_j),  each plus exp(G_S) times its initial value

    Args:
        key, value: (B, H, S, D) and (B, H, S, D_v), of one dtype: float16, bfloat16, float32 or float64.
        log_gates: (B, H, S), floating. None: gates of 1.
        initial_state: The state before the first key. None: zeros.
        degree: p, even, from 2.
    Returns:
        The state, in float32 (float64 for float64).
    Raises:
        TypeError, ValueError: Types, shapes, devices or values do not fit.
    Numerics: As `power_attention`'s on a CPU. Elsewhere the monomials of all keys are in memory: P numbers for each.
    Source: docs/theory.md, Eq. 32. Written for diffmax.
    Example:
        >>> k, v = torch.randn(2, 1, 4, 10, 16).unbind()
        >>> update_state(k, v).sums.shape
        torch.Size([1, 4, 136, 16])
    """
    name = "diffmax.power.update_state"
    check_tensors(name, key, key, value, "BHLD")
    degree = check_degree(name, degree)
    gates = check_gates(name, key, key, log_gates)
    sums, norm = check_state(name, key, key, value, initial_state, degree)
    if key.device.type == "cpu" and key.shape[2] > FEW:
        none = key[:, :, :0]
        return power_attention(none, key, value, log_gates, initial_state, degree=degree, return_final_state=True)[1]
    acc = accumulation_dtype(key.dtype)
    with without_autocast(key):
        m, whole = symmetric.monomials(key.to(acc), degree), None
        if gates is not None and key.shape[2]:
            g = cumulated(gates)
            m, whole = m * (g[..., -1:] - g).exp().to(acc).unsqueeze(-1), g[..., -1:].exp().to(acc)
        found = PowerState(m.mT @ value.to(acc), m.sum(-2))
        if sums is None or norm is None:
            return found
        if whole is not None:
            sums, norm = sums * whole.unsqueeze(-1), norm * whole
        return PowerState(found.sums + sums, found.norm + norm)


@overload
def query_state(
    query: Tensor,
    state: State,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: Literal[True] = True,
) -> Tensor: ...


@overload
def query_state(
    query: Tensor,
    state: State,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: Literal[False],
) -> tuple[Tensor, Tensor]: ...


def query_state(
    query: Tensor,
    state: State,
    *,
    degree: int = 2,
    scale: float | None = None,
    normalize: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """What queries read from a state: attention to all keys in it, with no others.

    Args:
        query: (B, H, L, D). float16, bfloat16, float32 or float64.
        state: Of H_kv heads, where H_kv divides H, and of queries' head size.
        degree: p, even, from 2: the state's.
        scale: Factor of the queries; None: 1 / sqrt(D). It cancels if weights are divided by their sum.
        normalize: Whether to divide by the sum of weights. Otherwise both are returned, to be added to those of other keys.
    Returns:
        As `attention`.
    Raises:
        TypeError, ValueError: Types, shapes, devices or values do not fit.
    Numerics: The monomials of all queries are in memory. A state resolves sums of weights to rounding of
        (norm of q times norm of k)^p.
    Source: docs/theory.md, Eq. 32. Written for diffmax.
    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 10, 16, dtype=torch.float64).unbind()
        >>> out = query_state(q, update_state(k, v))
        >>> torch.allclose(out, attention(q, k, v, is_causal=False))
        True
    """
    name = "diffmax.power.query_state"
    check_tensor(name, "query", query)
    if query.ndim != 4:
        raise ValueError(f"{name}: query must have 4 dimensions (B, H, L, D), got {_shape(query)}")
    degree, scale = check_degree(name, degree), check_scale(name, query, scale)
    normalize = check_flag(name, "normalize", normalize)
    if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(t, Tensor) for t in state)):
        raise TypeError(f"{name}: state must be a PowerState or a pair (sums, norm) of tensors, got {type(state).__name__}")
    if state[0].ndim != 4:
        raise ValueError(f"{name}: state.sums must have 4 dimensions (B, H_kv, P, D_v), got {_shape(state[0])}")
    heads = state[0].shape[1]
    check_heads(name, query.shape[1], heads, True)
    like = query[:, :1, :0].expand(-1, heads, -1, -1)
    sums, norm = PowerState(*check_state(name, query, like, state[0][:, :, :0], state, degree))  # type: ignore[arg-type]  # given
    with without_autocast(query):
        phi = symmetric.monomials(_grouped(query, like) * scale, degree)
        phi = phi * symmetric.coefficients(query.shape[3], degree, phi)
        totals = (phi @ norm[:, :, None, :, None]).squeeze(-1)
        return _result(query, phi @ sums.unsqueeze(2), totals, normalize)


def discumsum(x: Tensor, log_gates: Tensor | None = None) -> Tensor:
    """Sums over time that decay: the states before each chunk and after the last, from what the chunks add.

    y_0 = 0,  y_(t+1) = exp(log_gates_t) y_t + x_t

    Args:
        x: (B, H, T, ...), floating.
        log_gates: (B, H, T), floating: how much of what came before is left at t. -inf is a gate of 0. None: gates of 1.
    Returns:
        (B, H, T + 1, ...), in x's dtype.
    Raises:
        TypeError, ValueError: Types, shapes or devices do not fit.
    Numerics: Summed in float32, for float64 in float64. The backward is such a sum from the end, and keeps the result alone,
        not its steps.
    Source: the operator is power-attention's. Written for diffmax.
    Example:
        >>> discumsum(torch.ones(1, 1, 3), torch.full((1, 1, 3), -0.6931472)).squeeze()
        tensor([0.0000, 1.0000, 1.5000, 1.7500])
    """
    name = "diffmax.power.discumsum"
    check_tensor(name, "x", x)
    if x.ndim < 3:
        raise ValueError(f"{name}: x must have 3 dimensions (B, H, T, ...) or more, got {_shape(x)}")
    return sum_over_time(x, check_log_gates(name, "log_gates", log_gates, x, "(B, H, T)"), 2)


class Decoded(NamedTuple):
    """What `inference` returns.

    Attributes:
        out: (B, H, L, D_v), in query's dtype.
        state: The state for the next call; None if there is none yet.
        key, value, log_gates: The tail for the next call, to which next tokens are appended: as given, or without tokens after
            they were folded into the state. None where none was given.
    """

    out: Tensor
    state: PowerState | None
    key: Tensor | None
    value: Tensor | None
    log_gates: Tensor | None


def inference(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    log_gates: Tensor | None = None,
    state: State | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    switch_over: int | None = 512,
    backend: str | None = None,
) -> Decoded:
    """A step of decoding with a tail of keys, seen as they are, and a state of all before them.

    A tail costs less than a state while it is short. When it has `switch_over` tokens, it is folded into the state.

    Args:
        query: (B, H, L, D): the last L tokens, whose keys are the last of the tail.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), with S >= L: the tail. None, both: all is in the
            state.
        log_gates: (B, H_kv, S), floating: of the tail. None: gates of 1.
        state: Of all keys before the tail; None: there were none.
        degree: p, even, from 2.
        scale: Factor of the products; None: 1 / sqrt(D). It cancels, up to rounding.
        switch_over: Tokens of a tail that is folded into the state. None: it never is.
        backend: As in `attention`.
    Returns:
        The result, and state and tail for the next call.
    Raises:
        TypeError, ValueError, NoBackendError: As `power_attention`; or there is neither a tail nor a state.
    Numerics: As `power_attention`.
    Source: the operation is retention's. Written for diffmax.
    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 10, 16, dtype=torch.float64).unbind()
        >>> step = inference(q[:, :, 7:8], k[:, :, :8], v[:, :, :8], switch_over=8)
        >>> step.key.shape, step.state.sums.shape
        (torch.Size([1, 4, 0, 16]), torch.Size([1, 4, 136, 16]))
        >>> step = inference(q[:, :, 8:], k[:, :, 8:], v[:, :, 8:], state=step.state)
        >>> torch.allclose(step.out, attention(q, k, v)[:, :, 8:])
        True
    """
    name = "diffmax.power.inference"
    if (key is None) != (value is None):
        raise ValueError(f"{name}: key and value must be given both or neither")
    if switch_over is not None:
        if not is_whole(switch_over):
            raise TypeError(
                f"{name}: switch_over must be an int or None, got {switch_over!r} of type {type(switch_over).__name__}"
            )
        if switch_over < 1:
            raise ValueError(f"{name}: switch_over must be at least 1, or None to never fold, got {switch_over}")
    if key is None or value is None:
        if state is None:
            raise ValueError(f"{name}: there must be a tail or a state, got neither")
        if log_gates is not None:
            raise ValueError(f"{name}: log_gates are of a tail, and there is none")
        out = query_state(query, state, degree=degree, scale=scale)
        return Decoded(out, PowerState(*state), None, None, None)
    options: dict[str, Any] = {"degree": degree, "scale": scale, "backend": backend}
    if switch_over is None or key.ndim != 4 or key.shape[2] < as_int(switch_over):
        out = power_attention(query, key, value, log_gates, state, **options)
        return Decoded(out, None if state is None else PowerState(*state), key, value, log_gates)
    out, found = power_attention(query, key, value, log_gates, state, return_final_state=True, **options)
    rest = None if log_gates is None else log_gates[:, :, :0]
    return Decoded(out, found, key[:, :, :0], value[:, :, :0], rest)


def check_log_gates(name: str, what: str, log_gates: Any, x: Tensor, axes: str) -> Tensor:
    """Log gates for x's first three dimensions, in the accumulation dtype."""
    acc = accumulation_dtype(x.dtype)
    if log_gates is None:
        return torch.zeros(x.shape[:3], dtype=acc, device=x.device)
    if not isinstance(log_gates, Tensor) or not log_gates.is_floating_point():
        got = _dtype(log_gates) if isinstance(log_gates, Tensor) else type(log_gates).__name__
        raise TypeError(f"{name}: {what} must be a floating tensor or None, got {got}")
    check_strided(name, what, log_gates)
    if log_gates.device != x.device:
        raise ValueError(f"{name}: {what} must be on the device of what it decays, got {log_gates.device} and {x.device}")
    if not has_shape(log_gates, tuple(x.shape[:3])):
        raise ValueError(f"{name}: {what} must have shape {axes} = {tuple(x.shape[:3])}, got {_shape(log_gates)}")
    return log_gates.to(acc)


def sum_over_time(x: Tensor, log_gates: Tensor, dim: int) -> Tensor:
    """`discumsum` with time at dimension `dim`, of which log_gates has as many as x first dimensions."""
    found: Tensor = _SumOverTime.apply(x, log_gates, dim)  # type: ignore[no-untyped-call]
    return found


class _SumOverTime(torch.autograd.Function):
    """Its backward is made of it again, so it is differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_gates: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] += 1
        found, gates = x.new_empty(shape), log_gates.exp().to(accumulation_dtype(x.dtype))
        state = torch.zeros_like(x.select(dim, 0) if shape[dim] > 1 else found.select(dim, 0), dtype=gates.dtype)
        ones = (1,) * (x.ndim - log_gates.ndim)
        for time in range(shape[dim]):
            found.select(dim, time).copy_(state)
            if time + 1 < shape[dim]:
                gate = gates.select(dim, time)
                state.mul_(gate.reshape(*gate.shape, *ones)).add_(x.select(dim, time))
        ctx.dim = dim
        ctx.save_for_backward(log_gates, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (log_gates, found), dim = ctx.saved_tensors, ctx.dim
        many = log_gates.shape[dim]
        # the gradient r_(t+1) for y_(t+1) is grad_(t+1) + gate_(t+1) r_(t+2): such a sum, from the end
        reverse = torch.cat(
            [torch.zeros_like(log_gates.narrow(dim, 0, min(1, many))), log_gates.narrow(dim, 1, max(many - 1, 0)).flip(dim)],
            dim,
        )
        of_x = sum_over_time(grads[0].narrow(dim, 1, many).flip(dim), reverse, dim).narrow(dim, 1, many).flip(dim)
        of_gates = None
        if ctx.needs_input_grad[1]:
            products = found.narrow(dim, 0, many).to(log_gates.dtype) * of_x.to(log_gates.dtype)
            if products.ndim > log_gates.ndim:
                products = products.flatten(log_gates.ndim).sum(-1)
            of_gates = products * log_gates.exp()
        return of_x, of_gates, None


def _size_and_degree(name: str, size: Any, degree: Any) -> tuple[int, int]:
    for what, given in (("size", size), ("degree", degree)):
        if not is_whole(given) and not isinstance(given, torch.SymInt):
            raise TypeError(f"{name}: {what} must be an int, got {given!r} of type {type(given).__name__}")
        if given < 1:
            raise ValueError(f"{name}: {what} must be at least 1, got {given}")
    return as_int(size), as_int(degree)


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """(B, H_kv, H / H_kv, L, D) in the accumulation dtype."""
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1] if key.shape[1] else 1
    return query.to(accumulation_dtype(query.dtype)).reshape(batch, key.shape[1], groups, length, size)


def _hidden(length: int, many: int, device: torch.device) -> Tensor:
    place = torch.arange(many, device=device)
    return place > place[many - length :].unsqueeze(1)


def _result(query: Tensor, sums: Tensor, totals: Tensor, normalize: bool) -> Tensor | tuple[Tensor, Tensor]:
    rows, size = query.shape[:3], sums.shape[-1]
    if not normalize:
        return sums.reshape(*rows, size), totals.reshape(rows)
    empty = (totals == 0).unsqueeze(-1)
    divided = sums / totals.unsqueeze(-1).masked_fill(empty, 1.0)
    return divided.masked_fill(empty, 0.0).reshape(*rows, size).to(query.dtype)
