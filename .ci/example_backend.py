"""The vendor's path from an empty folder to a passing kit, in a fresh environment: the example, and a new backend.

Builds wheels and sdists of diffmax-core and of docs/examples/diffmax-example-backend with the pinned hatchling, installs the
wheels, and runs the kits from a folder in which no file of this repository can be imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "example-backend"
EXAMPLE = ROOT / "docs" / "examples" / "diffmax-example-backend"
TEMPLATE = "cli/templates/backend/src/@package@/_plugin.py.in"


def main() -> None:
    """Build, install, list, run both kits."""
    shutil.rmtree(WORK, ignore_errors=True)
    outside = WORK / "elsewhere"
    outside.mkdir(parents=True)
    core = build(ROOT / "diffmax-core")
    example = build(EXAMPLE)

    run(sys.executable, "-m", "venv", str(WORK / "venv"))
    python = WORK / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pins = str(ROOT / "requirements.txt")
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "-c",
        pins,
        f"{core}[testing]",
        str(example),
        "hatchling",
        "editables",
    )

    # a copy without src, so that only what is installed can be imported
    shutil.copytree(EXAMPLE, outside / "diffmax-example", ignore=shutil.ignore_patterns("src", "__pycache__", ".*"))
    report = run(python, "-W", "error", "-m", "diffmax", cwd=outside)
    if not any(line.split()[:3] == ["example", "cpu", "available"] for line in report.splitlines()):
        sys.exit(f"the example is not listed as available:\n{report}")
    run(python, "-m", "diffmax", "selftest", "--backend", "example", cwd=outside)
    kit(python, outside, "example", "diffmax-example/tests")

    run(python, "-m", "diffmax", "new-backend", "acme", cwd=outside)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "diffmax-acme", cwd=outside)
    kit(python, outside, "acme", "diffmax-acme/tests")


def build(folder: Path) -> Path:
    """Wheel and sdist; return the wheel."""
    out = WORK / "dist" / folder.name
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(folder))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    if folder.name == "diffmax-core":
        with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as tar:
            for name, members in ((wheel.name, archive.namelist()), (sdist.name, tar.getnames())):
                if not any(member.endswith(TEMPLATE) for member in members):
                    sys.exit(f"{name} lacks the template {TEMPLATE}")
    return wheel


def kit(python: Path, folder: Path, backend: str, tests: str) -> None:
    """Run the conformance kit and show its counts, with the report that a vendor would publish."""
    report = ("-p", "diffmax.testing.report", "--diffmax-report", f"{backend}.json")
    output = run(python, "-W", "error", "-m", "pytest", "-q", *report, tests, cwd=folder)
    if not (folder / f"{backend}.json").exists():
        sys.exit(f"{backend}.json was not written")
    print(f"{backend}: {output.splitlines()[-1]}", flush=True)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command without this shell's PYTHONPATH, show it, and stop with its output if it fails."""
    print("+", *command, flush=True)
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("DIFFMAX_")
    }
    result = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\nexit status {result.returncode}")
    return result.stdout


if __name__ == "__main__":
    main()
