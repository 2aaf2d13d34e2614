"""The vendor's path from an empty folder to a passing kit, in a fresh environment: the example, and a new backend of each kind.

Builds wheels and sdists of diffmax-core and of docs/examples/diffmax-example-backend with the pinned hatchling, installs the
wheels, and runs the kits from a folder in which no file of this repository can be imported. Of a new backend it runs what
`new-backend` prints as next steps, as printed; of the longer kits the tests of float32.
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
KINDS = {"acme": "", "acme_attention": "--attention", "acme_power": "--power"}


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
    )

    # a copy without src, so that only what is installed can be imported
    shutil.copytree(EXAMPLE, outside / "diffmax-example", ignore=shutil.ignore_patterns("src", "__pycache__", ".*"))
    report = run(python, "-W", "error", "-m", "diffmax", cwd=outside)
    if not any(line.split()[:3] == ["example", "cpu", "available"] for line in report.splitlines()):
        sys.exit(f"the example is not listed as available:\n{report}")
    run(python, "-m", "diffmax", "selftest", "--backend", "example", cwd=outside)
    kit(python, outside, "example", "diffmax-example/tests")

    for name, kind in KINDS.items():
        printed = run(python, "-m", "diffmax", "new-backend", name, *kind.split(), cwd=outside)
        follow(printed, python, outside, "-k float32" if kind else "")


def follow(printed: str, python: Path, folder: Path, options: str) -> None:
    """Run the next steps that `new-backend` prints, in a shell with the environment's Python first on its path."""
    steps = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    if len(steps) != 3:
        sys.exit(f"new-backend printed {len(steps)} steps, not an installation, a selftest and a kit:\n{printed}")
    for step in steps:
        path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
        output = run(step, cwd=folder, PATH=path, PYTEST_ADDOPTS=options)
        print(*output.splitlines()[-1:], flush=True)


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


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Run a command, or a single string in a shell, without this one's PYTHONPATH; show it, and stop if it fails."""
    print("+", *command, flush=True)
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("DIFFMAX_")
    }
    result = subprocess.run(
        command if len(command) > 1 else command[0],
        shell=len(command) == 1,
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\nexit status {result.returncode}")
    return result.stdout


if __name__ == "__main__":
    main()
