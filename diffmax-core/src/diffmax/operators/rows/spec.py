"""Registration of the row operator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffmax.operators.common.checks import check_dtype, check_scores, one_minus_alpha
from diffmax.operators.common.spec import Case, Function, KernelSpec, Needed, OperatorSpec, Question, register
from diffmax.operators.rows import operator, sharding

ALPHA = frozenset({"tensor_alpha", "deterministic"})

# Forward, per score: the maximum, a subtraction and a product; four evaluations of a difference, two powers and two sums (the
# iterations of a row with unit variance, docs/performance.md); the division. Backward: a power, two products, two sums, a
# difference and a product.
FORWARD_FLOPS = 3 + 4 * 5 + 1
BACKWARD_FLOPS = 7


def _asks(
    X: Tensor,
    alpha: Any = 0.9,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Question:
    alpha = alpha() if callable(alpha) else alpha
    X = X if dtype is None else X.to(check_dtype("explain", dtype))
    if isinstance(X, Tensor) and X.is_nested:  # one of its sequences, which has one dimension less
        X, dim = X.unbind()[0], dim if dim < 0 else dim - 1
    _, e_tensor = one_minus_alpha("explain", X, alpha, check_scores("explain", X, dim, n_iter))
    learns_alpha = e_tensor is not None and e_tensor.requires_grad
    return Question(
        "bisect",
        X.device.type,
        X.dtype,
        tensor_alpha=e_tensor is not None,
        alpha_gradient=learns_alpha,
        backward=torch.is_grad_enabled() and (X.requires_grad or learns_alpha),
        backend=backend,
    )


def _prepares(needed: Needed) -> Iterator[Case]:
    for length in needed.lengths:
        yield Case("bisect", frozenset(), (0, 0), (length,))


def _forward_flops(x: Tensor, *_: Any, **__: Any) -> int:
    return FORWARD_FLOPS * math.prod(x.shape)


def _backward_flops(grad: Tensor, *_: Any, **__: Any) -> int:
    return BACKWARD_FLOPS * math.prod(grad.shape)


register(
    OperatorSpec(
        name="rows",
        rank=0,
        kernels={"bisect": KernelSpec(ALPHA), "bisect_backward": KernelSpec(ALPHA | {"alpha_gradient"})},
        functions={
            "diffmax_bisect": Function("bisect", _asks, bench="diffmax.testing.rows.bench:BENCH"),
            "bisect": Function("bisect", _asks),
        },
        schemas=(operator.FORWARD, operator.BACKWARD),
        flops={"bisect": _forward_flops, "bisect_backward": _backward_flops},
        sharding=sharding.RULES,
        prepares=_prepares,
        selftest="diffmax.testing.rows.selftest:CHECKS",
        kit="diffmax.testing.conformance:BackendConformance",
    )
)
