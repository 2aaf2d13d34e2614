"""The clock: contestants take turns, so that whatever else the machine does hits them alike.

On one thread it is the processor time of the process. On an idle machine that is the wall clock's time; on a shared one the
wall clock is unfair, as a call of 20 ms is interrupted by others where one of 0.3 ms slips through. With more threads
processor time says little, since threads spin while they wait: there it is the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

SLOW_SECONDS = 0.02
CALLS_PER_TURN = 3


CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def interleave(calls: dict[str, Callable[[], object]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds per call of each contestant.

    A turn is one call that is not timed, to bring the caches into the state the contestant leaves them in, and three that are.
    A slow contestant fills the caches with its own data soon enough: it is timed once per turn, every other round.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    slow = {name: _timed(call, CLOCKS[clock]) > SLOW_SECONDS for name, call in calls.items()}
    for turn in range(rounds):
        for name, call in calls.items():
            if not slow[name]:
                call()
                samples[name] += [_timed(call, CLOCKS[clock]) for _ in range(CALLS_PER_TURN)]
            elif turn % 2 == 0:
                samples[name].append(_timed(call, CLOCKS[clock]))
    return samples


def summarize(samples: list[float]) -> dict[str, float | int]:
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return {"median_s": statistics.median(samples), "p20_s": cuts[0], "p80_s": cuts[3], "samples": len(samples)}


def _timed(call: Callable[[], object], now: Callable[[], float]) -> float:
    start = now()
    call()
    return now() - start
