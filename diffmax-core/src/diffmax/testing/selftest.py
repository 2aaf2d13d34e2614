"""A check of `python -m diffmax selftest`: it needs no pytest. Each operator's folder beside has its own, in `selftest.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[str, str, torch.dtype], None]


@dataclass(frozen=True)
class Check:
    """A check of one operator. What does not hold for the reference on the CPU compares a kernel with that very reference."""

    operator: str
    run: Run
    features: frozenset[str] = frozenset()
    holds_for_reference: bool = False

    @property
    def name(self) -> str:
        """What it checks, in words."""
        return (self.run.__doc__ or "").rstrip(".")


def checks_of_cases(operator: str, check: Callable[..., None], cases: Mapping[str, Any], *names: str) -> tuple[Check, ...]:
    """For each of these cases a check of (backend, device, case, dtype), so that one left out takes no other with it."""

    def of_case(name: str) -> Check:
        def run(backend: str, device: str, dtype: torch.dtype) -> None:
            check(backend, device, cases[name], dtype)

        run.__doc__ = name[:1].upper() + name[1:]
        return Check(operator, run, frozenset(cases[name].features()))

    return tuple(of_case(name) for name in names)
