"""Launch settings of power attention's kernels: rules by dtype and padded head size, from the compiler's figures, not timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS


@dataclass(frozen=True)
class Block:
    """Settings of a kernel.

    Attributes:
        tokens: Of a program, or in the update of a step. It is the same for all kernels of a call.
        entries: Monomials at a time.
        others: Keys or queries that meet a program's tokens at a time.
        warps: Warps per program.
        stages: Pipeline stages.
    """

    tokens: int
    entries: int
    others: int
    warps: int
    stages: int

    def arguments(self, *, pairs: bool = True) -> dict[str, int]:
        """The settings as launch arguments."""
        tile = {"BLOCK_T": self.tokens, "BLOCK_P": self.entries, **({"BLOCK_N": self.others} if pairs else {})}
        return tile | {"num_warps": self.warps, "num_stages": self.stages, **COMPILER_OPTIONS}


class Blocks(NamedTuple):
    """The settings of the kernels."""

    update: Block
    output: Block
    dq: Block
    dkv: Block


def blocks(architecture: str, dtype: torch.dtype, size: int) -> Blocks:
    """The settings for heads of this size, a power of two from 16: the larger of those of keys and values."""
    wide = dtype == torch.float32
    tokens = 64 if size <= 128 and not wide else 32
    small = 32 if size <= 128 and not wide else 16
    warps = 4 if size <= 64 else 8
    return Blocks(
        update=Block(tokens, 64, 0, 4 if size <= 64 else 8, 2),
        output=Block(tokens, 64 if size <= 64 else small, 64 if size <= 64 and not wide else small, warps, 2),
        dq=Block(tokens, small, small, warps, 2),
        dkv=Block(tokens, small, small, warps, 2),
    )
