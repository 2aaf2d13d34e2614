"""Whether this machine can run the kernels, and if not, why: the build of torch, the driver, Triton, the architecture."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from diffmax.kernels.requirements import attention_reasons, triton_problem
from diffmax.plugin import CallSpec

ARCHITECTURES = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201")


def probe() -> str | None:
    """None if the backend can run, else the first thing that is missing."""
    if torch.version.hip is None:
        return f"torch {torch.__version__} is built without ROCm"
    if not torch.cuda.is_available():
        return _no_device()
    return triton_problem("amd") or _architecture_problem()


def unsupported(spec: CallSpec) -> list[str]:
    """Reasons against a call."""
    return attention_reasons(spec)


def _no_device() -> str:
    hidden = os.environ.get("HIP_VISIBLE_DEVICES")
    if hidden is not None:
        return f"torch sees no device, with HIP_VISIBLE_DEVICES={hidden!r}"
    if Path("/dev/kfd").exists():
        return "torch sees no device although /dev/kfd is there: check the driver's version against torch's ROCm"
    return "torch sees no AMD device: there is none, or its driver is not loaded"


def _architecture_problem() -> str | None:
    """Of the first device that is not known: the answer is kept for all that torch sees."""
    count = torch.cuda.device_count()
    for index in range(count):
        found = str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
        if found not in ARCHITECTURES:
            which = torch.cuda.get_device_name(index)
            which += f" (cuda:{index} of {count} devices; HIP_VISIBLE_DEVICES can hide it)" if count > 1 else ""
            return f"{which} is {found}; the kernels are compiled and checked for {', '.join(ARCHITECTURES)}"
    return None
