"""`power_attention`: what it means, and its arguments checked. Next: `operator`. Symbols: docs/glossary.md."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from diffmax.machine.dispatch import selected
from diffmax.operators.common.autocast import autocast
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.parts import warn_of_part
from diffmax.operators.power import checks, operator
from diffmax.operators.power.state import PowerState


@overload
def power_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gates: Tensor | None = None,
    initial_state: PowerState | tuple[Tensor, Tensor] | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    return_final_state: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def power_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gates: Tensor | None = None,
    initial_state: PowerState | tuple[Tensor, Tensor] | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    return_final_state: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, PowerState]: ...


def power_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gates: Tensor | None = None,
    initial_state: PowerState | tuple[Tensor, Tensor] | None = None,
    *,
    degree: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, PowerState]:
    """Causal power attention: weights (q . k)^p with an even p, decayed by gates, divided by their sum.

    out_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = (scale * q_i . k_j)^p exp(G_i - G_j) for j <= i,  G = cumsum(log_gates)

    Time is linear in the length, and memory beyond inputs and results constant: a state of C(D + p - 1, p) rows per head
    replaces the keys (docs/power.md). Where the quadratic form is cheaper, it is taken.

    Args:
        query: (B, H, L, D), any strides. float16, bfloat16, float32 or float64. Under autocast it is converted as torch would.
        key, value: (B, H_kv, S, D) and (B, H_kv, S, D_v), of query's dtype, where H_kv divides H: query head h reads head
            h // (H / H_kv). S >= L, and the last query has the position of the last key; or S = 0, with an initial state.
            A key of zeros adds nothing: so padding is left out.
        log_gates: (B, H_kv, S), floating: before key j is added, all that came before is multiplied by exp(log_gates[j]).
            -inf is a gate of 0, where the sequence starts anew. Above 0 they let the past grow. None: gates of 1.
        initial_state: The state before the first key, which another call returned; may require gradients.
        degree: p, even, from 2.
        scale: Factor of the products, not 0. It cancels, so 1 / sqrt(D) is taken whatever is given.
        chunk_size: Tokens between states; it changes rounding and time alone. None: chosen by cost. At least S: the quadratic
            form.
        return_final_state: Whether to return the state after the last key too.
        backend: As in `attention`.
    Returns:
        (B, H, L, D_v), contiguous, in query's dtype; and a `PowerState` in float32 (float64 for float64), if requested. A
        query that is orthogonal to all its keys, and so has no weight, returns zeros and propagates no gradient.
    Raises:
        TypeError: An argument has the wrong type, or the dtypes differ.
        ValueError: Shapes, devices or values do not fit.
        NoBackendError: No backend can run the call, or the named one cannot.
    Numerics: Products, powers and sums are computed in float32, for float64 in float64. A query whose sum of weights
        overflows is NaN, and one that sees a key, or in chunks the chunk's start, since which gates multiply to more than 1e38
        (1e308 in float64) may be; weights below the smallest number are 0. So q . k / sqrt(D) has to lie within 1e-18 to 1e18
        for p = 2, 1e-9 to 1e9 for p = 4, 1e-6 to 1e6 for p = 6. A NaN or an infinity in a key or value spoils the queries from
        there on in its head, and may spoil those before it in the same block or chunk. A state resolves sums of weights to
        rounding of (norm of q times norm of k)^p: less than that is noise.
        Second derivatives, forward mode, and gradients under torch.func are right, and computed with all weights in memory.
    Source: Buckman, Gelada and Zhang, "Scaling Context Requires Rethinking Attention", 2025 (arXiv 2507.04239); docs/power.md.
        Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> query, key, value = torch.randn(3, 2, 4, 100, 16).unbind()
        >>> gates = torch.nn.functional.logsigmoid(torch.randn(2, 4, 100) + 4)
        >>> out, state = diffmax.power_attention(query, key, value, gates, return_final_state=True)
        >>> out.shape, state.sums.shape
        (torch.Size([2, 4, 100, 16]), torch.Size([2, 4, 136, 16]))
    """
    given = (query, key, value, log_gates, initial_state)
    if is_captured(*given[:4]):
        return captured(  # type: ignore[no-any-return]
            power_attention,
            *given,
            degree=degree,
            scale=scale,
            chunk_size=chunk_size,
            return_final_state=return_final_state,
            backend=backend,
        )
    warn_of_part("diffmax.power_attention")
    query, key, value = autocast(query, key, value)
    call = checks.build_call(
        "diffmax.power_attention",
        query,
        key,
        value,
        log_gates,
        initial_state,
        degree,
        scale,
        chunk_size,
        return_final_state,
    )
    found = operator.power_attention(query, key, value, call, selected(backend))
    return (found.out, PowerState(found.sums, found.norm)) if return_final_state else found.out
