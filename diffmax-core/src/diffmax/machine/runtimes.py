"""What drives accelerators: a row per runtime that a distribution of diffmax's has kernels for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Runtime:
    """What drives a device.

    Attributes:
        name: As CallSpec.runtime has it; where torch itself is built for it, also its version's name in torch.version.
        device_type: torch's.
        package: The distribution with the kernels.
        vendor: Who makes the device.
        toolkit: What its vendor calls the software.
        adapter: The distribution that adds it to torch; "" where torch itself is built for it.
        device_file: It exists where the driver has a device, whatever torch was built for.
        driver_file: Its first line is the driver's version.
    """

    name: str
    device_type: str
    package: str
    vendor: str
    toolkit: str
    adapter: str
    device_file: str
    driver_file: str


RUNTIMES = (
    Runtime("cuda", "cuda", "diffmax-cuda", "NVIDIA", "CUDA", "", "/dev/nvidia0", "/sys/module/nvidia/version"),
    Runtime("hip", "cuda", "diffmax-rocm", "AMD", "ROCm", "", "/dev/kfd", "/sys/module/amdgpu/version"),
    Runtime(
        "cann", "npu", "diffmax-npu", "Ascend", "CANN", "torch-npu", "/dev/davinci0", "/usr/local/Ascend/driver/version.info"
    ),
)


def runtime_of(device_type: str) -> str:
    """The name of what drives a device type in this process; the type itself where the table has none."""
    names = [runtime.name for runtime in RUNTIMES if runtime.device_type == device_type]
    # of two that share a type, the later row only where torch is built for it
    built_for = (name for name in reversed(names) if getattr(torch.version, name, None))
    return next(built_for, names[0] if names else device_type)
