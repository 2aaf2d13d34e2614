"""Launch settings of power attention's kernels: rules by dtype and padded head size, from the compiler's figures, not timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS


@dataclass(frozen=True)
class Block:
    """Settings of a kernel.

    Attributes:
        tokens: Of a program, or of a step of the update. That of the output is a multiple of all others.
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


def blocks(architecture: str, dtype: torch.dtype, size: int, tokens: int) -> Blocks:
    """The settings for heads of this size, a power of two from 16: the larger of those of keys and values.

    Args:
        architecture: Such as "sm90" or "gfx942".
        dtype: Of queries, keys and values.
        size: Padded size of a head.
        tokens: How many tokens a program may have, at most: those of a chunk, or all queries.
    """
    if dtype == torch.float32:
        small = 32 if size <= 64 else 16
        block = Block(32, small, small, 4 if size <= 64 else 8, 2)
        return Blocks(replace(block, entries=64 if size <= 64 else 32), block, block, block)
    if size > 64:
        block = Block(64 if size <= 128 else 32, 32 if size <= 128 else 16, 32 if size <= 128 else 16, 8, 2)
        return Blocks(replace(block, entries=64), block, block, block)
    # twice the tokens share the parts into which a tile of a state is split
    many, warps = (128, 8) if tokens > 64 else (64, 4)
    gradient = Block(many, 32, 32, warps, 2)
    return Blocks(Block(64, 64, 0, 4, 2), Block(many, 64, 64, warps, 2), gradient, gradient)
