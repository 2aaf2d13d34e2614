"""Hugging Face transformers: diffmax as an attention implementation, and a recipe that adapts a pretrained model to it."""

import importlib
from typing import TYPE_CHECKING, Any

from diffmax.integrations.transformers.adapting import Heads, adapt, calibrate, distil, refit, replace, suggest_alpha
from diffmax.integrations.transformers.attention import ModelAlpha, register
from diffmax.integrations.transformers.hybrid import register_hybrid
from diffmax.integrations.transformers.power import register_power
from diffmax.integrations.transformers.schedule import alpha_callback

if TYPE_CHECKING:
    from diffmax.integrations.transformers.power_cache import HybridModelCache, PowerModelCache

__all__ = [
    "Heads",
    "HybridModelCache",
    "ModelAlpha",
    "PowerModelCache",
    "adapt",
    "alpha_callback",
    "calibrate",
    "distil",
    "refit",
    "register",
    "register_hybrid",
    "register_power",
    "replace",
    "suggest_alpha",
]


def __getattr__(name: str) -> Any:
    """The caches are subclasses of transformers', which is imported when they are first used."""
    if name not in ("HybridModelCache", "PowerModelCache"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("diffmax.integrations.transformers.power_cache"), name)
