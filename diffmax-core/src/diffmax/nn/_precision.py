"""Buffers that keep their dtype in a module of half precision."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffmax.operators.common.resettable import Resettable

if TYPE_CHECKING:
    from typing_extensions import Self


class PreciseBuffers(Resettable):
    """A module whose buffers keep their dtype under `.half()`, `.bfloat16()` and `.to(dtype)`.

    The digits of 1 - alpha matter: 0.998 rounds to 0.996 in bfloat16, which doubles 1 - alpha.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            before = exact[name]
            if buffer is not None and before is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(buffer.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Warn if an `AlphaSchedule` moves the module that this one is a copy of, and the state does not tell how far."""
        moving, moved = self.__dict__.get("_diffmax_moving", {}), self.__dict__.get("_diffmax_moved_id")
        still = [n for n in moving if n in self._non_persistent_buffers_set and prefix + n not in state_dict]
        if still and moved != id(self):
            warnings.warn(
                f"{prefix}{still[0]} stays what it was when this module was copied from one that an AlphaSchedule moves: "
                "a state dict does not hold it\npass alpha as a tensor, or make a schedule for the copy before, and step both",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
