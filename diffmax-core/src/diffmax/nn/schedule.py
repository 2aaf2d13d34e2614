"""Alpha schedules: alpha as a function of the training step, for example from softmax to a target."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffmax.nn._alpha import HeadAlpha
from diffmax.nn.bisect import DiffmaxBisectModule
from diffmax.operators.common.checks import one_minus_alpha

_NAME = "AlphaSchedule"
_SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class _ScheduledValue:
    """A buffer that moves from `start` to `end`, or a float that becomes a buffer while it moves."""

    owner: nn.Module
    name: str
    start: float
    end: Tensor  # float64 represents a float exactly
    is_float: bool = False


class AlphaSchedule:
    """alpha as a function of the training step: start + (alpha - start) s, with a share s that rises from 0 to 1.

    A model that was trained with softmax keeps more of its quality if alpha moves during training. With start = 1, softmax,
    1 - alpha grows in proportion to s.

    Args:
        alpha: The target. A float or a tensor: pass the schedule as an alpha function, such as
            `DiffmaxBisectModule(schedule)`, `diffmax_bisect(X, schedule)`, or
            `diffmax.integrations.transformers.register(alpha=schedule)`. A module: every alpha of a `DiffmaxBisectModule` and
            of attention with diffmax weights in it (of diffmax.nn, and of timm and diffusers after `replace`) that is a float
            or a buffer moves from `start` to its current value; so do alphas and scales of a model that
            `diffmax.integrations.transformers.replace` changed, the scales from 1.
        steps: Number of steps in which s rises from 0 to 1. With "constant" it rises in one step.
        start: Initial alpha, 0 < start <= 1.
        shape: "constant", "linear" or "cosine": how s rises.
        warmup: Number of steps with s = 0 before the rise.
    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range, shape is unknown, or the module has no alpha to move: a learned one is not
            changed.

    A float alpha of a module becomes a non-persistent buffer while it moves, and a float again at the end: so a compiled model
    is not recompiled at each step, but once at the end. Buffers are written in place. A second schedule of a module whose alpha
    still moves has the target of the first: step one of them. A copy that is kept up to date by state dicts, such as a moving
    average of the weights, does not get an alpha that began as a float, nor the heads of a model of transformers, and says so;
    torch's `AveragedModel`, which pairs buffers, fails where one comes or goes. Pass alpha as a tensor (), which is in the
    state dict, or make a schedule for the copy too.

    Example:
        >>> import torch
        >>> from diffmax import DiffmaxBisectModule
        >>> model = DiffmaxBisectModule(0.8)
        >>> schedule, alphas = AlphaSchedule(model, steps=4, shape="linear"), []
        >>> for _ in range(4):
        ...     alphas.append(f"{float(model.alpha):.2f}")
        ...     schedule.step()  # after optimizer.step()
        >>> alphas, model.alpha
        (['1.00', '0.95', '0.90', '0.85'], 0.8)
    """

    steps: int
    warmup: int
    start: float
    shape: str
    last_step: int

    def __init__(
        self,
        alpha: float | Tensor | nn.Module,
        steps: int = 0,
        *,
        start: float = 1.0,
        shape: Literal["constant", "linear", "cosine"] = "cosine",
        warmup: int = 0,
    ) -> None:
        for name, number in (("steps", steps), ("warmup", warmup)):
            _check_count(name, number)
        if not isinstance(start, numbers.Real) or isinstance(start, bool):
            raise TypeError(f"{_NAME}: start must be a float, got {start!r} of type {type(start).__name__}")
        if not 0 < start <= 1:
            raise ValueError(f"{_NAME}: start must satisfy 0 < start <= 1, got {start}")
        if shape not in _SHAPES:
            raise ValueError(f'{_NAME}: shape must be "constant", "linear" or "cosine", got {shape!r}')
        if shape != "constant" and steps == 0:
            raise ValueError(f'{_NAME}: steps must be at least 1 with shape "{shape}", got 0\nhow many steps shall alpha take?')
        self.steps, self.warmup, self.shape = steps, warmup, shape
        self.start = float(start)
        self._alpha: Any = None
        self._scheduled: list[_ScheduledValue]
        if isinstance(alpha, nn.Module):
            self._scheduled = _scheduled_in(alpha, self.start)
            if not self._scheduled:
                raise ValueError(
                    f"{_NAME}: the module must have attention or rows with an alpha that is not learned, got "
                    f"{type(alpha).__name__} with none\npass a float, and give the schedule where alpha may be a function"
                )
        else:
            like = alpha if isinstance(alpha, Tensor) else torch.empty(1)  # its shape is checked by the call
            one_minus_alpha(_NAME, like, alpha, -1, ", or a module")
            self._alpha = nn.Module()
            self._alpha.alpha = alpha
            self._scheduled = [_scheduled_value(self._alpha, self.start)]
        self.step(0)

    def __call__(self, module: nn.Module | None = None) -> float | Tensor:
        """The alpha of the current step, for a schedule that was made from a float or a tensor."""
        if self._alpha is None:
            raise TypeError(f"{_NAME}: a schedule of a module writes into it and is no function\nmake one from a float instead")
        result: float | Tensor = self._alpha.alpha
        return result

    @property
    def share(self) -> float:
        """s at the current step, in [0, 1]."""
        done = self.last_step - self.warmup
        if self.shape == "constant" or done >= self.steps:
            return 1.0 if done >= 0 else 0.0
        linear = max(0.0, done / self.steps)
        return linear if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * linear))

    def step(self, step: int | None = None) -> None:
        """Go to the next step, or to a given one: after `optimizer.step()`."""
        if step is not None:
            _check_count("step", step)
        self.last_step = self.last_step + 1 if step is None else step
        share = self.share
        for value in self._scheduled:
            _write(value, share)

    def state_dict(self) -> dict[str, Any]:
        """The step and the target of each alpha, which the state of a half-trained module does not contain."""
        return {"step": self.last_step, "ends": [value.end.clone() for value in self._scheduled]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; load the state of the model first. steps, shape, start and warmup are not part of the state.

        Raises:
            ValueError: The state belongs to a schedule of another module.
        """
        if not {"step", "ends"} <= set(state_dict):
            raise ValueError(
                f"{_NAME}: the state must hold step and ends, got {sorted(state_dict)}\nis it of another schedule?"
            )
        ends = state_dict["ends"]
        if [end.shape for end in ends] != [value.end.shape for value in self._scheduled]:
            got, wanted = ([tuple(end.shape) for end in shapes] for shapes in (ends, [p.end for p in self._scheduled]))
            raise ValueError(f"{_NAME}: the state must have alphas of shapes {wanted}, got {got}\nis it of another module?")
        for value, end in zip(self._scheduled, ends, strict=True):
            value.end.copy_(end)
        self.step(state_dict["step"])


