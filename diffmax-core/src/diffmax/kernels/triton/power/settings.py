"""Launch settings of power attention's kernels: rules by dtype and padded head size, from the compiler's figures, not timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from diffmax.kernels.triton.common.launch import compiler_options, reads_registers


@dataclass(frozen=True)
class Block:
    """Settings of a kernel.

    Attributes:
        tokens: Of a program, or of a step of the update. That of the output is a multiple of all others.
        entries: Monomials at a time.
        others: Keys or queries that meet a program's tokens at a time.
        warps: Warps per program.
        stages: Pipeline stages.
        side: As in `common.launch.compiler_options`.
    """

    tokens: int
    entries: int
    others: int
    warps: int
    stages: int
    side: int = 0

    def arguments(self, *, pairs: bool = True) -> dict[str, int]:
        """The settings as launch arguments."""
        tile = {"BLOCK_T": self.tokens, "BLOCK_P": self.entries, **({"BLOCK_N": self.others} if pairs else {})}
        return tile | compiler_options(self.warps, self.stages, self.side)


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
    if architecture.startswith("gfx9"):
        return _without_repetition(_on_cdna(dtype, size, degree))
    if architecture.startswith("gfx"):
        return _on_rdna(dtype, size)
    if dtype == torch.float32:
        return _wide_on_nvidia(size)
    return _on_mma(size, tokens) if reads_registers(architecture) else _on_nvidia(architecture, size, tokens)


def _on_nvidia(architecture: str, size: int, tokens: int) -> Blocks:
    if size > 64:
        large = size > 128
        block = Block(32 if large else 64, 16 if large else 32, 16 if large else 32, 8, 2)
        update = replace(block, entries=64)
        if large or architecture == "sm90":
            return Blocks(update, block, block, block)
        # the sums of 64 tokens do not fit the tensor memory of sm100, which tiles of 32 do not use
        gradient = Block(32, 32, 32, 4, 1)
        return Blocks(update, block, gradient, gradient)
    # twice the tokens share the parts into which a tile of a state is split
    many, warps = (128, 8) if tokens > 64 else (64, 4)
    gradient = Block(many, 32, 32, warps, 2)
    return Blocks(Block(64, 64, 0, 4, 2), Block(many, 64, 64, warps, 2), gradient, gradient)


def _on_mma(size: int, tokens: int) -> Blocks:
    """A warp for each 16 rows of a tile, as far as it does not spill much: with more, some compute what others do."""
    if size > 128:
        block = Block(32, 16, 16, 8, 2)
        return Blocks(replace(block, entries=32), block, block, block)
    if size > 64:
        read = Block(64, 16, 16, 4, 1)
        return Blocks(Block(16, 64, 0, 4, 1), read, read, replace(read, warps=8, stages=2))
    many, warps = (128, 8) if tokens > 64 else (64, 4)
    small = Block(many, 16, 16, warps, 2 if warps == 8 else 1)
    return Blocks(Block(32, 64, 0, 4, 2), Block(many, 32, 64, warps, 2), Block(many, 32, 32, warps, 2), small)


def _wide_on_nvidia(size: int) -> Blocks:
    """Of float32, whose matrix instructions are the same everywhere; as for `_on_mma`."""
    read = Block(32, 16, 16, 2, 1)
    if size > 128:
        return Blocks(Block(32, 32, 0, 8, 2), *(replace(read, warps=8, stages=2),) * 3)
    if size > 64:
        return Blocks(Block(16, 32, 0, 2, 1), read, replace(read, warps=4), replace(read, warps=8, stages=2))
    return Blocks(Block(32, 32, 0, 2, 1), replace(read, stages=2), read, Block(32, 16, 16, 2 if size <= 32 else 4, 2))


def _on_cdna(dtype: torch.dtype, size: int, degree: int) -> Blocks:
    # four warps of 64 lanes may have 512 registers for each lane, eight have 256
    if dtype == torch.float32:
        block = Block(32, 32, 32, 4, 2) if size <= 64 else Block(32, 16, 16, 8, 2)
        small = replace(block, entries=16, others=16)
        return Blocks(replace(block, entries=32, warps=8), block, small, small)
    if size > 64:
        block = Block(32, 16, 16, 4, 2)
        return Blocks(replace(block, entries=32), block, block, block)
    rounded, tight = dtype == torch.bfloat16, degree > 2  # more columns lie in 64 KiB of local memory
    update = Block(64, 64 if rounded and not tight else 32, 0, 4, 2)
    gradient = Block(64, 32, 32, 4, 2)
    return Blocks(update, Block(64, 32 if tight else 64, 64, 4, 2), gradient, gradient)


def _on_rdna(dtype: torch.dtype, size: int) -> Blocks:
    """Warps of 32 lanes, which have at most 256 registers each. In 16 bits as for `_on_mma`; float32 has no matrix unit."""
    if dtype == torch.float32:
        gradient = Block(16, 16, 16, 8, 1)
        if size > 64:
            return Blocks(replace(gradient, stages=2), replace(gradient, stages=2), gradient, gradient)
        return Blocks(Block(32, 32, 0, 8, 2), Block(32, 16, 16, 4, 1), gradient, gradient)
    # the rows of the update are monomials, those of the others tokens
    update, read = Block(16, 64, 0, 4 if size <= 64 else 8, 1), Block(64, 16, 16, 4, 1)
    if size > 128:
        gradient = Block(64, 16, 16, 8, 2)
        return Blocks(update, read, gradient, gradient)
    return Blocks(update, read if size <= 32 else replace(read, warps=8), replace(read, stages=2), read)


def _without_repetition(found: Blocks) -> Blocks:
    """On CDNA: as many warps as a tile has rows of 16, which its matrix instructions then compute (decision 0137).

    The rows of the update are monomials, those of the others tokens. With two stages Triton 3.7 fails at dK and dV in bfloat16,
    "LLVM Translation failed for operation: builtin.unrealized_conversion_cast".
    """
    rows = (found.update.entries, *(block.tokens for block in found[1:]))
    many = Blocks(*(replace(block, warps=min(block.warps, of // 16), side=16) for block, of in zip(found, rows, strict=True)))
    return many._replace(dkv=replace(many.dkv, stages=1))
