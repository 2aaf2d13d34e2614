"""Shared by the launchers of all operators: launch plans, kernel arguments for e, tolerances, padding, the current device."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from diffmax.kernels.triton.common.geometry import VECTOR_BYTES
from diffmax.kernels.triton.common.numerics import ABOVE_2, ANY_K
from diffmax.operators.common.numerics import MIN_E, integer_exponent

# A row is solved if the remaining linear step is at most this, in units of its largest base: the error is its square / 2.
SOLVED = {torch.float64: 1e-9, torch.float32: 2.4e-4, torch.float16: 2e-3, torch.bfloat16: 2e-3}

# The hardware's log2 has an error of 2^-22, which k multiplies: for a larger k the sums are too inaccurate
SMALLEST_E_FOR_HARDWARE = 1 / 64

# Compiler option of every launch: fuse a * b + c into one rounding; explicit, because Triton's default is about to change
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def compiler_options(warps: int, stages: int, side: int = 0) -> dict[str, Any]:
    """Of a launch.

    Args:
        warps: Warps per program.
        stages: Pipeline stages: tiles in flight.
        side: AMD: rows and columns of what a matrix instruction computes, 16 or 32; 0 leaves it to the compiler. Where
            a tile has fewer of 32 than the program has warps, some warps compute what others do (decision 0136).
    """
    instruction = {"matrix_instr_nonkdim": side} if side else {}
    return {"num_warps": warps, "num_stages": stages, **instruction, **COMPILER_OPTIONS}


def reads_registers(architecture: str) -> bool:
    """Whether matrix instructions have both operands in registers, on NVIDIA: sm80 to sm89, and from sm120 on."""
    return architecture.startswith("sm") and (80 <= int(architecture[2:]) < 90 or int(architecture[2:]) >= 120)


# Since this version a binary takes the arguments of its kernel, constants included (decision 0093)
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
MOST_PLANS = 256
Plan = TypeVar("Plan")


def signature(*of: object) -> tuple[Hashable, ...]:
    """What a launch plan depends on: every value as it is, and of a tensor shape, strides, dtype and whether it is aligned."""
    return tuple(_layout(one) if isinstance(one, Tensor) else one for one in of)


def _layout(t: Tensor) -> tuple[Hashable, ...]:
    return t.shape, t.stride(), t.dtype, t.data_ptr() % VECTOR_BYTES == 0


class Plans:
    """The launch plans of an operator by the signature of the call; the oldest is dropped. Threads may share it.

    Attributes:
        made: The number of plans made so far.
    """

    def __init__(self) -> None:
        self.made = 0
        self._plans: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """The plan of a signature, which `make` makes unless it is known."""
        plan: Plan | None = self._plans.get(key)
        if plan is None:
            plan = make()
            with self._lock:
                self.made += 1
                while len(self._plans) >= MOST_PLANS:
                    del self._plans[next(iter(self._plans))]
                self._plans[key] = plan
        return plan


class _Binary(NamedTuple):
    """A compiled kernel: the driver it was loaded by, its launcher, and its arguments, in order, without the tensors."""

    driver: Any
    run: Callable[..., None]
    arguments: list[Any]


class Launch:
    """A kernel, its grid and all of its arguments but the tensors.

    The first call leaves it to Triton to find or compile the binary. Later ones call this binary: Triton would choose it again,
    because a plan is used only for equal signatures, and memory allocated by torch is aligned.

    Args:
        kernel: The kernel.
        grid: One to three numbers of programs.
        arguments: The arguments, and options of the compiler. The kernel's other arguments are tensors.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        self._kernel, self._grid, self._arguments = kernel, (*grid, 1, 1)[:3], arguments
        self._tensors = [(place, name) for place, name in enumerate(kernel.arg_names) if name not in arguments]
        self._binary: _Binary | None = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Launch on the current stream of the current device; `tensors` by the names of arguments, and possibly others."""
        binary = self._binary
        if binary is None or binary.driver is not triton.runtime.driver.active:
            self._first(tensors)
            return
        arguments = binary.arguments.copy()
        for place, name in self._tensors:
            arguments[place] = tensors[name]
        binary.run(*arguments)

    def _first(self, tensors: Mapping[str, Tensor]) -> None:
        compiled = self._kernel[self._grid](**{name: tensors[name] for _, name in self._tensors}, **self._arguments)
        if _DIRECT and compiled is not None:  # the interpreter returns nothing
            arguments = [self._arguments.get(name) for name in self._kernel.arg_names]
            self._binary = _Binary(triton.runtime.driver.active, compiled[self._grid], arguments)


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
