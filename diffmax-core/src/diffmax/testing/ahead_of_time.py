"""Real launch code for devices that are not there: Triton kernels are compiled for a target and reported, nothing runs.

`recording(target)` puts a driver in Triton's place that knows the target's architecture and limits. Whatever is launched inside
is specialised and compiled as on that device, with its resource checks, and noted as a `Compiled`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel


@dataclass(frozen=True)
class Target:
    """An architecture: the compiler's name for it, lanes of a warp, and bytes of shared memory that a program may have."""

    backend: str
    arch: int | str
    lanes: int
    shared: int


TARGETS = {
    "sm75": Target("cuda", 75, 32, 65536),
    "sm80": Target("cuda", 80, 32, 166912),
    "sm86": Target("cuda", 86, 32, 101376),
    "sm90": Target("cuda", 90, 32, 232448),
    "sm100": Target("cuda", 100, 32, 232448),
    "sm120": Target("cuda", 120, 32, 101376),
    "gfx90a": Target("hip", "gfx90a", 64, 65536),
    "gfx942": Target("hip", "gfx942", 64, 65536),
    "gfx950": Target("hip", "gfx950", 64, 163840),
    "gfx1100": Target("hip", "gfx1100", 32, 65536),
}


@dataclass
class Compiled:
    """A kernel that was launched: its grid and its binary."""

    kernel: Any
    grid: tuple[int, ...]
    target: Target

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.metadata.name)

    @property
    def text(self) -> str:
        """Its assembly."""
        assembly: str = self.kernel.asm["ptx" if self.target.backend == "cuda" else "amdgcn"]
        return assembly

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """Warps, bytes of shared memory, registers and bytes spilled per thread, and how many loads take 16 bytes."""
        found = {"warps": self.kernel.metadata.num_warps, "shared": self.kernel.metadata.shared}
        if self.target.backend == "cuda":
            usage = _resource_usage(self.kernel.asm["cubin"])
            number = {key: int(value) for key, value in re.findall(r"(REG|LOCAL|STACK):(\d+)", usage)}
            found |= {"registers": number["REG"], "spilled": number["LOCAL"] + number["STACK"]}
            found["wide_loads"] = len(re.findall(r"ld\.global[\w.:]*v4\.(?:b32|u32|f32)|ld\.global[\w.:]*v2\.b64", self.text))
        else:
            number = {
                key: int(value) for key, value in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", self.text)
            }
            found |= {"registers": number["vgpr_count"], "spilled": number["private_segment_fixed_size"]}
            found["wide_loads"] = len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", self.text))
        return found


def _resource_usage(cubin: bytes) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        usage: str = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return usage


class _Utils:
    def __init__(self, target: Target) -> None:
        self.target = target

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        return {
            "max_shared_mem": self.target.shared,
            "multiprocessor_count": 108,
            "max_num_regs": 65536,
            "warpSize": self.target.lanes,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
            "sm_clock_rate": 1,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class _Driver(DriverBase):  # type: ignore[misc]
    """What Triton asks of a driver, answered for a target; its launcher does nothing."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = _Utils(target)
        self.launcher_cls = lambda src, metadata: lambda *arguments: None

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_current_target(self) -> Any:
        return GPUTarget(self.target.backend, self.target.arch, self.target.lanes)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise AssertionError("a launch asked for a benchmark: nothing may be tuned inside a user's run")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


@contextlib.contextmanager
def pretending(target: str) -> Iterator[None]:
    """A context in which launches compile for TARGETS[target], and do nothing else."""
    before = getattr(triton.runtime.driver, "_active", None)
    triton.runtime.driver.set_active(_Driver(TARGETS[target]))
    triton.compiler.compiler.max_shared_mem.cache_clear()
    try:
        yield
    finally:
        triton.runtime.driver._active = before


@contextlib.contextmanager
def recording(target: str, *kernels: Any) -> Iterator[list[Compiled]]:
    """A list that fills with what is launched for TARGETS[target]. `kernels` are the ones whose earlier binaries to forget."""
    launched: list[Compiled] = []
    metadata = (
        CompiledKernel.launch_metadata
    )  # what every launch asks for, whether Triton or a launch plan has found the binary

    def noting(self: Any, grid: tuple[int, ...], *arguments: Any) -> Any:
        launched.append(Compiled(self, tuple(grid), TARGETS[target]))
        return metadata(self, grid, *arguments)

    CompiledKernel.launch_metadata = noting
    try:
        with pretending(target):
            for kernel in kernels:
                kernel.device_caches.clear()
            yield launched
    finally:
        CompiledKernel.launch_metadata = metadata
