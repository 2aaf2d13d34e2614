"""The clock. On a GPU its own events, with a cold second-level cache, as `triton.testing` has it; elsewhere the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.device.place import Place

Call = Callable[[], object]

SHORT_MS = 0.2  # below it, launches decide what a host sees: it is timed in graphs too
LONG_MS = 5.0
HOST_CALLS = 30


def samples(place: Place, call: Call, ms: float) -> list[float]:
    """Milliseconds of single calls, for about `ms` altogether and at least three."""
    if not place.graphs:
        return _by_wall_clock(place, call, ms)
    first = _events(call, 2)
    if first[-1] < LONG_MS:
        from triton.testing import do_bench

        found: list[float] = do_bench(call, warmup=max(2, ms // 4), rep=ms, return_mode="all")
        return found
    return [first[-1], *_events(call, max(2, min(20, int(ms / first[-1]))))]


def in_graphs(call: Call, ms: float) -> dict[str, Any]:
    """Milliseconds of a call that is replayed: many in one graph, caches as they are; and alone, with a cold cache."""
    import torch
    from triton.runtime import driver
    from triton.testing import do_bench_cudagraph

    warm: list[float] = do_bench_cudagraph(call, rep=ms, return_mode="all")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    cache = driver.active.get_empty_cache_for_benchmark()
    cold = _events(graph.replay, max(5, min(100, int(ms / max(1e-3, statistics.median(warm))))), cache)
    return {"graph": summary(warm), "graph_cold": summary(cold)}


def host_us(place: Place, call: Call) -> float:
    """Microseconds that the host is busy with one call, the device not waited for."""
    call()
    place.wait()
    count = HOST_CALLS if place.real else 1
    started = time.perf_counter()
    for _ in range(count):
        call()
    took = time.perf_counter() - started
    place.wait()
    return took / count * 1e6


def summary(found: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(found, n=5, method="inclusive") if len(found) > 1 else found * 4
    return {"median_ms": statistics.median(found), "p20_ms": cuts[0], "p80_ms": cuts[3], "samples": len(found)}


def _events(call: Call, count: int, cache: Any = None) -> list[float]:
    import torch
    from triton.runtime import driver

    cache = driver.active.get_empty_cache_for_benchmark() if cache is None else cache
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _by_wall_clock(place: Place, call: Call, ms: float) -> list[float]:
    """Groups of calls, from the first launch until the device is done: what a user waits for."""
    call()
    place.wait()
    found: list[float] = []
    group, until = 1, time.perf_counter() + ms / 1e3
    fewest = 5 if place.real else 1
    while len(found) < fewest or time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(group):
            call()
        place.wait()
        took = (time.perf_counter() - started) * 1e3
        found.append(took / group)
        if place.real and took < ms / 20:
            group *= 2
        if not place.real and len(found) >= fewest:
            break
    return found
