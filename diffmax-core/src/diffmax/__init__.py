"""diffmax: a sparse, power-law alternative to softmax for attention."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from diffmax.errors import BackendError, DiffmaxError, NoBackendError
from diffmax.machine import discovery, dispatch, name_conflict
from diffmax.machine.dispatch import register_backend, unregister_backend, use_backend
from diffmax.maps import AlphaMap, ExpMap, HillMap, TanhMap
from diffmax.matched import matched_scale
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
    from diffmax import functional as functional
    from diffmax import hybrid as hybrid
    from diffmax import losses as losses
    from diffmax import monitor as monitor
    from diffmax import nn as nn
    from diffmax import power as power
    from diffmax import reference_attention as reference_attention
    from diffmax import reference_dropout as reference_dropout
    from diffmax import reference_kvcache as reference_kvcache
    from diffmax.hybrid import HybridCache
    from diffmax.inspecting import AttentionReport, inspect_attention
    from diffmax.integrations.transformers import suggest_alpha
    from diffmax.machine.inspection import backends, explain
    from diffmax.machine.warmup import warmup
    from diffmax.monitor import diffmax_bisect_monitored
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


# Imported when they are first used: modules, and names with the module that has them.
_LATER_MODULES = frozenset(
    {
        "functional",
        "hybrid",
        "losses",
        "monitor",
        "nn",
        "power",
        "reference_attention",
        "reference_dropout",
        "reference_kvcache",
    }
)
_LATER = {
    "AttentionReport": "inspecting",
    "DiffmaxBisectModule": "nn",
    "HybridCache": "hybrid",
    "backends": "machine.inspection",
    "diffmax_bisect_monitored": "monitor",
    "explain": "machine.inspection",
    "inspect_attention": "inspecting",
    "suggest_alpha": "integrations.transformers",
    "warmup": "machine.warmup",
}


def __getattr__(name: str) -> Any:
    if name in _LATER_MODULES:
        return importlib.import_module(f"diffmax.{name}")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"diffmax.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER_MODULES, *_LATER})


dispatch.registry.discover()  # last: a plugin may import any of the names above
