"""Numbers that stay exact in a module of half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffmax.nn._kept import Keeps

if TYPE_CHECKING:
    from typing_extensions import Self


class PreciseBuffers(Keeps):
    """A module whose own buffers keep their dtype where `.half()`, `.bfloat16()` or `.to(dtype)` would round them.

    Of an alpha the digits of 1 - alpha count: 0.998 in bfloat16 is 0.996, where 1 - alpha is its double.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            before = exact[name]
            if buffer is not None and before is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(buffer.device)
        return self
