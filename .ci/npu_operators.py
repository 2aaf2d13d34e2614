"""List the operators for which torch_npu registers a kernel, from its wheel: nothing of it is run.

    pip download --no-deps --only-binary=:all: torch-npu==2.13.0
    python .ci/npu_operators.py torch_npu-*.whl

It writes tests/data/torch_npu_operators.txt, which the stand-in device of the tests obeys. A registration says that the call
stays on the device; it does not say for which dtypes.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import yaml

LISTING = Path(__file__).resolve().parents[1] / "tests" / "data" / "torch_npu_operators.txt"
SOURCES = ("npu_native_functions.yaml", "npu_native_functions_by_codegen.yaml")


def main(arguments: list[str]) -> int:
    """Read the wheel, write the list."""
    if len(arguments) != 1 or not arguments[0].endswith(".whl"):
        print(f"npu_operators: give one wheel of torch-npu, got {' '.join(arguments) or 'nothing'}", file=sys.stderr)
        return 1
    path = Path(arguments[0])
    version = path.name.split("-")[1]
    names = sorted(operators(path))
    LISTING.write_text(f"# torch-npu {version}, written by .ci/npu_operators.py\n" + "\n".join(names) + "\n", encoding="utf-8")
    print(f"{LISTING.name}: {len(names)} operators of torch-npu {version}")
    return 0


def operators(wheel: Path) -> set[str]:
    """Names with overloads, such as "add.Tensor", of torch's operators that the wheel's own lists call supported."""
    with zipfile.ZipFile(wheel) as files:
        listings = [yaml.safe_load(files.read(f"torch_npu/csrc/aten/{source}")) for source in SOURCES]
    entries = [entry for listing in listings for entry in listing["supported"]]
    signatures = [entry if isinstance(entry, str) else entry["func"] for entry in entries]
    return {signature.partition("(")[0].strip() for signature in signatures}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
