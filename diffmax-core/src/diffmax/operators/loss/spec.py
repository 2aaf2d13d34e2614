"""Registration of the loss. It has no kernels of its own: it uses those of the row operator."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor

from diffmax.operators.common.checks import check_scores, one_minus_alpha
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.common.spec import Function, OperatorSpec, Question, register
from diffmax.operators.loss import operator, sharding
from diffmax.operators.loss.api import diffmax_loss
from diffmax.operators.rows.spec import FORWARD_FLOPS

LOSS_FLOPS = 2  # a power and a sum; the backward is a difference and a product


def _asks(*arguments: Any, **options: Any) -> Question:
    """A loss needs the row operator in the accumulation dtype, without its backward."""
    bound = inspect.signature(diffmax_loss).bind(*arguments, **options)
    bound.apply_defaults()
    given = bound.arguments
    X, alpha = given["X"], given["alpha"]
    alpha = alpha() if callable(alpha) else alpha
    dim = 0 if isinstance(X, Tensor) and X.ndim == 1 else 1
    _, e_tensor = one_minus_alpha("explain", X, alpha, check_scores("explain", X, dim, given["n_iter"]))
    dtype, is_tensor = accumulation_dtype(X.dtype), e_tensor is not None
    return Question("bisect", X.device.type, dtype, tensor_alpha=is_tensor, backend=given["backend"])


def _forward_flops(x: Tensor, *_: Any, **__: Any) -> int:
    return (FORWARD_FLOPS + LOSS_FLOPS) * math.prod(x.shape)


def _backward_flops(_grad: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return LOSS_FLOPS * math.prod(x.shape)


register(
    OperatorSpec(
        name="loss",
        rank=30,
        functions={"diffmax_loss": Function("bisect", _asks)},
        schemas=(operator.FORWARD, operator.BACKWARD),
        flops={"loss": _forward_flops, "loss_backward": _backward_flops},
        sharding=sharding.RULES,
    )
)
