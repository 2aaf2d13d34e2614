"""`distil`: train the student to reproduce its teacher's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized

import torch
from torch import nn

from diffmax.integrations.transformers.adapting.outputs import Batch, Loss, each, relative_error
from diffmax.integrations.transformers.adapting.replacement import replace
from diffmax.integrations.transformers.heads import heads_of

_TOO_FEW = "distil: a batch per step is needed, got {} for {} steps\npass more, or fewer steps"


def distil(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 5e-5,
    anneal: float = 0.3,
    loss: Loss = relative_error,
    progress: Callable[[int, float], object] | None = None,
) -> None:
    """Train a model changed by `replace` to reproduce its teacher's output, while its heads move from softmax to diffmax.

    Args:
        model: The student. Parameters that require a gradient are trained: freeze the others.
        teacher: The softmax model.
        batches: At least `steps` dictionaries of inputs, without labels: text similar to the model's later inputs.
        steps: Steps of Adam; the learning rate rises for a twentieth of them, and then decays to 0 along a cosine.
        lr: The largest learning rate.
        anneal: The share of the steps in which the heads move from near softmax to their final values. 0: they do not move.
        loss: The loss to minimize: a function of the student's output, the teacher's output, and the inputs.
        progress: Called with the number of finished steps and the loss, which waits for the device.
    Raises:
        ValueError: The teacher is the model, there are fewer batches than steps, the model was not replaced, or no parameter is
            trainable. The heads then have their final values; the parameters keep the result of the finished steps.
    """
    if isinstance(batches, Sized) and len(batches) < steps:
        raise ValueError(_TOO_FEW.format(len(batches), steps))
    heads = heads_of(model.config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not heads:
        raise ValueError("distil: the model must have diffmax heads, got none\ncall replace(model, heads)")
    if teacher is model:
        raise ValueError(
            "distil: the teacher must be another model than the student, got the same\n"
            "replace changes a model in place: keep the teacher by copy.deepcopy(model) before"
        )
    if not trained:
        raise ValueError("distil: the model must have a parameter to train, got none\ncall requires_grad_() on some")
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    source = iter(each("distil", batches))
    try:
        for step in range(steps):
            batch = next(source, None)
            if batch is None:
                raise ValueError(_TOO_FEW.format(step, steps))
            if step < anneal * steps:
                replace(model, heads, min(1.0, (step + 1) / max(1.0, anneal * steps)))
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
            with torch.no_grad():
                wanted = teacher(**batch)
            value = loss(model(**batch), wanted, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if progress is not None:
                progress(step + 1, float(value.detach()))
    finally:
        replace(model, heads)
