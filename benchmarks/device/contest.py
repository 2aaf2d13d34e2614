"""Contestants of one cell: each is built, checked, and only if its own result is right timed, in turns with the others.

What a contestant computes is checked on fresh inputs in poisoned memory by the operator's module. A line is written for each as
soon as it has its first times; the cell's own line, with all times of all turns, comes last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.device import clock
from benchmarks.device.context import Context
from benchmarks.device.crew import is_ours
from benchmarks.device.worker import guarded

TURNS = 3


@dataclass
class Contestant:
    """Who takes part.

    Attributes:
        calls: What is timed, by the name of the pass.
        check: Raises where the result is wrong; may return what it found.
        graph: Passes that are timed in CUDA graphs too if they are short.
        host: Whether the host's time of a call is wanted.
    """

    calls: dict[str, Callable[[], object]]
    check: Callable[[], dict[str, Any] | None]
    graph: tuple[str, ...] = ()
    host: bool = False


@dataclass
class _Standing:
    contestant: Contestant
    found: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def times(self) -> dict[str, Any]:
        return {passed: {**self.found.get(passed, {}), **clock.summary(ms)} for passed, ms in self.samples.items()}


def compete(context: Context, field: dict[str, Callable[[], Contestant]], ms: float = 60.0) -> dict[str, Any]:
    """Judge and time them; the cell's status is that of our own."""
    results: dict[str, dict[str, Any]] = {}
    standing: dict[str, _Standing] = {}
    ours = [name for name in field if is_ours(name)]
    for name, build in field.items():
        if name in context.without:
            continue
        context.begin(name)
        results[name] = _first(context, name, build, standing, ms)
        if results[name]["status"] == "error" and context.place.lost():
            return _verdict(results, ours) | {"status": "error"}  # the worker sees it, and is replaced
    for _ in range(TURNS - 1 if context.place.real else 0):
        for name in list(standing):
            context.begin(name)
            found = guarded(lambda name=name: _turn(context, standing[name], ms))
            if found["status"] != "ok":
                results[name] |= found
                del standing[name]
    for name, one in standing.items():
        results[name] |= one.times()
    return _verdict(results, ours)


def _first(
    context: Context, name: str, build: Callable[[], Contestant], standing: dict[str, _Standing], ms: float
) -> dict[str, Any]:
    """Build, check, and time a contestant for the first time; writes its line."""

    def tried() -> dict[str, Any]:
        one = _Standing(build())
        if context.prepare:
            for call in one.contestant.calls.values():
                call()
            context.place.wait()
            return {}
        found = one.contestant.check() or {}
        _turn(context, one, ms)
        for passed, call in one.contestant.calls.items():
            one.found[passed] = _beside(context, one, passed, call, ms)
        standing[name] = one
        return {**found, **one.times()}

    found = guarded(tried)
    context.part(name, **found)
    return found


def _turn(context: Context, one: _Standing, ms: float) -> dict[str, Any]:
    for passed, call in one.contestant.calls.items():
        one.samples.setdefault(passed, []).extend(clock.samples(context.place, call, ms / TURNS))
    return {}


def _beside(context: Context, one: _Standing, passed: str, call: Callable[[], object], ms: float) -> dict[str, Any]:
    """Memory; for short calls graphs; for some the host's time."""
    found: dict[str, Any] = {}
    with context.place.peak() as peak:
        call()
    found |= peak
    if one.contestant.host:
        found["host_us"] = clock.host_us(context.place, call)
    short = clock.summary(one.samples[passed])["median_ms"] < clock.SHORT_MS
    if context.place.graphs and passed in one.contestant.graph and (short or one.contestant.host):
        seen = guarded(lambda: clock.in_graphs(call, ms / TURNS))
        status = seen.pop("status")
        found |= seen if status == "ok" else {"graph_reason": seen["reason"]}
    return found


def _verdict(results: dict[str, dict[str, Any]], ours: list[str]) -> dict[str, Any]:
    """The cell's status and reason are ours; without one of ours among them, it is ok if anyone is."""
    judged = [results[name] for name in ours if name in results]
    bad = next((found for found in judged if found["status"] in ("wrong", "error")), None)
    skipped = judged[0] if judged and all(found["status"] == "skipped" for found in judged) else None
    verdict = bad or skipped or {"status": "ok"}
    named = {key: value for key, value in verdict.items() if key in ("status", "reason", "error", "allowed", "detail")}
    return {**named, "contestants": results}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN: what a kernel does not write shows."""
    try:
        from diffmax.testing.rows.checks import _poisoned_memory
    except ImportError:  # under another name: the check goes on without
        yield
        return
    with _poisoned_memory():
        yield
