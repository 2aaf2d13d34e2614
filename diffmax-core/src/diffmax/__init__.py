"""diffmax: a sparse, power-law alternative to softmax for attention."""

import sys

from diffmax import _discovery, _dispatch, _older_project
from diffmax import nn as nn
from diffmax._attention import AttentionStats, attention, attention_varlen
from diffmax._dispatch import register_backend, unregister_backend, use_backend
from diffmax._inspect import backends, explain
from diffmax._kvcache import KVCacheStats, PageBounds, attention_with_kvcache, page_bounds
from diffmax._warmup import warmup
from diffmax.errors import BackendError, DiffmaxError, NoBackendError
from diffmax.functional import diffmax_bisect
from diffmax.losses import DiffmaxLoss, diffmax_loss
from diffmax.maps import AlphaMap, ExpMap, HillMap, TanhMap
from diffmax.monitor import diffmax_bisect_monitored
from diffmax.nn import DiffmaxBisectModule

__version__ = _discovery.CORE_VERSION

_older_project.warn_if_installed()
if "torch.utils.flop_counter" in sys.modules:  # it imports triton: whoever wants it has imported it
    from diffmax.integrations import flop_counter  # noqa: F401

# Neither nn nor __version__: a star import must not take torch.nn's place, nor that of the caller's own version.
__all__ = [
    "AlphaMap",
    "AttentionStats",
    "BackendError",
    "DiffmaxBisectModule",
    "DiffmaxError",
    "DiffmaxLoss",
    "ExpMap",
    "HillMap",
    "KVCacheStats",
    "NoBackendError",
    "PageBounds",
    "TanhMap",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "backends",
    "diffmax_bisect",
    "diffmax_bisect_monitored",
    "diffmax_loss",
    "explain",
    "page_bounds",
    "register_backend",
    "unregister_backend",
    "use_backend",
    "warmup",
]

_dispatch.registry.discover()  # last: a plugin may import any of the names above
