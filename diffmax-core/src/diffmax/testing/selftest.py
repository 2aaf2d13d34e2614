"""A check of `python -m diffmax selftest`: it needs no pytest. Each operator's folder beside has its own, in `selftest.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
