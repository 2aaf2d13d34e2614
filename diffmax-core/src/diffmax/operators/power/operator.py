"""torch.ops.diffmax.power_attention and power_attention_backward: schemas, shapes for tracing, gradients.

Wired by `operators.common.wiring`. The arithmetic is in the kernel that `machine.dispatch` chooses,
with the signatures of `diffmax.reference.power`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.wiring import Wiring, beside_the_batch
from diffmax.plugin import PowerCall, PowerGradients, PowerResults, PowerSaved, PowerWanted
from diffmax.reference import power as reference


class Arguments(NamedTuple):
    """Of torch.ops.diffmax.power_attention. `keep`: whether a backward follows."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: bool
    call: PowerCall
    backend: str = ""


class BackwardArguments(NamedTuple):
    """Of torch.ops.diffmax.power_attention_backward."""

    grad: Tensor
    grad_sums: Tensor | None
    grad_norm: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    saved: PowerSaved
    wanted: PowerWanted
    call: PowerCall
    backend: str = ""


FORWARD = Schema("power_attention", Arguments, PowerResults, sizes=True, prefixes={"results": "end_"})
BACKWARD = Schema(
    "power_attention_backward",
    BackwardArguments,
    PowerGradients,
    prefixes={"wanted": "needs_", "results": "grad_"},
    sizes=True,
)


def features(query: Tensor, key: Tensor, value: Tensor, call: PowerCall) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the call needs."""
    asked = {
        "gqa": query.shape[1] != key.shape[1],
        "value_dim": value.shape[3] != key.shape[3],
        "gates": call.log_gates is not None,
        "state": call.final or call.sums is not None,
        "high_degree": call.degree > 2,
    }
    return frozenset(name for name, on in asked.items() if on)


def _power_fake(*flat: Any) -> PowerResults:
    query, key, value, keep, call, _ = FORWARD.rebuild(flat)
    rows, acc = query.shape[:3], accumulation_dtype(query.dtype)
    sums, norm = reference.state_shapes(key, value, call.degree) if call.final else ((0,), (0,))
    return PowerResults(
        value.new_empty((*rows, value.shape[3])),
        query.new_empty(rows if keep else (0,), dtype=acc),
        query.new_empty(sums, dtype=acc),
        query.new_empty(norm, dtype=acc),
        query.new_empty((*rows, value.shape[3]) if keep and value.dtype != acc else (0,), dtype=acc),
    )


def _power_backward_fake(*flat: Any) -> PowerGradients:
    _, _, _, query, key, value, saved, wanted, call, _ = BACKWARD.rebuild(flat)
    gates, state = call.log_gates, call.sums

    def like(t: Tensor | None, needed: bool) -> Tensor:
        return saved.total.new_empty(t.shape if needed and t is not None else (0,))

    return PowerGradients(
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        like(gates, wanted.log_gates),
        like(state, wanted.state),
        like(call.norm, wanted.state),
    )


class _Power(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.power_attention in query, key, value, the gates and the states."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Any:
        return power_attention.save(ctx, flat, constant=("total", "exact"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any, grad_sums: Tensor | None, grad_norm: Tensor | None, *__: Any) -> Any:
        (query, key, value, _keep, call, backend), (out, total) = power_attention.saved(ctx)
        if not call.final:
            grad_sums = grad_norm = None
        if grad is None and grad_sums is None and grad_norm is None:
            return (None,) * len(ctx.flat)
        grad = torch.zeros_like(out, dtype=value.dtype) if grad is None else grad
        if grad_sums is not None or grad_norm is not None:
            sums, norm = reference.state_shapes(key, value, call.degree)
            grad_sums = total.new_zeros(sums) if grad_sums is None else grad_sums
            grad_norm = total.new_zeros(norm) if grad_norm is None else grad_norm
        needs = power_attention.needs(ctx)
        wanted = PowerWanted(needs["log_gates"], needs["sums"] or needs["norm"])
        # under create_graph=True this operator's own Autograd key makes its results differentiable again
        found = PowerGradients(
            *BACKWARD(grad, grad_sums, grad_norm, query, key, value, PowerSaved(out, total), wanted, call, backend)
        )
        return power_attention.in_place(ctx, found._asdict())


power_attention = Wiring(
    FORWARD,
    BACKWARD,
    features,
    learned=("log_gates", "sums", "norm"),
    reference=reference.power_attention,
    reference_backward=reference.power_attention_backward,
    gradient=_Power,
    vmap=beside_the_batch,
)
power_attention.enter(_power_fake, _power_backward_fake)
