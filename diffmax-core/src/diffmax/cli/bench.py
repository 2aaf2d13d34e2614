"""`python -m diffmax bench`: how many times torch's time each operator takes on this machine. For a first impression."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from diffmax.machine.dispatch import import_function
from diffmax.machine.inspection import format_table
from diffmax.operators.common.spec import public_functions
from diffmax.testing.bench import Bench

ALPHAS = (0.5, 0.85, 0.99)
ELEMENTS = 1 << 18
SECONDS_PER_TIMING = 0.2
SHARED = 0.9  # a loop that gets less than this share of the clock's time has been interrupted


def run(
    device: str = "cpu",
    backend: str | None = None,
    operator: str | None = None,
    elements: int = ELEMENTS,
    seconds: float = SECONDS_PER_TIMING,
) -> Iterator[str]:
    """Time one operator, or all, on random tensors in float32: tables of median times, diffmax's as multiples of torch's."""
    known = timed()
    for name in [operator] if operator else known:
        yield _table(import_function(known[name]), device, backend, elements, seconds)  # type: ignore[arg-type]


def timed() -> dict[str, str]:
    """Names of the functions that can be timed, and where their `Bench` is, as the operators' specs say."""
    return {name: function.bench for name, function in public_functions().items() if function.bench}


def busy(*, by_load: bool) -> str:
    """Whether other processes use this machine's cores right now, in words; "" if none is seen.

    `by_load`: judge by the load average too, before this process has added to it.
    """
    wall, own = time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + 0.2:
        pass
    share = (time.process_time() - own) / (time.perf_counter() - wall)
    load = os.getloadavg()[0] if by_load and hasattr(os, "getloadavg") else 0.0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if share >= SHARED and load <= cores / 2:
        return ""
    facts = f"a loop had {share:.0%} of a core" + (f", the load average is {load:.1f} on {cores} cores" if by_load else "")
    return f"this machine is busy ({facts}): ratios may be far off, run it again when it is idle"


def _table(bench: Bench, device: str, backend: str | None, elements: int, seconds: float) -> str:
    rows = [(bench.title, bench.counted, "length", f"{bench.base} (us)", *(f"alpha={alpha}" for alpha in ALPHAS))]
    measures = {"forward": _forward, "forward+backward": _both} if bench.has_backward else {"forward": _forward}
    for name, measure in measures.items():
        for case in bench.cases(elements, device):
            base = measure(bench.theirs, case.theirs, seconds)
            times = [measure(partial(bench.ours, alpha=alpha, backend=backend), case.ours, seconds) for alpha in ALPHAS]
            rows.append((name, str(case.number), str(case.length), f"{base * 1e6:.0f}", *_ratios(times, base)))
    return format_table(rows)


def _ratios(times: list[float], base: float) -> list[str]:
    return [f"{time / base:.1f}x" for time in times]


def _forward(function: Callable[..., Any], given: tuple[Tensor, ...], seconds: float) -> float:
    return _median("function(*given)", {"function": function, "given": given}, seconds)


def _both(function: Callable[..., Any], given: tuple[Tensor, ...], seconds: float) -> float:
    leaves = tuple(t.clone().requires_grad_() for t in given)
    names = {"function": function, "leaves": leaves, "grad": torch.randn_like(function(*given)), "torch": torch}
    return _median("torch.autograd.grad(function(*leaves), leaves, grad)", names, seconds)


def _median(statement: str, names: dict[str, object], seconds: float) -> float:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    timer.timeit(2)  # first calls import kernels and may compile them
    return float(timer.blocked_autorange(min_run_time=seconds).median)
