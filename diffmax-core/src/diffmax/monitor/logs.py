"""Log functions and step checks, shared by the monitors of one call and of a whole model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Log(Protocol):
    """A log function: `swanlab.log`, `wandb.log`, or any function of these two arguments."""

    def __call__(self, metrics: dict[str, float], *, step: int) -> object:
        """Take the metrics of one call."""


def check_step(function: str, step: int | None, every: int) -> None:
    """Check a step, and the number of steps between logs."""
    for name, number in (("step", step), ("every", every)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise TypeError(f"{function}: {name} must be an int, got {number!r} of type {type(number).__name__}")
    if every < 1:
        raise ValueError(f"{function}: every must be at least 1, got {every}")


def log_of(function: str, log: Log | None) -> Log:
    """The log that is given, or else swanlab's."""
    if log is None:
        return swanlab_log(function)
    if not callable(log):
        raise TypeError(f"{function}: log must be a function of (metrics, step=...), got {log!r} of type {type(log).__name__}")
    return log


def swanlab_log(function: str) -> Log:
    """`swanlab.log`, the default of a function that got no log."""
    try:
        import swanlab
    except ImportError as error:
        raise ImportError(
            f"{function}: swanlab is needed where no log is given, got none\n"
            'pip install "diffmax-core[monitoring]", or pass log=, a function that takes (metrics, step=...)'
        ) from error
    log: Log = swanlab.log
    return log


def read(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The metrics as floats, with one read per device."""
    result = dict.fromkeys(metrics, 0.0)
    for device in dict.fromkeys(metric.device for metric in metrics.values()):
        here = {name: metric for name, metric in metrics.items() if metric.device == device}
        values = torch.stack([metric.to(torch.promote_types(metric.dtype, torch.float32)) for metric in here.values()]).tolist()
        result |= dict(zip(here, values, strict=True))
    return result
