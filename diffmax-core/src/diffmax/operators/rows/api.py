"""The public functions of the row operator, with their argument checks. The next step is `operators.rows.operator`.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffmax.machine.dispatch import selected, weights_kernel
from diffmax.operators.common import nested, watch
from diffmax.operators.common.autograd import is_transformed
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import OR_FUNCTION, as_int, check_dtype, check_flag, check_scores, one_minus_alpha
from diffmax.operators.common.fast_path import is_plain
from diffmax.operators.common.numerics import FLOAT_DTYPES
from diffmax.operators.rows import operator as rows_operator

__all__ = ["Alpha", "diffmax_bisect"]

Alpha: TypeAlias = "float | Tensor | Callable[[], float | Tensor]"


def diffmax_bisect(
    X: Tensor,
    alpha: Alpha = 0.9,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Map scores to a sparse probability vector along `dim`: a drop-in for `torch.softmax`.

    p_i = [(1 - alpha) (x_i - tau)]_+ ^ (1 / (1 - alpha)),  tau is the threshold at which the p_i sum to 1   (Eq. 1)

    The limit alpha -> 1 is softmax, alpha -> 0 is sparsemax; it is entmax with alpha' = 2 - alpha. Every score at or below
    tau gets weight exactly 0; so does every score that is 1 / (1 - alpha) or more below the largest.

    Args:
        X: Scores, any shape and strides. float16, bfloat16, float32 or float64. -inf marks a masked entry. Or a nested tensor,
            whose first dimension is the batch; a tensor alpha then has the shape for one sequence.
        alpha: Shape parameter, 0 < alpha < 1; smaller is sparser. A float; or a tensor that broadcasts against X with `dim`
            reduced to 1, such as (H, 1, 1) for one alpha per head of scores (B, H, L, L); or a function of no arguments that
            returns either. A tensor may require a gradient, and may hold 0 and 1, which a learned alpha can reach: they give
            sparsemax and softmax. torch.compile makes a new graph for every new float: pass a tensor if alpha changes.
        dim: Axis that sums to one.
        n_iter: The result is at least as accurate as after this many bisection steps. It bounds the number of Newton steps,
            which is half of n_iter, plus (1 - alpha) log2 n. 50 is always enough for float32, 200 for float64.
        ensure_sum_one: Whether to divide by the sum at the end. False returns the weights at the tau that was found.
        dtype: The dtype to which X is converted first, as in `torch.softmax`.
        backend: A name from `diffmax.backends()`; an explicitly requested backend never falls back to another. None: the one of
            `use_backend` or DIFFMAX_BACKEND, else the best one that can run the call.
    Returns:
        Tensor of X's shape, dtype and device, contiguous. A fully masked row (all -inf) is all 0, with gradient 0. A
        row that holds NaN or +inf is all NaN. A row of one entry is 1.
    Raises:
        TypeError: X is not a tensor of a supported dtype, or an argument has the wrong type.
        ValueError: alpha or `dim` is out of range, alpha's shape does not fit, or n_iter < 1. On an accelerator, and under
            torch.compile, the values of a tensor alpha are not read: rows whose alpha lies outside [0, 1] are NaN.
        NoBackendError: The named backend cannot run the call.
    Numerics: Computes in float32, for float64 in float64. The gradient for X is Eq. 3, for alpha Eq. 4; both are zero off the
        support. Deterministic on CPU.
    Source: docs/theory.md. Written for diffmax.
    Example:
        >>> import torch, diffmax
        >>> diffmax.diffmax_bisect(torch.tensor([3.0, 2.0, 1.0, 0.0]), alpha=0.5)
        tensor([0.8307, 0.1693, 0.0000, 0.0000])
    """
    if (weights := _at_once(X, alpha, dim, n_iter, ensure_sum_one, dtype, backend)) is not None:
        return weights
    if is_captured(X, alpha):
        return captured(diffmax_bisect, X, alpha, dim, n_iter, ensure_sum_one, backend=backend, dtype=dtype)  # type: ignore[no-any-return]
    if dtype is not None and isinstance(X, Tensor):
        X = X.to(check_dtype("diffmax_bisect", dtype))
    if isinstance(X, Tensor) and X.is_nested:
        options = (n_iter, ensure_sum_one)
        return nested.weights("diffmax_bisect", X, dim, lambda t, d: diffmax_bisect(t, alpha, d, *options, backend=backend))
    if ensure_sum_one is not True:
        check_flag("diffmax_bisect", "ensure_sum_one", ensure_sum_one)
    dim = check_scores("diffmax_bisect", X, dim, n_iter)
    e, e_tensor = one_minus_alpha("diffmax_bisect", X, alpha() if callable(alpha) else alpha, dim, OR_FUNCTION)
    return normalize(X, e, e_tensor, dim, n_iter, ensure_sum_one, backend)


def _at_once(
    X: Any, alpha: Any, dim: Any, n_iter: Any, ensure_sum_one: Any, dtype: torch.dtype | None, backend: str | None
) -> Tensor | None:
    """The weights of the usual call, of which no check fails and nobody but a kernel has a part; None of any other.

    A tiny tensor takes as long as the checks: here each question is asked once.
    """
    if torch.compiler.is_compiling() or not (type(alpha) is float and type(dim) is type(n_iter) is int and type(X) is Tensor):
        return None
    if not 0 < alpha < 1 or n_iter < 1 or ensure_sum_one is not True or dtype is not None or watch.watchers:
        return None
    if (X.requires_grad and torch.is_grad_enabled()) or is_transformed() or X.dtype not in FLOAT_DTYPES or not is_plain(X):
        return None
    ndim = X.ndim
    if not -ndim <= dim < ndim:
        return None
    run = weights_kernel(X, selected(backend))
    return None if run is None else run(X, 1.0 - alpha, dim % ndim, n_iter, True)


def normalize(
    X: Tensor, e: float, e_tensor: Tensor | None, dim: int, n_iter: int, ensure_sum_one: bool, backend: str | None = None
) -> Tensor:
    """`diffmax_bisect` after its checks: `dim` >= 0, and e = 1 - alpha is a float or a tensor of the accumulation dtype."""
    if X.ndim == 0:
        return normalize(X.reshape(1), e, e_tensor, 0, n_iter, ensure_sum_one, backend).reshape(())
    weights = rows_operator.bisect(X, e, e_tensor, dim, as_int(n_iter), bool(ensure_sum_one), selected(backend))
    if not torch.compiler.is_compiling():
        for watcher in watch.watchers:
            watcher.saw_rows(X, weights, e if e_tensor is None else e_tensor, dim)
    return weights
