"""Where cells run: an accelerator with its vendor's backend, or in a rehearsal the CPU with interpreted kernels."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import diffmax
from benchmarks.device import faults
from benchmarks.device.cells import rehearsed

VENDORS = {"cuda": "diffmax_cuda", "rocm": "diffmax_rocm", "npu": "diffmax_npu"}


@dataclass(frozen=True)
class Place:
    """torch's name of the device, diffmax's of the backend, and whether it is a real one."""

    kind: str
    device: str
    backend: str

    @property
    def real(self) -> bool:
        return not rehearsed(self.kind)

    @property
    def graphs(self) -> bool:
        """Whether there are CUDA graphs."""
        return self.device == "cuda"

    @property
    def module(self) -> Any:
        return getattr(torch, self.device)

    def wait(self) -> None:
        """Until the device is done."""
        if self.real:
            self.module.synchronize()

    def allocated(self) -> int:
        return int(self.module.memory_allocated()) if self.real else 0

    @contextlib.contextmanager
    def peak(self) -> Iterator[dict[str, int]]:
        """The most memory that was in use beyond what is now."""
        found: dict[str, int] = {}
        if not self.real:
            yield found
            return
        self.wait()
        before = self.allocated()
        self.module.reset_peak_memory_stats()
        yield found
        self.wait()
        found["peak_bytes"] = int(self.module.max_memory_allocated()) - before

    def free(self) -> None:
        if self.real:
            self.module.empty_cache()

    def lost(self) -> bool:
        """Whether the device's context is gone: every later call in this process would fail."""
        if faults.armed["sticky"]:
            return True
        try:
            self.wait()
            torch.zeros(1, device=self.device).add_(1).cpu()
        except Exception:  # noqa: BLE001  (whatever it is that a broken context raises)
            return True
        return False

    def float64(self) -> str:
        """Where the truth is computed."""
        return "cuda" if self.device == "cuda" else "cpu"


def here(kind: str) -> Place | str:
    """This machine's place; or why there is none."""
    if kind == "interpret":
        from benchmarks.device import interpreted  # Triton interprets from its import on

        interpreted.register()
        return Place(kind, "cpu", interpreted.NAME)
    if kind == "npu-rehearsal":
        return Place(kind, "cpu", "cpu")
    if kind == "npu":
        if importlib.util.find_spec("torch_npu") is not None:
            importlib.import_module("torch_npu")
        device = getattr(torch, "npu", None)
        if device is None or not device.is_available():
            return f"torch sees no NPU here (torch {torch.__version__})"
        return Place(kind, "npu", _registered("npu"))
    if not torch.cuda.is_available():
        return f"torch sees no GPU here (torch {torch.__version__})"
    return Place(kind, "cuda", _registered("rocm" if torch.version.hip else "cuda"))


def _registered(backend: str) -> str:
    """The vendor's backend; from a source path without metadata no entry point told of it."""
    if backend not in {record.backend for record in diffmax.backends()}:
        plugin = importlib.import_module(f"{VENDORS[backend]}._plugin").plugin
        for description in plugin.diffmax_backends():
            diffmax.register_backend(description)
    return backend
