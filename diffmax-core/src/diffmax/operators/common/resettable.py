"""Modules that store the initial values of their tensors, so that `reset_parameters` can restore them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Resettable(nn.Module):
    """A module that stores its initial values, such as alpha, and restores them in `reset_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self._initial_values: dict[str, Tensor] = {}

    def _store(self, name: str, value: float | Tensor | Callable[[], float | Tensor] | None, persistent: bool = True) -> None:
        """Set an attribute: a tensor becomes a buffer, a parameter stays a parameter.

        A buffer is a contiguous copy, because a state dict cannot be loaded into an expanded tensor, and safetensors does not
        save overlapping memory. A tensor that requires a gradient is not copied, so that the gradient reaches it; as no
        parameter of the module lists it, one warns.
        """
        if isinstance(value, Tensor):
            self._initial_values[name] = independent_copy(value)
        if isinstance(value, nn.Parameter):
            if not value.is_contiguous():
                value.data = value.data.contiguous()
        elif isinstance(value, Tensor):
            if value.requires_grad and value.is_leaf:
                warnings.warn(
                    f"{type(self).__name__}: {name} is a tensor that requires a gradient and no parameter of the module, so an "
                    f"optimizer of model.parameters() does not learn it\npass nn.Parameter({name})"
                    f"{', or an alpha_map' if name == 'alpha' and hasattr(self, 'alpha_map') else ''}",
                    stacklevel=_levels_to_the_caller(),
                )
            value = value if value.requires_grad else independent_copy(value)
        if value is None or (isinstance(value, Tensor) and not isinstance(value, nn.Parameter)):
            self.register_buffer(name, value, persistent=persistent)
        else:
            setattr(self, name, value)

    def _store_learned(self, name: str, start: Tensor, parameter: Tensor) -> None:
        """Set a parameter, whose initial value is `start`, a tensor that broadcasts to it."""
        self._initial_values[name] = independent_copy(start)
        setattr(self, name, nn.Parameter(parameter))

    def reset_parameters(self) -> None:
        """Restore the initial values, for example after `to_empty`."""
        for name, start in self._initial_values.items():
            tensor = getattr(self, name)
            if start.is_meta and not tensor.is_meta:
                what = "alpha" if name == "log_beta" else name
                raise ValueError(
                    f'{type(self).__name__}: {what} must hold numbers to start from, got a tensor on the device "meta"\n'
                    f'make {what} with device="cpu", or load a state dict instead of reset_parameters()'
                )
            with torch.no_grad():
                tensor.copy_(start)


def _levels_to_the_caller() -> int:
    """For `warnings.warn` in the function that asks: the first frame that is not of diffmax."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "diffmax":
        level, frame = level + 1, frame.f_back
    return level


def independent_copy(t: Tensor) -> Tensor:
    """A detached, contiguous copy."""
    return t.detach().clone(memory_format=torch.contiguous_format)
