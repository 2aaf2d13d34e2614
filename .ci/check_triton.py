"""Whether every Triton kernel compiles where it will run: on the oldest Triton that diffmax takes, and on the newest.

`make check-triton` runs it. No GPU is needed. Each Triton lives in a folder of its own under build/, which child processes put
first on their path, with a cache of its own, so that a second run takes seconds. For each it writes one table: kernel, target,
case, warps, registers, bytes spilled, shared memory. It fails where something does not compile, takes more shared memory than
the device has, or spills more than `SPILLS` allows. `--write` puts docs/kernels.md up to date, which a test holds complete, and
notes there the fingerprint of the sources, if they have no fault: of the very same sources the next run says so and compiles
nothing, unless `--again` asks for it.

    python .ci/check_triton.py [--write] [--again] [--jobs 2] [VERSION ...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triton_spills import allowed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sources import OPERATORS, fingerprint  # noqa: E402

FOLDER = ROOT / "build" / "check-triton"
PAGE = ROOT / "docs" / "kernels.md"
VERSIONS = ("3.6.0", "3.9.0")
LIMIT_S = 1800


def main(arguments: Sequence[str]) -> int:
    """Compile with each version, print its table; 1 if a version has a fault."""
    parser = argparse.ArgumentParser(prog="check_triton.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help="write docs/kernels.md")
    parser.add_argument("--again", action="store_true", help="compile though docs/kernels.md is of these very sources")
    options = parser.parse_args(arguments)
    made_from = MADE_FROM.format(sources())
    if (
        tuple(options.versions) == VERSIONS
        and not options.write
        and not options.again
        and PAGE.read_text(encoding="utf-8").endswith(made_from)
    ):
        print(f"check-triton: these very sources were compiled without a fault for docs/kernels.md. {made_from.strip()}")
        print("check-triton: nothing to compile; --again does")
        return 0
    reports = {version: compiled(version, options.jobs) for version in options.versions}
    faults = []
    for version, report in reports.items():
        took = f"{report['seconds']} s, {report['core_seconds']} s of cores"
        print(f"\nTriton {version}: {report['cases']} cases, {len(report['rows'])} binaries, {took}\n")
        print(whole_table(report))
        faults += [f"Triton {version}: {fault}" for fault in faults_of(report)]
    if options.write:
        PAGE.write_text(page(reports) + (made_from if not faults and tuple(reports) == VERSIONS else ""), encoding="utf-8")
    for fault in faults:
        print(f"check-triton: {fault}", file=sys.stderr)
    return int(bool(faults))


def sources() -> str:
    """The fingerprint of what is compiled, for which compilers, and of what may spill."""
    own = [Path(__file__), Path(__file__).with_name("triton_spills.py")]
    return hashlib.sha256("".join(fingerprint(operator, *own) for operator in OPERATORS).encode()).hexdigest()[:16]


def compiled(version: str, jobs: int) -> dict[str, Any]:
    """What `benchmarks.compile_kernels` reports under that Triton."""
    folder, output = install(version), FOLDER / f"triton-{version}.json"
    sources = [folder, ROOT, *(ROOT / name / "src" for name in ("diffmax-core", "diffmax-cuda", "diffmax-rocm"))]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, sources)), "TRITON_CACHE_DIR": str(FOLDER / f"cache-{version}"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    output.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compile_kernels", "--jobs", str(jobs), "--output", str(output)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as child:
        try:
            code = child.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            sys.exit(f"check-triton: Triton {version}: not done in {LIMIT_S} s\nrun it again: what was compiled is kept")
        finally:  # with its workers, which would wait for it
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    if not output.exists():
        sys.exit(f"check-triton: Triton {version}: the compiler ended its process ({code})")
    report: dict[str, Any] = json.loads(output.read_text())
    if report["triton"] != version:
        sys.exit(f"check-triton: compiled with Triton {report['triton']}, wanted {version}")
    return report


def install(version: str) -> Path:
    """Triton alone, without what it asks for, in a folder."""
    folder = FOLDER / f"triton-{version}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--upgrade"]
        subprocess.run([*command, "--target", str(partial), f"triton=={version}"], check=True)
        partial.rename(folder)
    return folder


def faults_of(report: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    found = [f"{each['case']}: {each['failure']}" for each in report["failures"]]
    for row in report["rows"]:
        where = f"{row['kernel']} on {row['target']} ({row['case']})"
        if row["shared"] > row["room"]:
            found.append(f"{where} takes {row['shared']} bytes of shared memory, the device has {row['room']}")
        budget = allowed(report["triton"], row["kernel"], row["target"])
        if row["spilled"] > budget:
            found.append(f"{where} spills {row['spilled']} bytes, allowed {budget}: .ci/triton_spills.py")
    return found


def whole_table(report: dict[str, Any]) -> str:
    """Every binary."""
    lines = [("kernel", "target", "case", "warps", "registers", "spilled", "shared")]
    lines += [tuple(str(row[name]) for name in lines[0]) for row in report["rows"]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def page(reports: dict[str, dict[str, Any]]) -> str:
    """docs/kernels.md."""
    parts = [HEAD]
    for version, report in reports.items():
        targets = list(
            dict.fromkeys(
                sorted((row["target"] for row in report["rows"]), key=lambda name: (name[:2] != "sm", len(name), name))
            )
        )
        parts.append(f"## Triton {version}\n\n| kernel | {' | '.join(targets)} |\n|---|{'---|' * len(targets)}\n")
        for kernel in sorted({row["kernel"] for row in report["rows"]}):
            cells = (cell([row for row in report["rows"] if (row["kernel"], row["target"]) == (kernel, t)]) for t in targets)
            parts.append(f"| {kernel.removesuffix('_kernel')} | {' | '.join(cells)} |\n")
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


def cell(rows: list[dict[str, Any]]) -> str:
    """The most registers, bytes spilled and KiB of shared memory of a kernel's binaries for a target."""
    most = {name: max(row[name] for row in rows) for name in ("registers", "spilled", "shared")} if rows else {}
    if not rows:
        return "-"
    spilled = f" **+{most['spilled']}**" if most["spilled"] else ""
    return f"{most['registers']}{spilled}, {-(-most['shared'] // 1024)}"


MADE_FROM = "\nSources without a fault: {}.\n"
HEAD = """# What the compiler makes of the kernels

Written by `make check-triton WRITE=--write`, which compiles every Triton kernel ahead of time, from the real launch code and
with the shipped settings, on the oldest Triton that diffmax takes and on the newest. No device was used. Each cell holds the
most that one of the kernel's binaries takes: registers of a thread, bytes that a thread spills (bold, where there are any),
and KiB of shared memory. Spills that are known, and why each stays, are listed in `.ci/triton_spills.py`; more is an error.
The binaries, one by one, are what the command prints.

"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
