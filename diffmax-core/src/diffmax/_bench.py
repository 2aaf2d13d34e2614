"""`python -m diffmax bench`: how many times torch.softmax's time the operator takes on this machine. For a first impression."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from diffmax._inspect import format_table
from diffmax.functional import diffmax_bisect

ALPHAS = (0.5, 0.85, 0.99)
LENGTHS = (64, 1024, 16384)
ELEMENTS = 1 << 18
SECONDS_PER_TIMING = 0.2


def run(device: str = "cpu", backend: str | None = None, elements: int = ELEMENTS, seconds: float = SECONDS_PER_TIMING) -> str:
    """Time scores N(0, 1) in float32 and return a table of median times, those of diffmax as multiples of softmax's."""
    rows = [("pass", "rows", "length", "softmax (us)", *(f"alpha={alpha}" for alpha in ALPHAS))]
    for name, measure in (("forward", _forward), ("forward+backward", _both)):
        for length in LENGTHS:
            x = torch.randn(elements // length, length, device=device)
            base = measure(lambda x: torch.softmax(x, -1), x, seconds)
            times = [
                measure(lambda x, alpha=alpha: diffmax_bisect(x, alpha, backend=backend), x, seconds)  # type: ignore[misc]
                for alpha in ALPHAS
            ]
            ratios = [f"{time / base:.1f}x" for time in times]
            rows.append((name, str(x.shape[0]), str(length), f"{base * 1e6:.0f}", *ratios))
    return format_table(rows)


def _forward(function: Callable[[Tensor], Tensor], x: Tensor, seconds: float) -> float:
    return _median("function(x)", {"function": function, "x": x}, seconds)


def _both(function: Callable[[Tensor], Tensor], x: Tensor, seconds: float) -> float:
    names = {"function": function, "x": x.clone().requires_grad_(), "grad": torch.randn_like(x), "torch": torch}
    return _median("torch.autograd.grad(function(x), x, grad)", names, seconds)


def _median(statement: str, names: dict[str, object], seconds: float) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    timer.timeit(2)  # first calls import kernels and may compile them
    return float(timer.blocked_autorange(min_run_time=seconds).median)
