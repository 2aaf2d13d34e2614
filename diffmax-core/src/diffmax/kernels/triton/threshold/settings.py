"""Launch settings of threshold attention's kernels: rules by dtype and padded head size, by the compiler's figures, untimed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from diffmax.kernels.triton.common.launch import compiler_options, reads_registers


@dataclass(frozen=True)
class Block:
    """Settings of a kernel, and its tile.

    Attributes:
        rows, keys: Queries and keys of a tile.
        warps: Warps per program.
        stages: Pipeline stages: tiles in flight.
        side: As in `common.launch.compiler_options`.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    side: int = 0

    def arguments(self) -> dict[str, int]:
        """The settings as launch arguments."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.keys, **self.options()}

    def options(self) -> dict[str, int]:
        """Those for the compiler."""
        return compiler_options(self.warps, self.stages, self.side)


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
    if architecture.startswith("gfx9"):
        return _on_cdna(dtype, size)
    if architecture.startswith("gfx"):
        return _on_rdna(dtype, size)
    if dtype == torch.float32:
        return _wide_on_nvidia(size)
    return _on_mma(size) if reads_registers(architecture) else _on_nvidia(architecture, size)


def _bias(dtype: torch.dtype) -> Block:
    return Block(16, 32, 8 if dtype == torch.float32 else 4, 1)


def _on_nvidia(architecture: str, size: int) -> Blocks:
    if size > 128:
        small = Block(32, 32, 8, 1)
        return Blocks(small, small, small, _bias(torch.bfloat16))
    # four warps are one group of sm90, whose tile has 64 rows
    sm90 = architecture == "sm90"
    warps = 4 if sm90 else 8
    if size > 64:
        return Blocks(Block(64, 64, warps, 2), Block(64, 32, warps, 2), Block(32, 32, 4, 2), _bias(torch.bfloat16))
    return Blocks(
        Block(64, 64, 4, 2), Block(64, 64, warps, 2), Block(64, 64, 4, 1) if sm90 else Block(32, 64, 4, 2), Block(32, 64, 4, 1)
    )


def _on_mma(size: int) -> Blocks:
    """A warp for each 16 rows of a tile, as far as it does not spill much: with more, some compute what others do."""
    if size > 128:
        small = Block(32, 32, 8, 1)
        return Blocks(Block(32, 32, 4, 1), small, small, _bias(torch.bfloat16))
    keys = Block(32, 64, 4, 1)
    if size > 64:
        return Blocks(Block(64, 64, 4, 2), Block(64, 32, 4, 1), keys, _bias(torch.bfloat16))
    return Blocks(Block(64, 64, 4, 2), Block(64, 32, 4, 2), keys, keys)


def _wide_on_nvidia(size: int) -> Blocks:
    """Of float32, whose matrix instructions are the same everywhere; as for `_on_mma`."""
    bias, queries, keys = _bias(torch.float32), Block(32, 16, 2, 1), Block(16, 32, 2, 1)
    if size > 128:
        return Blocks(queries, Block(16, 16, 2, 1), Block(16, 16, 8, 1), bias)
    return Blocks(queries, queries, keys if size <= 64 else replace(keys, warps=4), bias)


def _on_cdna(dtype: torch.dtype, size: int) -> Blocks:
    """Those in which no warp computes what another does, and of them the fewest instructions per score (decision 0137)."""
    bias = Block(16, 32, 2, 1, 16)
    if dtype == torch.float32:
        if size <= 64:
            return Blocks(Block(64, 64, 4, 1, 16), Block(64, 32, 4, 1, 16), Block(32, 64, 4, 1, 16), bias)
        if size <= 128:
            return Blocks(Block(64, 64, 4, 1, 16), Block(64, 32, 4, 1, 16), Block(16, 64, 4, 1, 16), bias)
        # larger tiles fill the local memory
        return Blocks(Block(32, 32, 2, 1, 16), Block(32, 16, 2, 1, 16), Block(16, 32, 2, 1, 16), bias)
    if size <= 64:
        return Blocks(Block(64, 32, 2, 1), Block(64, 32, 2, 1, 16), Block(32, 64, 2, 1, 16), Block(32, 64, 4, 1, 16))
    if size <= 128:
        return Blocks(Block(64, 32, 2, 1, 16), Block(64, 32, 4, 1, 16), Block(32, 64, 4, 1, 16), bias)
    return Blocks(Block(64, 32, 4, 1, 16), Block(64, 16, 4, 1, 16), Block(16, 64, 4, 1, 16), bias)


def _on_rdna(dtype: torch.dtype, size: int) -> Blocks:
    """Warps of 32 lanes, which have at most 256 registers each. In 16 bits as for `_on_cdna`; float32 has no matrix unit."""
    if dtype == torch.float32:
        small = Block(16, 16, 8, 1)
        return Blocks(Block(16, 16, 4, 1) if size <= 64 else small, small, small, _bias(dtype))
    read = Block(64, 16, 4, 1)
    return Blocks(replace(read, keys=32) if size <= 64 else read, read, Block(16, 64, 4, 1), _bias(dtype))
