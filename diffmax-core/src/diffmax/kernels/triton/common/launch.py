"""Shared by the launchers of all operators: kernel arguments for e, tolerances, padding, and the current device."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.common.numerics import ABOVE_2, ANY_K
from diffmax.operators.common.numerics import MIN_E, integer_exponent

# A row is solved if the remaining linear step is at most this, in units of its largest base: the error is its square / 2.
SOLVED = {torch.float64: 1e-9, torch.float32: 2.4e-4, torch.float16: 2e-3, torch.bfloat16: 2e-3}

# The hardware's log2 has an error of 2^-22, which k multiplies: for a larger k the sums are too inaccurate
SMALLEST_E_FOR_HARDWARE = 1 / 64

# Terms of the series of Eq. 6, as in `diffmax.operators.common.numerics`
SERIES_TERMS = {torch.float32: 10, torch.float64: 17}

# Compiler option of every launch: fuse a * b + c into one rounding; explicit, because Triton's default is about to change
COMPILER_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Exponent:
    """The kernel arguments for e = 1 - alpha: a float, or a tensor that the kernels read.

    Decisions about a float are made in the precision of the kernels: float32 has no k between 2 and 2 + 2e-7.

    Attributes:
        e, k: The kernels' values, k = 1/e.
        bits: The bits of e as float64.
        integer: k, if powers of it are computed by multiplications; else 0.
        tensor: Whether the kernels read e from a tensor.
    """

    e: float
    k: float
    bits: int
    integer: int
    tensor: bool

    @classmethod
    def of(cls, e: float | Tensor, acc: torch.dtype) -> Exponent:
        """From the argument of the kernel contract, for kernels that compute in `acc`."""
        if isinstance(e, Tensor):
            return cls(1.0, 1.0, _bits(1.0), 0, True)
        e = max(e, MIN_E)
        k, integer = 1 / e, integer_exponent(e, acc)
        return cls(*((e, k) if acc == torch.float64 else (_float32(e), _float32(k))), _bits(e), integer, False)

    @property
    def code(self) -> int:
        """The constexpr K of the row kernels, which distinguish `ABOVE_2`."""
        return self.integer or int(ABOVE_2 if self.k > 2 and not self.tensor else ANY_K)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(n: int) -> int:
    """The side of a tile for n entries: a power of two, as Triton requires, and at least 16, for matrix instructions."""
    return max(16, power_of_two(n))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the device of the tensors the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _float32(number: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return rounded


def _bits(e: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", e))[0])
