"""`adapt`: all steps of the recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence, Sized
from itertools import islice

from torch import nn

from diffmax.integrations.transformers.adapting.calibration import calibrate
from diffmax.integrations.transformers.adapting.distillation import distil
from diffmax.integrations.transformers.adapting.outputs import Batch, Loss, Output, final_output, relative_error
from diffmax.integrations.transformers.adapting.refitting import refit
from diffmax.integrations.transformers.adapting.replacement import replace


def adapt(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    zeros: float | None = None,
    alpha: float | None = None,
    linears: Sequence[str] = (),
    steps: int = 400,
    calibration: int = 3,
    refitting: int = 60,
    output: Output = final_output,
    loss: Loss = relative_error,
    lr: float = 5e-5,
    progress: Callable[[int, float], object] | None = None,
) -> nn.Module:
    """The whole recipe, in place: `calibrate` on the first batches, `replace`, `refit` on the next, `distil` on the others.

    Args:
        model: A transformers model with softmax attention. Parameters that require a gradient are trained.
        batches: `calibration` + `refitting` (if there are linears) + `steps` dictionaries of inputs.
        zeros, alpha, output: As for `calibrate`.
        linears: As for `refit`. With them the heads start at their final values, because refit has adjusted the layers.
            Without, nothing is refitted, and distil anneals the heads from softmax.
        steps, loss, lr, progress: As for `distil`.
        calibration, refitting: Number of batches for `calibrate` and for `refit`.
    Returns:
        The model. `save_pretrained` writes it, and `AutoModel.from_pretrained(path)` loads it as it is.
    """
    needed = calibration + (refitting if linears else 0) + steps
    if isinstance(batches, Sized) and len(batches) < needed:
        raise ValueError(
            f"adapt: {needed} batches are needed, got {len(batches)}\npass more, or less of calibration={calibration}, "
            f"refitting={refitting}{'' if linears else ' (not used without linears)'} and steps={steps}"
        )
    source = iter(batches)
    heads = calibrate(model, list(islice(source, calibration)), zeros=zeros, alpha=alpha, output=output)
    teacher = copy.deepcopy(model).eval()
    replace(model, heads)
    if linears:
        refit(model, teacher, list(islice(source, refitting)), linears)
    distil(model, teacher, source, steps=steps, loss=loss, lr=lr, anneal=0.0 if linears else 0.3, progress=progress)
    return model
