"""What modules are given as numbers or tensors, kept so that they can begin with it again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Keeps(nn.Module):
    """A module that keeps what it was given, an alpha above all, and goes back to it in `reset_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self._begun_with: dict[str, Tensor] = {}

    def _keep(self, name: str, value: float | Tensor | Callable[[], float | Tensor] | None, persistent: bool = True) -> None:
        """Set an attribute: a tensor becomes a buffer, a parameter stays one.

        Its entries share no memory: a state dict cannot be loaded into an expanded tensor, and safetensors saves none that
        overlap. A tensor that requires a gradient stays as it is, for its gradient's sake.
        """
        if isinstance(value, Tensor):
            self._begun_with[name] = own(value)
        if isinstance(value, nn.Parameter):
            if not value.is_contiguous():
                value.data = value.data.contiguous()
        elif isinstance(value, Tensor):
            value = value if value.requires_grad else own(value)
        if value is None or (isinstance(value, Tensor) and not isinstance(value, nn.Parameter)):
            self.register_buffer(name, value, persistent=persistent)
        else:
            setattr(self, name, value)

    def _learn(self, name: str, start: Tensor, made: Tensor) -> None:
        """Set a parameter `made`, which begins as `start`, a tensor that broadcasts to it."""
        self._begun_with[name] = own(start)
        setattr(self, name, nn.Parameter(made))

    def reset_parameters(self) -> None:
        """Begin again with what the module was given, as after `to_empty`."""
        for name, start in self._begun_with.items():
            kept = getattr(self, name)
            if start.is_meta and not kept.is_meta:
                what = "alpha" if name == "log_beta" else name
                raise ValueError(
                    f'{type(self).__name__}: {what} must hold numbers to start from, got a tensor on the device "meta"\n'
                    f'make {what} with device="cpu", or load a state dict instead of reset_parameters()'
                )
            with torch.no_grad():
                kept.copy_(start)


def own(t: Tensor) -> Tensor:
    """A copy that shares memory with nothing."""
    return t.detach().clone(memory_format=torch.contiguous_format)
