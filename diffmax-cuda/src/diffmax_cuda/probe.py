"""Whether this machine can run the kernels, and if not, why: the build of torch, the driver, Triton, the architecture."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from diffmax.kernels.requirements import triton_problem
from diffmax.plugin import CallSpec

OLDEST = (7, 5)  # what Triton still compiles for
OLDEST_FOR_ATTENTION = (8, 0)  # whose matrix cores take bfloat16, and copy to shared memory on their own


def probe() -> str | None:
    """None if the backend can run, else the first thing that is missing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return _no_device()
    return triton_problem("nvidia") or _architecture_problem()


def unsupported(spec: CallSpec) -> list[str]:
    """Reasons against a call: the device's architecture."""
    if not (spec.operator.startswith(("attention", "power")) and torch.cuda.is_available()):
        return []
    (major, minor), which = _least_capable()
    if (major, minor) >= OLDEST_FOR_ATTENTION:
        return []
    needed = "{}.{}".format(*OLDEST_FOR_ATTENTION)
    return [f"its attention needs compute capability {needed} or newer, {which} has {major}.{minor}"]


def _no_device() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"torch sees no device, with CUDA_VISIBLE_DEVICES={hidden!r}"
    if Path("/dev/nvidia0").exists():
        return "torch sees no device although /dev/nvidia0 is there: check the driver's version against torch's CUDA"
    return "torch sees no NVIDIA device: there is none, or its driver is not loaded"


def _architecture_problem() -> str | None:
    (major, minor), which = _least_capable()
    if (major, minor) >= OLDEST:
        return None
    return f"{which} has compute capability {major}.{minor}, needed is {OLDEST[0]}.{OLDEST[1]} or newer"


def _least_capable() -> tuple[tuple[int, int], str]:
    """The least compute capability of all devices that torch sees, and whose it is: answers are kept for all of them alike."""
    count = torch.cuda.device_count()
    capability, index = min((torch.cuda.get_device_capability(index), index) for index in range(count))
    name = torch.cuda.get_device_name(index)
    if count == 1:
        return capability, name
    return capability, f"{name} (cuda:{index}, the least capable of {count} devices; CUDA_VISIBLE_DEVICES can hide it)"
