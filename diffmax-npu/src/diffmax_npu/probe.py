"""Checks whether this machine can run the kernels, and if not, why: torch_npu, its version, CANN, the device.

Nothing here imports torch_npu or opens the device: if torch_npu is not loaded, the process has no tensor on the device.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from importlib_metadata import PackageNotFoundError, packages_distributions, version
from packaging.version import Version

from diffmax.plugin import CallSpec

LIBRARY = "libascendcl.so"
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"


def probe() -> str | None:
    """None if the backend can run, else the first thing that is missing."""
    loaded = sys.modules.get("torch_npu")
    return _package_problem(loaded) or (_cann_problem() or _not_loaded() if loaded is None else _device_problem())


def probe_triton() -> str | None:
    """The same for the experimental backend, which also needs Triton-Ascend: a package with the name of Triton."""
    return probe() or _triton_problem()


def unsupported(spec: CallSpec) -> list[str]:
    """Reasons against a call that the description lacks: limits of the chip. Head dimensions are not limited."""
    if spec.dtype == torch.float64:
        return ['the device has no float64: pass float32, or backend="reference"']
    device = getattr(torch, "npu", None)
    if device is None or not device.is_initialized():
        return []  # a device that is not open is not queried
    reasons = []
    if spec.dtype == torch.bfloat16 and not getattr(device, "is_bf16_supported", _yes)():
        reasons.append(f"{device.get_device_name()} has no bfloat16: pass float16 or float32")
    if not getattr(getattr(device, "utils", None), "is_support_inf_nan", _yes)():
        reasons.append(f"{device.get_device_name()} has no infinity in this mode, and masks need it: set INF_NAN_MODE_ENABLE=1")
    return reasons


def _yes() -> bool:
    return True


def cann_version() -> str:
    """The version of the CANN toolkit in the environment, from its own file; "" if there is none."""
    home = os.environ.get("ASCEND_HOME_PATH", "")
    for file in sorted(Path(home).glob("*/ascend_*_install.info")) if home else ():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("version="):
                return line.partition("=")[2].strip()
    return ""


def _package_problem(loaded: ModuleType | None) -> str | None:
    wanted = ".".join(map(str, Version(torch.__version__).release))
    install = f"pip install torch-npu=={wanted}"
    try:
        found = str(getattr(loaded, "__version__", "") or version("torch-npu"))
    except PackageNotFoundError:
        return f"torch_npu is not installed; {install}"
    if Version(found).release[:3] != Version(wanted).release[:3]:
        return (
            f"torch-npu {found} is made for torch {Version(found).base_version}, this is torch {torch.__version__}; {install}"
        )
    return None


def _triton_problem() -> str | None:
    install = "pip uninstall triton triton-ascend, then pip install triton-ascend"
    flavours = sorted(set(packages_distributions().get("triton", [])))
    if not flavours:
        return "Triton-Ascend is not installed; pip install triton-ascend"
    if flavours != ["triton-ascend"]:
        return f"the package triton comes from {' and '.join(flavours)}, which does not compile for Ascend; {install}"
    return None


def _cann_problem() -> str | None:
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    folders = [f"{home}/lib64"] if home else []
    folders += [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    if any(Path(folder, LIBRARY).exists() for folder in folders):
        return None
    if home:
        return f"CANN is not where ASCEND_HOME_PATH={home!r} says: no lib64/{LIBRARY} there; {SET_ENV}"
    return f"CANN is not found: ASCEND_HOME_PATH is not set; install the CANN toolkit and kernels, then: {SET_ENV}"


def _not_loaded() -> str:
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    why = f"TORCH_DEVICE_BACKEND_AUTOLOAD={autoload!r}" if autoload is not None else "torch did not load it by itself"
    return f"torch_npu is installed and not imported in this process ({why}); import torch_npu first"


def _device_problem() -> str | None:
    device: Any = getattr(torch, "npu")  # noqa: B009  (torch has it only after torch_npu is imported)
    if device._is_in_bad_fork():
        return "this process was forked after the device was opened; start workers with the method 'spawn'"
    if device.is_initialized():
        return None if device.device_count() > 0 else "torch_npu counts no device"
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return "ASCEND_RT_VISIBLE_DEVICES='' hides every device"
    if not any(Path("/dev").glob("davinci[0-9]*")):
        return "there is no /dev/davinci0: no device, no driver, or a container that was not given one; see npu-smi info"
    return None
