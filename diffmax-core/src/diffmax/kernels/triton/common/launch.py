"""What the launchers of all operators share: e as the kernels take it, tolerances, padding, and the current device."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.common.numerics import ABOVE_2, ANY_K
from diffmax.operators.common.numerics import MIN_E, integer_exponent

# A row is solved where the linear step that remains is at most this, in units of its largest base: the error is its square / 2.
SOLVED = {torch.float64: 1e-9, torch.float32: 2.4e-4, torch.float16: 2e-3, torch.bfloat16: 2e-3}

# The hardware's log2 is off by 2^-22, which k multiplies: for a larger k its sums say too little
SMALLEST_E_FOR_HARDWARE = 1 / 64

# Terms of Eq. 6's series: as many as `diffmax.operators.common.numerics` has
SERIES_TERMS = {torch.float32: 10, torch.float64: 17}

# For the compiler, with every launch: a * b + c in one rounding, said explicitly because Triton's default is about to change
COMPILER_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Exponent:
    """What the kernels are told of e = 1 - alpha: a float, or a tensor that they read.

    What is decided here about a float is decided of the numbers that the kernels compute with: float32 has no k between 2 and
    2 + 2e-7.

    Attributes:
        e, k: As the kernels have them, k = 1/e.
        bits: Of e as float64.
        integer: k, if it is one of the exponents that are multiplications; else 0.
        tensor: Whether they read e.
    """

    e: float
    k: float
    bits: int
    integer: int
    tensor: bool

    @classmethod
    def of(cls, e: float | Tensor, acc: torch.dtype) -> Exponent:
        """From the contract's argument, for kernels that compute in `acc`."""
        if isinstance(e, Tensor):
            return cls(1.0, 1.0, _bits(1.0), 0, True)
        e = max(e, MIN_E)
        k, integer = 1 / e, integer_exponent(e, acc)
        return cls(*((e, k) if acc == torch.float64 else (_float32(e), _float32(k))), _bits(e), integer, False)

    @property
    def code(self) -> int:
        """As the kernels' K, where `ABOVE_2` has one of its own."""
        return self.integer or int(ABOVE_2 if self.k > 2 and not self.tensor else ANY_K)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not smaller than n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(n: int) -> int:
    """A side of a tile for n entries: Triton's tiles are powers of two, those of matrix instructions 16 or more."""
    return max(16, power_of_two(n))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensors' one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _float32(number: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return rounded


def _bits(e: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", e))[0])
