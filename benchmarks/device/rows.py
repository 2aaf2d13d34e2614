"""Rows: diffmax beside softmax, a copy, and whoever else computes rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import diffmax
from benchmarks.check import check as judge
from benchmarks.device import rivals
from benchmarks.device.contest import Contestant, poisoned
from benchmarks.device.contest import compete as contest
from benchmarks.device.context import Context, SkipError, WrongError

JUDGED_ENTRIES = 1 << 18
FEWEST_ROWS = 4

Rows = Callable[[Tensor], Tensor]


def compete(
    context: Context,
    dtype: str,
    alpha: float,
    sigma: float,
    n: int,
    rows: int,
    passes: list[str],
    compiled: bool,
    others: bool,
) -> dict[str, Any]:
    """The operator on a matrix of N(0, sigma) scores."""
    kind, place = getattr(torch, dtype), context.place
    if context.prepare:
        rows = min(rows, 264) if rows >= 264 else rows
    x = scores(context, rows, n, sigma, kind)
    grad = context.randn(rows, n).to(kind)

    def of(name: str, build: Callable[[], Rows], e: float) -> Callable[[], Contestant]:
        def built() -> Contestant:
            function = build()
            calls = {passed: timed(passed, x, grad, function) for passed in passes}

            def check() -> dict[str, Any]:
                return judged(context, function, (rows, n), sigma, kind, e, name == "diffmax", passes)

            return Contestant(calls, check, graph=("forward",))

        return built

    field = {
        "diffmax": of("diffmax", lambda: lambda x: diffmax.diffmax_bisect(x, alpha, backend=place.backend), 1 - alpha),
        "softmax": of("softmax", lambda: lambda x: torch.softmax(x, -1), 0.0),
        "copy": lambda: copying(x),
    }
    if context.prepare:
        field = {"diffmax": field["diffmax"]}
    else:
        if compiled:
            field["softmax_compiled"] = of("softmax_compiled", lambda: _compiled(x, grad, passes), 0.0)
        if others:
            field |= {name: of(name, build, 1 - alpha) for name, build in rivals.row_rivals(alpha).items()}
    bytes_moved = {passed: count * x.numel() * x.element_size() for passed, count in (("forward", 2), ("backward", 3))}
    return {"bytes": bytes_moved, **contest(context, field)}


def scores(context: Context, rows: int, n: int, sigma: float, kind: torch.dtype) -> Tensor:
    """Fresh scores."""
    return (context.randn(rows, n) * sigma).to(kind)


def timed(passed: str, x: Tensor, grad: Tensor, function: Rows) -> Callable[[], object]:
    """What is timed for a pass; the graph that a backward needs is made at its first call."""
    if passed == "forward":
        return torch.no_grad()(lambda: function(x))
    leaf = x.detach().requires_grad_()
    if passed == "both":
        return lambda: torch.autograd.grad(function(leaf), leaf, grad)
    kept: list[Tensor] = []

    def backward() -> object:
        if not kept:
            kept.append(function(leaf))
        return torch.autograd.grad(kept[0], leaf, grad, retain_graph=True)

    return backward


def judged(
    context: Context,
    function: Rows,
    shape: tuple[int, int],
    sigma: float,
    kind: torch.dtype,
    e: float,
    ours: bool,
    passes: list[str],
) -> dict[str, Any]:
    """Check the function on fresh scores of the shape that is timed, in poisoned memory, on a sample of the rows."""
    x = scores(context, *shape, sigma, kind)
    with poisoned():
        p = function(x)
    count = min(shape[0], max(FEWEST_ROWS, JUDGED_ENTRIES // shape[1]))
    sample = torch.linspace(0, shape[0] - 1, count, device=x.device).round().long()
    grad = torch.randn(count, shape[1], generator=context.generator("cpu")).to(kind)
    grad_x = None
    if set(passes) - {"forward"}:
        leaf, whole = x.requires_grad_(), torch.zeros_like(x)
        whole[sample] = grad.to(x.device)
        with poisoned():
            grad_x = torch.autograd.grad(function(leaf), leaf, whole)[0][sample].cpu()
        x = x.detach()
    verdict = judge(x[sample].cpu(), grad, p[sample].cpu(), grad_x, e, ours)
    if not verdict.correct:
        raise WrongError(str(verdict.reason), error=verdict.error, allowed=verdict.allowed)
    return {"error_ulp": verdict.error, "allowed_ulp": verdict.allowed, "zeros": verdict.zeros}


def copying(x: Tensor) -> Contestant:
    """What reading and writing as many bytes costs."""
    target = torch.empty_like(x)
    return Contestant({"forward": lambda: target.copy_(x)}, lambda: None)


def _compiled(x: Tensor, grad: Tensor, passes: list[str]) -> Rows:
    if not torch.cuda.is_available():
        raise SkipError("compiled for a device only")
    return rivals.compiled_softmax(x, lambda function: [timed(passed, x, grad, function)() for passed in passes])
