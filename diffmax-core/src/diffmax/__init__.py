"""diffmax: a sparse, power-law alternative to softmax for attention."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from diffmax import functional as functional
from diffmax import losses as losses
from diffmax import reference_attention as reference_attention
from diffmax import reference_dropout as reference_dropout
from diffmax import reference_kvcache as reference_kvcache
from diffmax.errors import BackendError, DiffmaxError, NoBackendError
from diffmax.hybrid import HybridCache
from diffmax.machine import discovery, dispatch, name_conflict
from diffmax.machine.dispatch import register_backend, unregister_backend, use_backend
from diffmax.machine.inspection import backends, explain
from diffmax.machine.warmup import warmup
from diffmax.maps import AlphaMap, ExpMap, HillMap, TanhMap
from diffmax.matched import matched_scale
from diffmax.monitor import diffmax_bisect_monitored
from diffmax.operators import register_all
from diffmax.operators.attention.api import attention, attention_varlen
from diffmax.operators.attention.stats import AttentionStats
from diffmax.operators.attention.weights import SparseWeights
from diffmax.operators.decoding.api import KVCacheStats, PageBounds, attention_with_kvcache, page_bounds
from diffmax.operators.loss.api import DiffmaxLoss, diffmax_loss
from diffmax.operators.power.api import power_attention
from diffmax.operators.power.state import PowerState
from diffmax.operators.rows.api import diffmax_bisect
from diffmax.operators.threshold.api import threshold_attention, threshold_attention_varlen
from diffmax.operators.threshold.members import (
    lazy_attention,
    lazy_attention_varlen,
    threshold_differential_attention,
    threshold_rectified_attention,
)

if TYPE_CHECKING:
    from diffmax import nn as nn
    from diffmax.inspecting import AttentionReport, inspect_attention
    from diffmax.integrations.transformers import suggest_alpha
    from diffmax.nn import DiffmaxBisectModule

register_all()
__version__ = discovery.CORE_VERSION

name_conflict.warn_if_installed()
if "torch.utils.flop_counter" in sys.modules:  # only if already imported, because it imports triton
    from diffmax.integrations import flop_counter  # noqa: F401

# Without nn and __version__: a star import must not replace torch.nn or the caller's own version.
__all__ = [
    "AlphaMap",
    "AttentionReport",
    "AttentionStats",
    "BackendError",
    "DiffmaxBisectModule",
    "DiffmaxError",
    "DiffmaxLoss",
    "ExpMap",
    "HillMap",
    "HybridCache",
    "KVCacheStats",
    "NoBackendError",
    "PageBounds",
    "PowerState",
    "SparseWeights",
    "TanhMap",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "backends",
    "diffmax_bisect",
    "diffmax_bisect_monitored",
    "diffmax_loss",
    "explain",
    "inspect_attention",
    "lazy_attention",
    "lazy_attention_varlen",
    "matched_scale",
    "page_bounds",
    "power_attention",
    "register_backend",
    "suggest_alpha",
    "threshold_attention",
    "threshold_attention_varlen",
    "threshold_differential_attention",
    "threshold_rectified_attention",
    "unregister_backend",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Import modules of layers when they are first used: a fifth of what the import would take."""
    if name == "power":
        return importlib.import_module("diffmax.power")
    if name == "suggest_alpha":
        globals()[name] = importlib.import_module("diffmax.integrations.transformers").suggest_alpha
        return globals()[name]
    if name in ("AttentionReport", "inspect_attention"):
        globals()[name] = getattr(importlib.import_module("diffmax.inspecting"), name)
        return globals()[name]
    if name not in ("nn", "DiffmaxBisectModule"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    nn = importlib.import_module("diffmax.nn")
    globals()["DiffmaxBisectModule"] = nn.DiffmaxBisectModule
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), "nn", "power", "DiffmaxBisectModule", "suggest_alpha", "AttentionReport", "inspect_attention"})


dispatch.registry.discover()  # last: a plugin may import any of the names above
