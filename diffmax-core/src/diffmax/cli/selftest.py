"""`python -m diffmax selftest`: a few checks of `diffmax.testing` on each operator of each backend. It needs no pytest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from diffmax.machine.dispatch import registry
from diffmax.plugin import OPERATORS, Backend
from diffmax.testing.attention import checks as attention_checks
from diffmax.testing.decoding import checks as decoding_checks
from diffmax.testing.rows import checks

_Run = Callable[[str, str, torch.dtype], None]


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


@dataclass(frozen=True)
class Check:
    """A check of one operator. What does not hold for the reference on the CPU compares a kernel with that very reference."""

    operator: str
    run: _Run
    features: frozenset[str] = frozenset()
    holds_for_reference: bool = False

    @property
    def name(self) -> str:
        """What it checks, in words."""
        return (self.run.__doc__ or "").rstrip(".")


def run(backend: str | None = None, device: str | None = None) -> Iterator[Outcome]:
    """Check the named backend, or every one, on `device`, or where each can run.

    Raises:
        ValueError: No such backend is loaded.
    """
    known = {candidate.name: candidate for candidate in registry.backends()}
    if backend is not None and backend not in known:
        raise ValueError(f"selftest: no backend is named {backend!r}, loaded: {', '.join(known)}")
    for candidate in [known[backend]] if backend else known.values():
        status, reason = registry.probe(candidate)
        where = device or _device_of(candidate)
        served = "*" in candidate.device_types or where.partition(":")[0] in candidate.device_types
        if status or not served:
            # a backend for another machine is no failure, unless it was asked for
            words = f"{status}: {reason}" if status else f"serves {', '.join(candidate.device_types)}, not {where}"
            outcome = Outcome(candidate.name, where)
            yield replace(outcome, failure=words) if backend else replace(outcome, not_run=words)
            continue
        for operator in OPERATORS:
            yield from _check_operator(candidate, where, operator)


def summary(outcomes: list[Outcome]) -> tuple[str, int]:
    """The closing line and the exit status: 1 if something failed, or if nothing was run at all."""
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
    except Exception as error:  # noqa: BLE001  (whatever a kernel raises is what this command is there to show)
        words = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        return replace(outcome, failure=words)
    return replace(outcome, seconds=time.perf_counter() - start)


def _device_of(backend: Backend) -> str:
    return "cpu" if "*" in backend.device_types else backend.device_types[0]


def _closed_form(backend: str, device: str, dtype: torch.dtype) -> None:
    """The closed form at alpha = 1/2."""
    checks.has_its_closed_form(backend, device, dtype)


def _random_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    """Random rows, short to long."""
    for shape in ((7, 64), (2, 3, 129), (2, 4099)):
        for alpha in (0.1, 0.5, 0.9, 0.999):
            checks.forward_passes_the_gate(backend, device, checks.random_scores(shape, dtype, 3.0), alpha)


def _nasty_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    """Ties, huge offsets, masks."""
    for alpha in (0.1, 0.85):
        checks.nasty_rows_pass_the_gate(backend, device, dtype, alpha)


def _bad_rows(backend: str, device: str, dtype: torch.dtype) -> None:
    """Fully masked rows, NaN, +inf, empty rows."""
    checks.masks_and_bad_rows(backend, device, dtype)
    checks.empty_and_single(backend, device, dtype)


def _alpha_tensors(backend: str, device: str, dtype: torch.dtype) -> None:
    """Alpha per head and per row."""
    checks.alpha_tensors(backend, device, dtype)
    checks.bad_alphas_on_the_device_give_nan_rows(backend, device, dtype)


def _gradients(backend: str, device: str, dtype: torch.dtype) -> None:
    """Gradients for given residuals."""
    for alpha in (0.1, 0.85):
        checks.backward_passes_the_gate(backend, device, checks.random_scores((3, 129), dtype), alpha)


def _residuals(backend: str, device: str, dtype: torch.dtype) -> None:
    """Forward and backward of different backends."""
    checks.residuals_are_exchangeable(backend, device, dtype)


def _attention(*names: str, gradients: bool = False) -> Check:
    cases = [attention_checks.CASES[name] for name in names]

    def run(backend: str, device: str, dtype: torch.dtype) -> None:
        for case in cases:
            if gradients:
                attention_checks.gradients_are_right_on_average(backend, device, case, dtype)
            else:
                attention_checks.forward_passes_the_gate(backend, device, case, dtype)

    run.__doc__ = "; ".join(names).capitalize()
    features = frozenset[str]().union(*(case.features() for case in cases))
    return Check("attention_backward" if gradients else "attention", run, features)


def _decoding(*names: str) -> Check:
    cases = [decoding_checks.CASES[name] for name in names]

    def run(backend: str, device: str, dtype: torch.dtype) -> None:
        for case in cases:
            decoding_checks.decoding_passes_the_gate(backend, device, case, dtype)

    run.__doc__ = "; ".join(names).capitalize()
    return Check("attention_kvcache", run, frozenset[str]().union(*(case.features() for case in cases)))


def _bad_queries(backend: str, device: str, dtype: torch.dtype) -> None:
    """Queries that see nothing, NaN, +inf."""
    attention_checks.masked_and_bad_queries(backend, device, dtype)


def _packed(backend: str, device: str, dtype: torch.dtype) -> None:
    """Packed sequences, each on its own."""
    attention_checks.packed_sequences_are_each_on_their_own(backend, device, dtype)


def _goes_on(backend: str, device: str, dtype: torch.dtype) -> None:
    """Token after token equals attention over all."""
    decoding_checks.decoding_goes_on(backend, device, dtype)


CHECKS = (
    Check("bisect", _closed_form, holds_for_reference=True),
    Check("bisect", _random_rows),
    Check("bisect", _nasty_rows),
    Check("bisect", _bad_rows, holds_for_reference=True),
    Check("bisect", _alpha_tensors, frozenset({"tensor_alpha"})),
    Check("bisect_backward", _gradients),
    Check("bisect_backward", _residuals),
    _attention("plain", "one query", "head size 80"),
    _attention("causal, lower right", "mask of queries and keys", "grouped heads"),
    _attention("sink", "softcap, bias, ALiBi"),
    Check("attention", _bad_queries, holds_for_reference=True),
    Check("attention", _packed, frozenset({"varlen"}), holds_for_reference=True),
    _attention("plain", "causal", gradients=True),
    _attention("grouped heads, causal, alpha per head", gradients=True),
    _decoding("plain", "bounds"),
    Check("attention_kvcache", _goes_on, frozenset({"kv_cache", "causal", "paged"}), holds_for_reference=True),
)
