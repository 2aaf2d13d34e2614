"""How attention's forward kernels are launched on each architecture. Tiles are 64 by 64; what differs is who shares one.

Chosen by what the compiler says of registers and shared memory (docs/kernels.md). No clock has seen it. A table's entries
(`tuning`) go before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """A kernel's launch.

    Attributes:
        warps: Warps of a program.
        stages: How many tiles are under way at once.
        programs: Programs per multiprocessor: the grid, and with it the scratch.
        keys: Keys that are looked at together.
        chunk: Entries of a head that are multiplied at a time.
        values: Entries of the values that a program sums at a time.
    """

    warps: int
    stages: int
    programs: int
    keys: int = 64
    chunk: int = 256
    values: int = 256


def forward_settings(architecture: str, dtype: torch.dtype, size: int, extras: bool) -> tuple[Settings, Settings]:
    """For the two kernels, solver and output, on an architecture such as "sm90" or "gfx942".

    Args:
        architecture: Of the device.
        dtype: Of the queries.
        size: Entries of a head, padded.
        extras: Whether masks, biases, ALiBi, softcap or dropout need registers too.
    """
    if architecture.startswith("sm"):
        return _nvidia(dtype, size, extras)
    return _lanes_of_64(dtype, size, extras) if architecture.startswith("gfx9") else _lanes_of_32(dtype, size, extras)


def _nvidia(dtype: torch.dtype, size: int, extras: bool) -> tuple[Settings, Settings]:
    if dtype == torch.float32:
        return Settings(8, 1, 1, chunk=32), Settings(8, 1, 1, keys=16, chunk=32, values=32)
    if extras:
        return Settings(8, 1, 1, chunk=64), Settings(8, 1, 1, keys=16, chunk=64, values=128)
    if size <= 64:
        # float16 lifts its weights, which takes registers
        return Settings(4, 2, 2), Settings(8, 2, 1, keys=32) if dtype == torch.float16 else Settings(4, 2, 2, keys=32)
    if size <= 128:
        return Settings(8, 2, 1), Settings(8, 2, 1, keys=32)
    return Settings(8, 1, 1, chunk=64), Settings(8, 1, 1, keys=32, chunk=64, values=128)


def _lanes_of_64(dtype: torch.dtype, size: int, extras: bool) -> tuple[Settings, Settings]:
    if dtype == torch.float32:
        return Settings(4, 1, 1, chunk=64), Settings(4, 1, 1, keys=32, chunk=64, values=64)
    chunk = 64 if size > 128 or extras else 256
    return Settings(4, 1, 2, chunk=chunk), Settings(4, 1, 1, keys=32, chunk=chunk)


def _lanes_of_32(dtype: torch.dtype, size: int, extras: bool) -> tuple[Settings, Settings]:
    if dtype == torch.float32:
        return Settings(16, 1, 1, chunk=16), Settings(16, 1, 1, keys=16, chunk=16, values=16)
    if size <= 64 and not extras:
        return Settings(8, 1, 1), Settings(8, 1, 1, keys=32)
    return Settings(16, 1, 1, chunk=32), Settings(16, 1, 1, keys=32, chunk=32, values=32)
