"""The accelerator runtimes for which a distribution of diffmax has kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Runtime(NamedTuple):
    """An accelerator runtime.

    Attributes:
        name: Name, as in CallSpec.runtime; if torch itself is built for it, also its attribute in torch.version.
        device_type: Device type in torch.
        package: The distribution with the kernels.
        vendor: Vendor of the device.
        toolkit: The vendor's name of the software.
        adapter: The distribution that adds it to torch; "" if torch itself is built for it.
        device_file: A file that exists if the driver has a device, even if torch is not built for it.
        driver_file: A file whose first line is the driver version.
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
    """The name of the runtime of a device type in this process; the device type itself if there is none."""
    names = [runtime.name for runtime in RUNTIMES if runtime.device_type == device_type]
    # of two runtimes with one device type, the later only if torch is built for it
    built_for = (name for name in reversed(names) if getattr(torch.version, name, None))
    return next(built_for, names[0] if names else device_type)
