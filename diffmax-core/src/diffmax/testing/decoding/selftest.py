"""What `python -m diffmax selftest` checks of attention over a cache."""

from __future__ import annotations

from functools import partial

import torch

from diffmax.testing.decoding import checks
from diffmax.testing.selftest import Check, checks_of_cases

_decoding = partial(checks_of_cases, "attention_kvcache", checks.decoding_passes_the_gate, checks.CASES)


def _goes_on(backend: str, device: str, dtype: torch.dtype) -> None:
    """Token after token equals attention over all."""
    checks.decoding_goes_on(backend, device, dtype)


CHECKS = (
    *_decoding("plain", "pages, new token", "bounds", "bounds, negative scale", "grouped heads", "window", "rounded keys"),
    Check("attention_kvcache", _goes_on, frozenset({"kv_cache", "causal", "paged"}), holds_for_reference=True),
)
