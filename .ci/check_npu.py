"""What can be checked of diffmax-npu's Triton kernels without an NPU and without CANN. `make check-npu` runs it.

Triton-Ascend is a package named `triton`, so it lives in a folder of its own under build/, which a child process puts first
on its path. Where it cannot be installed the check is skipped, and says why: a missing wheel is no fault of the code.
`--stubs` adds what torch_npu itself tells on a machine without CANN (.ci/torch_npu_on_stubs.py); it needs a C compiler.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "check-npu"
TRITON_ASCEND = "3.2.0"
PYTHONS = ((3, 9), (3, 11))


def main(arguments: list[str]) -> int:
    """Run the checks; 1 if one failed, 0 if all passed or were skipped."""
    failed = check_lowering()
    if arguments == ["--stubs"]:
        failed |= check_torch_npu()
    return int(failed)


def check_lowering() -> bool:
    """Whether a kernel that `npu-triton` launches is not lowered, or breaks a documented limit."""
    what = f"lowering by triton-ascend {TRITON_ASCEND}"
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return skipped(what, f"its wheels are for Python 3.9 to 3.11, this is {sys.version.split()[0]}")
    folder, reason = install([f"triton-ascend=={TRITON_ASCEND}", "pybind11"])
    if reason:
        return skipped(what, reason)
    return not run(what, ["lower_for_ascend.py"], {"DIFFMAX_PLUGINS": "0"}, folder)


def check_torch_npu() -> bool:
    """Whether torch_npu, on stub libraries, disagrees with what the kernels and the tests' list of operators assume."""
    release = Version(importlib.metadata.version("torch")).base_version
    what = f"torch-npu {release} on stub libraries"
    folder, reason = install([f"torch-npu=={release}"])
    if reason:
        return skipped(what, reason)
    return not run(what, ["torch_npu_on_stubs.py", str(folder)], {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, folder)


def install(packages: list[str]) -> tuple[Path, str]:
    """Put packages, without what they ask for, in a folder of their own; the folder, and why that failed if it did."""
    folder = FOLDER / packages[0].replace("==", "-")
    if folder.is_dir():
        return folder, ""
    partial = folder.with_suffix(".partial")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--upgrade"]
    try:
        done = subprocess.run([*command, "--target", str(partial), *packages], capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return folder, "the download took more than 90 s"
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        return folder, errors[-1]
    partial.rename(folder)
    return folder, ""


def run(what: str, command: list[str], settings: dict[str, str], folder: Path) -> bool:
    """Whether a script of this folder succeeds, in a process with `folder` first on its path."""
    print(f"check-npu: {what}", flush=True)
    sources = [folder, ROOT / "diffmax-core" / "src", ROOT / "diffmax-npu" / "src"]
    path = os.pathsep.join([*map(str, sources), os.environ.get("PYTHONPATH", "")])
    script = [sys.executable, "-W", "ignore", str(ROOT / ".ci" / command[0]), *command[1:]]
    done = subprocess.run(script, env={**os.environ, **settings, "PYTHONPATH": path}, check=False, timeout=300)
    return done.returncode == 0


def skipped(what: str, reason: str) -> bool:
    """Say so; nothing failed."""
    print(f"check-npu: {what}: skipped, {reason}", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
