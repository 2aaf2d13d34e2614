"""Buffers that keep their dtype in a module of half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
