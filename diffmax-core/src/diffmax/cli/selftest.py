"""`python -m diffmax selftest`: some checks of `diffmax.testing` for each operator of each backend, without pytest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from diffmax.machine.dispatch import import_function, registry
from diffmax.operators.common.spec import SPECS
from diffmax.plugin import OPERATOR_FEATURES, Backend
from diffmax.testing.selftest import Check


@dataclass(frozen=True)
class Outcome:
    """One line of the self-test; `failure` and `not_run` are empty where the check passed."""

    backend: str
    device: str
    operator: str = ""
    dtype: str = ""
    check: str = ""
    seconds: float = 0.0
    failure: str = ""
    not_run: str = ""

    def __str__(self) -> str:
        verdict = "FAILED" if self.failure else "not run" if self.not_run else "ok"
        where = " ".join(word for word in (self.backend, self.device, self.operator, self.dtype, self.check) if word)
        details = (self.failure or self.not_run).replace("\n", "\n    ")
        return f"{verdict:7} {where}" + (f": {details}" if details else f" ({self.seconds:.1f} s)")


CHECKS: tuple[Check, ...] = tuple(
    check
    for spec in SPECS.values()
    if spec.selftest
    for check in import_function(spec.selftest)  # type: ignore[attr-defined]
)


def run(backend: str | None = None, device: str | None = None) -> Iterator[Outcome]:
    """Check the named backend, or every one, on `device`, or on a device that each supports.

    Raises:
        ValueError: No such backend is loaded.
    """
    known = {candidate.name: candidate for candidate in registry.backends()}
    if backend is not None and backend not in known:
        refused = "".join(f"\n  {p} is {p.status}: {p.reason}" for p in registry.plugins if p.name == backend and p.reason)
        raise ValueError(f"selftest: no backend is named {backend!r}, loaded: {', '.join(known)}{refused}")
    for candidate in [known[backend]] if backend else known.values():
        status, reason = registry.probe(candidate)
        where = device or _device_of(candidate)
        served = "*" in candidate.device_types or where.partition(":")[0] in candidate.device_types
        if status or not served:
            # a backend for another machine is no failure, unless it was requested
            words = f"{status}: {reason}" if status else f"serves {', '.join(candidate.device_types)}, not {where}"
            outcome = Outcome(candidate.name, where)
            yield replace(outcome, failure=words) if backend else replace(outcome, not_run=words)
            continue
        for operator in OPERATOR_FEATURES:
            yield from _check_operator(candidate, where, operator)


def summary(outcomes: list[Outcome]) -> tuple[str, int]:
    """The closing line and the exit status: 1 if a check failed, or if none was run."""
    failed, left_out = sum(bool(o.failure) for o in outcomes), sum(bool(o.not_run) for o in outcomes)
    passed = len(outcomes) - failed - left_out
    if not passed and not failed:
        return "nothing was run", 1
    lines = f"{left_out} line{'s' * (left_out != 1)} not run"
    return (f"{failed} failed, {passed} passed, {lines}", 1) if failed else (f"all passed: {passed} checks, {lines}", 0)


def _check_operator(backend: Backend, device: str, operator: str) -> Iterator[Outcome]:
    kernel = backend.provided.get(operator)
    if kernel is None:
        yield Outcome(backend.name, device, operator, not_run="the backend does not provide it")
        return
    asked = [check for check in CHECKS if check.operator == operator]
    if backend.name == "reference" and torch.device(device).type == "cpu":
        held = [check for check in asked if check.holds_for_reference]
        words = f"{len(asked) - len(held)} of {len(asked)} checks compare a backend with this one"
        yield Outcome(backend.name, device, operator, not_run=words)
        asked = held
    for dtype in kernel.dtypes:
        for check in asked:
            outcome = Outcome(backend.name, device, operator, str(dtype).removeprefix("torch."), check.name)
            lacking = sorted(check.features - kernel.features)
            if lacking:
                yield replace(outcome, not_run=f"the backend does not claim {', '.join(lacking)}")
            else:
                yield _outcome(outcome, check, dtype)


def _outcome(outcome: Outcome, check: Check, dtype: torch.dtype) -> Outcome:
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        check.run(outcome.backend, outcome.device, dtype)
    except Exception as error:  # noqa: BLE001  (the command reports whatever a kernel raises)
        words = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        return replace(outcome, failure=words)
    return replace(outcome, seconds=time.perf_counter() - start)


def _device_of(backend: Backend) -> str:
    return "cpu" if "*" in backend.device_types else backend.device_types[0]
