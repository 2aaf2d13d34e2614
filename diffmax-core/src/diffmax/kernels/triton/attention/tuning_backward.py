"""Tiles of attention's backward kernels, by architecture, dtype and head size: the largest that no compiler spills.

How they were found: docs/decisions/0057-attention-backward.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Block:
    """A kernel's tile.

    Attributes:
        rows, keys: Queries and keys.
        warps: Warps of a program.
        stages: How many tiles are under way at once.
        chunk: Entries of a head that are multiplied at a time; the whole head, if it has no more.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    chunk: int = 256

    def arguments(self) -> dict[str, int]:
        """As a launch takes them."""
        # a * b + c in one rounding, said aloud: Triton's default is about to change
        tile = {"BLOCK_M": self.rows, "BLOCK_N": self.keys, "CHUNK": self.chunk}
        return tile | {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Blocks:
    """The tiles of the three kernels."""

    queries: Block
    keys: Block
    bias: Block

    def without_overlap(self) -> Blocks:
        """The same, one tile after the other.

        For masks and dropout on AMD: with two stages Triton 3.9 fails on gfx90a and gfx942, "shared-memory element type bit
        width must be a multiple of 8; got 1". 3.6 and 3.7 do not.
        """
        return Blocks(*(replace(block, stages=1) for block in (self.queries, self.keys, self.bias)))


def _blocks(queries: Block, keys: Block) -> Blocks:
    return Blocks(queries, keys, Block(min(queries.rows, 32), min(queries.keys, 32), queries.warps, 1, queries.chunk))


# Padded size of a head to tiles, for 16 bits and for float32. mma: the matrix instructions of sm80 to sm89 and of sm120.
_NARROW = {
    "mma": {
        64: _blocks(Block(32, 32, 4, 2), Block(32, 64, 8, 2)),
        128: _blocks(Block(64, 64, 8, 2), Block(32, 64, 8, 2)),
        256: _blocks(Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
    },
    "sm90": {
        64: _blocks(Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        128: _blocks(Block(64, 32, 4, 2), Block(16, 64, 4, 2)),
        256: _blocks(Block(32, 32, 8, 2), Block(32, 32, 8, 1)),
    },
    "sm100": {
        64: _blocks(Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        128: _blocks(Block(64, 32, 8, 2), Block(32, 64, 8, 1)),
        256: _blocks(Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
    },
    "cdna": {
        64: _blocks(Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        128: _blocks(Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
        256: _blocks(Block(32, 16, 8, 1), Block(16, 32, 8, 1)),
    },
    "rdna": {
        64: _blocks(Block(32, 32, 4, 1), Block(16, 32, 4, 1)),
        128: _blocks(Block(16, 16, 4, 1, 32), Block(16, 16, 8, 1, 16)),
        256: _blocks(Block(16, 16, 8, 1, 16), Block(16, 16, 16, 1, 16)),
    },
}
_WIDE = {
    "mma": {
        64: _blocks(Block(32, 32, 8, 1), Block(32, 16, 8, 1)),
        128: _blocks(Block(32, 32, 8, 1, 32), Block(32, 32, 8, 1)),
        256: _blocks(Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
    },
    "sm90": {
        64: _blocks(Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        128: _blocks(Block(16, 16, 8, 1), Block(32, 32, 8, 1)),
        256: _blocks(Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
    },
    "sm100": {
        64: _blocks(Block(32, 32, 8, 1), Block(32, 32, 8, 1)),
        128: _blocks(Block(16, 16, 8, 1), Block(32, 32, 8, 1)),
        256: _blocks(Block(16, 16, 8, 1, 64), Block(16, 32, 8, 1)),
    },
    "cdna": {
        64: _blocks(Block(32, 32, 4, 1), Block(32, 32, 4, 1)),
        128: _blocks(Block(32, 16, 8, 1), Block(16, 32, 8, 1)),
        256: _blocks(Block(16, 16, 8, 1), Block(16, 16, 8, 1)),
    },
    "rdna": {
        64: _blocks(Block(16, 16, 8, 1, 16), Block(16, 16, 8, 1, 16)),
        128: _blocks(Block(16, 16, 8, 1, 16), Block(16, 16, 8, 1, 16)),
        256: _blocks(Block(16, 16, 8, 1, 16), Block(16, 16, 16, 1, 16)),
    },
}


def backward_blocks(architecture: str, dtype: torch.dtype, size: int) -> Blocks:
    """The tiles for heads of `size` entries on an architecture such as "sm90" or "gfx942"; a new one is like its nearest."""
    tables = _WIDE if dtype == torch.float32 else _NARROW
    return tables[_family(architecture)][max(64, 1 << (size - 1).bit_length())]


def _family(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "cdna" if architecture.startswith("gfx9") else "rdna"
    number = int(architecture.removeprefix("sm"))
    return "sm90" if 90 <= number < 100 else "sm100" if 100 <= number < 120 else "mma"
