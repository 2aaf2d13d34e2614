"""Hugging Face transformers: diffmax as an attention implementation, and a recipe that adapts a pretrained model to it."""

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from diffmax.integrations.transformers.adapting import (
    Heads,
    adapt,
    adapted_when_loaded,
    calibrate,
    distil,
    divergence,
    refit,
    replace,
    suggest_alpha,
)
from diffmax.integrations.transformers.attention import ModelAlpha, register
from diffmax.integrations.transformers.hybrid import register_hybrid
from diffmax.integrations.transformers.power import register_power
from diffmax.integrations.transformers.schedule import alpha_callback

if TYPE_CHECKING:
    from diffmax.integrations.transformers.power_cache import HybridModelCache, PowerModelCache
    from diffmax.integrations.transformers.rounded_cache import RoundedModelCache

__all__ = [
    "Heads",
    "HybridModelCache",
    "ModelAlpha",
    "PowerModelCache",
    "RoundedModelCache",
    "adapt",
    "alpha_callback",
    "calibrate",
    "distil",
    "divergence",
    "refit",
    "register",
    "register_hybrid",
    "register_power",
    "replace",
    "suggest_alpha",
]

with contextlib.suppress(ImportError):  # transformers is missing or too old: each function says so
    adapted_when_loaded()

_CACHES = {
    "HybridModelCache": "power_cache",
    "PowerModelCache": "power_cache",
    "RoundedModelCache": "rounded_cache",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """The caches are subclasses of transformers', which is imported when they are first used."""
    if name not in _CACHES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_CACHES[name]}"), name)
