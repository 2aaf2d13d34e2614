"""Launch settings of power attention's kernels: rules by dtype and padded head size, from the compiler's figures, not timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS

# Architectures of NVIDIA whose matrix instructions have both operands in registers
MMA = ("sm80", "sm86", "sm89", "sm120")


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


def blocks(architecture: str, dtype: torch.dtype, size: int, tokens: int, degree: int = 2) -> Blocks:
    """The settings for heads of this size, a power of two from 16: the larger of those of keys and values.

    Args:
        architecture: Such as "sm90" or "gfx942".
        dtype: Of queries, keys and values.
        size: Padded size of a head.
        tokens: How many tokens a program may have, at most: those of a chunk, or all queries.
        degree: p.
    """
    amd, wide = architecture.startswith("gfx"), dtype == torch.float32
    # four warps of 64 lanes may have 512 registers for each lane, eight have 256
    cdna = architecture.startswith("gfx9")
    # matrix instructions that read their operands from registers
    by_registers = amd or architecture in MMA
    if wide:
        narrow_unit = architecture.startswith("gfx11") and size > 64
        block = Block(16 if narrow_unit else 32, 32 if size <= 64 else 16, 32 if size <= 64 else 16, 4 if size <= 64 else 8, 2)
        small = replace(block, entries=16, others=16)
        update = replace(block, entries=16 if narrow_unit else 32, warps=8)
        return Blocks(update, block if not narrow_unit else small, block if not by_registers else small, small)
    if size > 64:
        large = size > 128 or amd
        block = Block(32 if large else 64, 16 if large else 32, 16 if large else 32, 4 if cdna else 8, 2)
        gradient = replace(block, entries=16, others=16) if by_registers else block
        return Blocks(replace(block, entries=32 if by_registers else 64), block, gradient, gradient)
    # twice the tokens share the parts into which a tile of a state is split
    many, warps = (128, 8) if tokens > 64 and not cdna else (64, 8 if architecture in MMA else 4)
    rounded = dtype == torch.bfloat16
    tight = amd and degree > 2  # more columns lie in AMD's 64 KiB of shared memory
    update = Block(64, 64 if (rounded and not tight) or not by_registers else 32, 0, 8 if architecture in MMA else 4, 2)
    output = Block(many, 32 if architecture in MMA or tight else 64, 64, warps, 2)
    gradient = Block(many, 32, 32, warps, 2)
    small = replace(gradient, entries=16, others=16) if architecture in MMA else gradient
    return Blocks(update, output, gradient, small)
