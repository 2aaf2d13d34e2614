"""torch.ops.diffmax.threshold_attention and threshold_attention_backward: schemas, shapes for tracing, gradients.

Wired by `operators.common.wiring`. The arithmetic is in the kernel that `machine.dispatch` chooses, with the signatures of
`diffmax.reference.threshold`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.wiring import Wiring, one_by_one
from diffmax.plugin import ThresholdCall, ThresholdGradients, ThresholdResults, ThresholdSaved, ThresholdWanted
from diffmax.reference import threshold as reference


class Arguments(NamedTuple):
    """Of torch.ops.diffmax.threshold_attention. `keep`: whether a backward follows."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: bool
    call: ThresholdCall
    backend: str = ""


class BackwardArguments(NamedTuple):
    """Of torch.ops.diffmax.threshold_attention_backward."""

    grad: Tensor
    grad_mass: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    saved: ThresholdSaved
    wanted: ThresholdWanted
    call: ThresholdCall
    backend: str = ""


FORWARD = Schema("threshold_attention", Arguments, ThresholdResults, sizes=True)
BACKWARD = Schema(
    "threshold_attention_backward",
    BackwardArguments,
    ThresholdGradients,
    prefixes={"wanted": "needs_", "results": "grad_"},
    sizes=True,
)


def features(query: Tensor, key: Tensor, value: Tensor, call: ThresholdCall) -> frozenset[str]:
    """Those of `diffmax.plugin.FEATURES` that the call needs."""
    asked = {
        "gqa": query.shape[1] != key.shape[1],
        "value_dim": value.shape[3] != key.shape[3],
        "mask": call.mask is not None,
        "window": call.left >= 0 or call.right > 0,
        "varlen": call.cu_seqlens_q is not None,
        "distance_bias": call.bias is not None,
        "threshold_softmax": call.weights == "softmax",
        "threshold_diffmax": call.weights == "diffmax",
        "real_power": call.power not in (1, 2),
    }
    return frozenset(name for name, on in asked.items() if on)


def _threshold_fake(*flat: Any) -> ThresholdResults:
    query, _, value, keep, call, _ = FORWARD.rebuild(flat)
    rows, acc = query.shape[:3], accumulation_dtype(query.dtype)
    return ThresholdResults(
        value.new_empty((*rows, value.shape[3])),
        query.new_empty(rows, dtype=acc),
        query.new_empty(rows if keep and call.weights != "scores" else (0,), dtype=acc),
    )


def _threshold_backward_fake(*flat: Any) -> ThresholdGradients:
    _, _, query, key, value, _, wanted, call, _ = BACKWARD.rebuild(flat)
    bias = call.bias if wanted.bias else None
    return ThresholdGradients(
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        call.theta.new_empty(query.shape[:3] if wanted.theta else (0,)),
        call.theta.new_empty((0,) if bias is None else bias.shape),
        call.theta.new_empty(query.shape[:3] if wanted.e else (0,)),
    )


class _Threshold(torch.autograd.Function):
    """The gradient of torch.ops.diffmax.threshold_attention in query, key, value, theta, the bias and e (Eq. 6)."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Any:
        return threshold_attention.save(ctx, flat, constant=("statistic",))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mass: Tensor | None, _: Any) -> Any:
        if grad is None and grad_mass is None:
            return (None,) * len(ctx.flat)
        (query, key, value, _keep, call, backend), saved = threshold_attention.saved(ctx)
        if grad is None:
            grad = value.new_zeros((*query.shape[:3], value.shape[3]))
        needs = threshold_attention.needs(ctx)
        wanted = ThresholdWanted(needs["theta"], needs["bias"], needs["e_tensor"])
        # under create_graph=True this operator's own Autograd key makes its results differentiable again
        found = ThresholdGradients(
            *BACKWARD(grad, grad_mass, query, key, value, ThresholdSaved(*saved), wanted, call, backend)
        )._asdict()
        if wanted.theta:
            found["theta"] = found["theta"].sum_to_size(call.theta.shape)
        if wanted.e:
            found["e_tensor"] = found["e"].sum((0, 2))
        del found["e"]
        return threshold_attention.in_place(ctx, found)


threshold_attention = Wiring(
    FORWARD,
    BACKWARD,
    features,
    learned=("theta", "bias", "e_tensor"),
    reference=reference.threshold_attention,
    reference_backward=reference.threshold_attention_backward,
    gradient=_Threshold,
    vmap=one_by_one,  # since bias, mask and offsets need not have a batch
)
threshold_attention.enter(_threshold_fake, _threshold_backward_fake)
