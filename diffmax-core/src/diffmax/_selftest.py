"""`python -m diffmax selftest`: a few seconds of `diffmax.testing.checks` on each backend and dtype. It needs no pytest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from diffmax._dispatch import registry
from diffmax.plugin import Backend
from diffmax.testing import checks

_Check = Callable[[str, str, torch.dtype], None]


@dataclass(frozen=True)
class Outcome:
    """One line of the self-test; `failure` is empty where the check passed or did not apply."""

    backend: str
    device: str
    dtype: str
    check: str
    seconds: float = 0.0
    failure: str = ""
    not_run: str = ""

    def __str__(self) -> str:
        verdict = "FAILED" if self.failure else "not run" if self.not_run else "ok"
        where = " ".join(word for word in (self.backend, self.device, self.dtype, self.check) if word)
        details = (self.failure or self.not_run).replace("\n", "\n    ")
        return f"{verdict:7} {where}" + (f": {details}" if details else f" ({self.seconds:.1f} s)")


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
            outcome = Outcome(candidate.name, where, "", "")
            yield replace(outcome, failure=words) if backend else replace(outcome, not_run=words)
            continue
        for dtype in candidate.dtypes:
            yield from _check(candidate, where, dtype)


def _check(backend: Backend, device: str, dtype: torch.dtype) -> Iterator[Outcome]:
    for operators, features, check in _CHECKS:
        spec = (backend.name, device, str(dtype).removeprefix("torch."), (check.__doc__ or "").rstrip("."))
        lacking = sorted({*operators} - {*backend.kernels}) + sorted({*features} - backend.features)
        if lacking:
            yield Outcome(*spec, not_run=f"the backend does not claim {', '.join(lacking)}")
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            check(backend.name, device, dtype)
        except Exception as error:  # noqa: BLE001  (whatever a kernel raises is what this command is there to show)
            words = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            yield Outcome(*spec, failure=words)
        else:
            yield Outcome(*spec, seconds=time.perf_counter() - start)


def _device_of(backend: Backend) -> str:
    return "cpu" if "*" in backend.device_types else backend.device_types[0]


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


_CHECKS: tuple[tuple[tuple[str, ...], tuple[str, ...], _Check], ...] = (
    (("bisect",), (), _random_rows),
    (("bisect",), (), _nasty_rows),
    (("bisect",), (), _bad_rows),
    (("bisect",), ("tensor_alpha",), _alpha_tensors),
    (("bisect_backward",), (), _gradients),
    (("bisect",), (), _residuals),
)
