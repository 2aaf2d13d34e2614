"""`python -m diffmax bench`: how many times torch's time each operator takes on this machine. For a first impression."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from diffmax.machine.inspection import format_table
from diffmax.operators.attention.api import attention
from diffmax.operators.decoding.api import attention_with_kvcache
from diffmax.operators.rows.api import diffmax_bisect

ALPHAS = (0.5, 0.85, 0.99)
LENGTHS = (64, 1024, 16384)
ELEMENTS = 1 << 18
SECONDS_PER_TIMING = 0.2
HEADS, HEAD_DIM = 4, 64
ATTENTION_LENGTHS = (256, 1024)
CACHE_LENGTHS = (1024, 16384)
SHARED = 0.9  # a loop that gets less than this share of the clock's time has been interrupted


def run(
    device: str = "cpu",
    backend: str | None = None,
    operator: str | None = None,
    elements: int = ELEMENTS,
    seconds: float = SECONDS_PER_TIMING,
) -> Iterator[str]:
    """Time one operator, or all, on random tensors in float32: tables of median times, diffmax's as multiples of torch's."""
    for table in [OPERATORS[operator]] if operator else OPERATORS.values():
        yield table(device, backend, elements, seconds)


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


def _rows(device: str, backend: str | None, elements: int, seconds: float) -> str:
    rows = [("diffmax_bisect", "rows", "length", "softmax (us)", *(f"alpha={alpha}" for alpha in ALPHAS))]
    for name, measure in (("forward", _forward), ("forward+backward", _both)):
        for length in LENGTHS:
            x = torch.randn(elements // length, length, device=device)
            base = measure(lambda x: torch.softmax(x, -1), (x,), seconds)
            times = [
                measure(lambda x, alpha=alpha: diffmax_bisect(x, alpha, backend=backend), (x,), seconds) for alpha in ALPHAS
            ]
            rows.append((name, str(x.shape[0]), str(length), f"{base * 1e6:.0f}", *_ratios(times, base)))
    return format_table(rows)


def _attention(device: str, backend: str | None, elements: int, seconds: float) -> str:
    rows = [("attention, causal", "heads", "length", "sdpa (us)", *(f"alpha={alpha}" for alpha in ALPHAS))]
    longest = max(64, int(elements**0.5) * 2)
    for name, measure in (("forward", _forward), ("forward+backward", _both)):
        for length in (min(length, longest) for length in ATTENTION_LENGTHS):
            given = tuple(torch.randn(3, 1, HEADS, length, HEAD_DIM, device=device).unbind())
            base = measure(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), given, seconds)
            times = [
                measure(
                    lambda q, k, v, alpha=alpha: attention(q, k, v, is_causal=True, alpha=alpha, backend=backend),
                    given,
                    seconds,
                )
                for alpha in ALPHAS
            ]
            rows.append((name, str(HEADS), str(length), f"{base * 1e6:.0f}", *_ratios(times, base)))
    return format_table(rows)


def _decoding(device: str, backend: str | None, elements: int, seconds: float) -> str:
    rows = [("decoding one token", "heads", "cached", "sdpa (us)", *(f"alpha={alpha}" for alpha in ALPHAS))]
    for length in (min(length, elements) for length in CACHE_LENGTHS):
        q, k, v = (torch.randn(1, size, HEADS, HEAD_DIM, device=device) for size in (1, length, length))
        heads_first = tuple(t.transpose(1, 2) for t in (q, k, v))
        base = _forward(lambda q, k, v: scaled_dot_product_attention(q, k, v), heads_first, seconds)
        times = [
            _forward(
                lambda q, k, v, alpha=alpha: attention_with_kvcache(q, k, v, alpha=alpha, backend=backend),
                (q, k, v),
                seconds,
            )
            for alpha in ALPHAS
        ]
        rows.append(("forward", str(HEADS), str(length), f"{base * 1e6:.0f}", *_ratios(times, base)))
    return format_table(rows)


OPERATORS: dict[str, Callable[[str, str | None, int, float], str]] = {
    "diffmax_bisect": _rows,
    "attention": _attention,
    "attention_with_kvcache": _decoding,
}


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
