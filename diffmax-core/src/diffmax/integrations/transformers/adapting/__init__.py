"""From a pretrained softmax model to a diffmax model: calibrate, replace, refit, distil.

docs/adapting.md explains when this is worthwhile.

Each head of each layer gets an alpha and a scale for its scores. Both are stored in `model.config.diffmax`: `save_pretrained`
writes them, and `replace(model)` restores them after `from_pretrained`.
"""

from diffmax.integrations.transformers.adapting.calibration import ALPHAS, SCALES, calibrate
from diffmax.integrations.transformers.adapting.distillation import distil
from diffmax.integrations.transformers.adapting.outputs import Batch, Loss, Output, final_output, likelihood, relative_error
from diffmax.integrations.transformers.adapting.recipe import adapt
from diffmax.integrations.transformers.adapting.refitting import refit
from diffmax.integrations.transformers.adapting.replacement import NAME, Heads, replace
from diffmax.integrations.transformers.adapting.suggestion import suggest_alpha

__all__ = [
    "ALPHAS",
    "NAME",
    "SCALES",
    "Batch",
    "Heads",
    "Loss",
    "Output",
    "adapt",
    "calibrate",
    "distil",
    "final_output",
    "likelihood",
    "refit",
    "relative_error",
    "replace",
    "suggest_alpha",
]
