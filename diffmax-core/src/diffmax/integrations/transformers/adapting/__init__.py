"""From a pretrained softmax model to a diffmax model: calibrate, replace, refit, distil.

docs/adapting.md explains when this is worthwhile.

Each head of each layer gets an alpha and a scale for its scores. Both are stored in `model.config.diffmax`: `save_pretrained`
writes them, and `from_pretrained` restores them where this package is imported.
"""

from diffmax.integrations.transformers.adapting.calibration import ALPHAS, SCALES, calibrate
from diffmax.integrations.transformers.adapting.distillation import distil
from diffmax.integrations.transformers.adapting.outputs import (
    Batch,
    Loss,
    Output,
    divergence,
    final_output,
    likelihood,
    relative_error,
)
from diffmax.integrations.transformers.adapting.recipe import adapt
from diffmax.integrations.transformers.adapting.refitting import refit
from diffmax.integrations.transformers.adapting.replacement import adapted_when_loaded, replace
from diffmax.integrations.transformers.adapting.suggestion import suggest_alpha
from diffmax.integrations.transformers.heads import NAME, Heads

__all__ = [
    "ALPHAS",
    "NAME",
    "SCALES",
    "Batch",
    "Heads",
    "Loss",
    "Output",
    "adapt",
    "adapted_when_loaded",
    "calibrate",
    "distil",
    "divergence",
    "final_output",
    "likelihood",
    "refit",
    "relative_error",
    "replace",
    "suggest_alpha",
]
