"""diffmax: a sparse, power-law alternative to softmax for attention."""

from importlib_metadata import version as _version

from diffmax import _older_project, nn
from diffmax._dispatch import backends
from diffmax.errors import DiffmaxError, NoBackendError
from diffmax.functional import diffmax_bisect
from diffmax.maps import AlphaMap, ExpMap, HillMap, TanhMap
from diffmax.nn import DiffmaxBisectModule

__version__ = _version("diffmax-core")
_older_project.warn_if_installed()

__all__ = [
    "AlphaMap",
    "DiffmaxBisectModule",
    "DiffmaxError",
    "ExpMap",
    "HillMap",
    "NoBackendError",
    "TanhMap",
    "__version__",
    "backends",
    "diffmax_bisect",
    "nn",
]
