"""What `python -m diffmax selftest` checks of attention over a cache."""

from __future__ import annotations

import torch

from diffmax.testing.decoding import checks
from diffmax.testing.selftest import Check


def _decoding(*names: str) -> Check:
    cases = [checks.CASES[name] for name in names]

    def run(backend: str, device: str, dtype: torch.dtype) -> None:
        for case in cases:
            checks.decoding_passes_the_gate(backend, device, case, dtype)

    run.__doc__ = "; ".join(names).capitalize()
    return Check("attention_kvcache", run, frozenset[str]().union(*(case.features() for case in cases)))


def _goes_on(backend: str, device: str, dtype: torch.dtype) -> None:
    """Token after token equals attention over all."""
    checks.decoding_goes_on(backend, device, dtype)


CHECKS = (
    _decoding("plain", "bounds"),
    Check("attention_kvcache", _goes_on, frozenset({"kv_cache", "causal", "paged"}), holds_for_reference=True),
)