def _check_count(name: str, number: Any) -> None:
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{_NAME}: {name} must be an int, got {number!r} of type {type(number).__name__}")
    if number < 0:
        raise ValueError(f"{_NAME}: {name} must not be negative, got {number}")


def _scheduled_in(model: nn.Module, start: float) -> list[_ScheduledValue]:
    values: list[_ScheduledValue] = []
    for module in model.modules():
        is_ours = isinstance(module, (HeadAlpha, DiffmaxBisectModule)) and module.alpha_map is None
        is_used = getattr(module, "weights", "diffmax") != "softmax"
        if is_ours and is_used and ("alpha" in module._buffers or isinstance(module.alpha, numbers.Real)):
            values.append(_scheduled_value(module, start))
        heads = module._modules.get("diffmax_heads")  # of integrations.transformers.replace
        if heads is not None:
            values += [_scheduled_value(heads, start), _scheduled_value(heads, 1.0, "scale")]
    return values


def _scheduled_value(owner: nn.Module, start: float, name: str = "alpha") -> _ScheduledValue:
    moving = owner.__dict__.get("_diffmax_moving", {})
    if name in moving:  # of another schedule, which has not arrived: what it is here is no target
        return _ScheduledValue(owner, name, start, *moving[name])
    given = getattr(owner, name)
    if not isinstance(given, Tensor):
        return _ScheduledValue(owner, name, start, torch.tensor(float(given), dtype=torch.float64, device="cpu"), is_float=True)
    if name not in owner._buffers:  # the tensor of a schedule that is a function
        setattr(owner, name, given.detach().clone())
    return _ScheduledValue(owner, name, start, given.detach().clone())


@torch.no_grad()
def _write(value: _ScheduledValue, share: float) -> None:
    owner, name = value.owner, value.name
    moving = owner.__dict__.setdefault("_diffmax_moving", {})
    moving.pop(name, None)
    if share < 1:
        moving[name] = value.end, value.is_float
        owner.__dict__["_diffmax_moved_id"] = id(owner)  # a copy has another
    if value.is_float:
        if share == 1:
            _put(owner, name, value.end.item())
            return
        if name not in owner._buffers:
            device = next((parameter.device for parameter in owner.parameters()), None)
            _put(owner, name, torch.empty((), dtype=torch.float32, device=device))
    tensor: Tensor = getattr(owner, name)
    end = value.end.to(tensor.device)
    tensor.copy_(end if share == 1 else value.start + (end - value.start) * share)


def _put(owner: nn.Module, name: str, value: float | Tensor) -> None:
    """Replace a buffer by a float, or a float by a buffer."""
    delattr(owner, name)
    if isinstance(value, Tensor):
        owner.register_buffer(name, value, persistent=False)
    else:
        setattr(owner, name, value)
