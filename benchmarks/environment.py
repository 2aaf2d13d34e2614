"""Where a result was measured, without saying whose machine it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import diffmax

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "diffmax-core", "entmax", "numba", "numpy")


def environment(bench: str, arguments: list[str]) -> dict[str, Any]:
    return {
        "device": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "kernels": cpu_kernels(),
        "commit": _git("rev-parse", "--short=10", "HEAD") or "unknown",
        # earlier results and their plots do not change what is measured
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/images")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "command": " ".join(["python -m", f"benchmarks.{bench}", *map(without_paths, arguments)]),
    }


def result_path(bench: str, env: dict[str, Any]) -> Path:
    """benchmarks/results/<device>/<date>-<commit>-<bench>.json."""
    device = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|@.*", " ", f"cpu {env['device']}".lower())).strip("-")
    return RESULTS / device / f"{env['date']}-{env['commit']}-{bench.removeprefix('bench_')}.json"


def without_paths(text: str) -> str:
    """`text` with every absolute path cut down to its last part: error messages and arguments go into published files."""
    return re.sub(r"(?:/[^\s/:'\"]+)*/([^\s/:'\"]+)", r"\1", text)


def cpu_kernels() -> dict[str, str]:
    """Contestant -> "module:function" of the forward kernel behind it."""
    records = [r for r in diffmax.backends() if r.operator == "bisect" and r.device == "cpu"]
    return {"diffmax" if r.status == "active" else f"diffmax[{r.backend}]": r.kernel for r in records}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # an unpacked source distribution
    return done.stdout.strip()
