"""Launch settings of threshold attention's kernels: rules by dtype and padded head size, by the compiler's figures, untimed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS

# Architectures of NVIDIA whose matrix instructions have both operands in registers
MMA = ("sm80", "sm86", "sm89", "sm120")


@dataclass(frozen=True)
class Block:
    """Settings of a kernel, and its tile.

    Attributes:
        rows, keys: Queries and keys of a tile.
        warps: Warps per program.
        stages: Pipeline stages: tiles in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        """The settings as launch arguments."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.keys, **self.options()}

    def options(self) -> dict[str, int]:
        """Those for the compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages, **COMPILER_OPTIONS}


class Blocks(NamedTuple):
    """The settings of the kernels. The queries of a tile of `dkv` and `dbias` divide those of `dq`.

    A tile of `dbias` has as many queries as distances, and twice as many keys.
    """

    output: Block
    dq: Block
    dkv: Block
    dbias: Block


def blocks(architecture: str, dtype: torch.dtype, size: int) -> Blocks:
    """The settings for heads of this size, a power of two from 16: the larger of those of keys and values.

    Args:
        architecture: Such as "sm90" or "gfx942".
        dtype: Of queries, keys and values.
        size: Padded size of a head.
    """
    rdna, by_registers = architecture.startswith("gfx11"), architecture in MMA
    stages = 1 if architecture.startswith("gfx") else 2
    bias = Block(16, 32, 8 if dtype == torch.float32 else 4, 1)
    if rdna:
        few = Block(16, 32 if dtype != torch.float32 and size <= 64 else 16, 4 if size <= 64 else 8, 1)
        return Blocks(Block(64, 32, 8, 1) if few.keys == 32 else few, few, few, bias)
    if dtype == torch.float32:
        least = Block(16, 16, 8, 1)
        wide = Block(32, 32 if size <= 64 else 16, 8, 1) if size <= 128 else least  # of 256, four tiles fit
        return Blocks(wide, wide, wide if size <= 64 else least, bias)
    if size > 128:
        small = Block(32, 32, 8, 1)
        return Blocks(small, small, small, bias)
    # four warps are one group of sm90, whose tile has 64 rows
    sm90, amd = architecture == "sm90", stages == 1
    warps, warps_of_keys = 4 if sm90 or amd else 8, 8 if by_registers else 4
    if size > 64:
        return Blocks(Block(64, 64, warps, stages), Block(64, 32, warps, stages), Block(32, 32, warps_of_keys, stages), bias)
    queries = Block(64, 32 if by_registers else 64, warps, stages)
    keys = Block(64, 64, 4, 1) if sm90 else Block(32, 64, warps_of_keys, stages)
    return Blocks(Block(64, 64, 4, stages), queries, keys, Block(32, 64, 4, 1))
