"""The clock: contestants take turns, so that whatever else the machine does hits them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

SLOW_SECONDS = 0.02
CALLS_PER_TURN = 3


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each contestant.

    A turn is one call that is not timed, to bring the caches into the state the contestant leaves them in, and three that are.
    A slow contestant fills the caches with its own data soon enough: it is timed once per turn, every other round.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    slow = {name: _timed(call) > SLOW_SECONDS for name, call in calls.items()}
    for turn in range(rounds):
        for name, call in calls.items():
            if not slow[name]:
                call()
                samples[name] += [_timed(call) for _ in range(CALLS_PER_TURN)]
            elif turn % 2 == 0:
                samples[name].append(_timed(call))
    return samples


def summarize(samples: list[float]) -> dict[str, float | int]:
    cuts = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
    return {"median_s": statistics.median(samples), "p20_s": cuts[0], "p80_s": cuts[3], "samples": len(samples)}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
