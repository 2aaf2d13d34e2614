"""The conformance kits of all operators, side by side in pytest's processes; each outcome is a line as soon as it is known.

Imports no torch: pytest runs in processes of its own, and `kit_lines`, a plugin of theirs, writes the lines.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device import lines, processes
from benchmarks.device.cells import rehearsed
from benchmarks.device.crew import Job, Settings
from benchmarks.device.lines import Lines

TESTS = """
from benchmarks.device.place import here

place = here({kind!r})
assert not isinstance(place, str), place

from diffmax.testing.attention.conformance import AttentionConformance
from diffmax.testing.rows.conformance import BackendConformance
from diffmax.testing.decoding.conformance import KVCacheConformance
from diffmax.testing.power.conformance import PowerConformance
from diffmax.testing.threshold.conformance import ThresholdConformance


class TestRows(BackendConformance):
    backend, device = place.backend, place.device


class TestAttention(AttentionConformance):
    backend, device = place.backend, place.device


class TestDecoding(KVCacheConformance):
    backend, device = place.backend, place.device


class TestPower(PowerConformance):
    backend, device = place.backend, place.device


class TestThreshold(ThresholdConformance):
    backend, device = place.backend, place.device
"""
TIMEOUT = 120  # seconds of one test, where pytest-timeout is there
GENTLY = 8.0  # seconds of pytest to write its report when the time is up
MOST_PROCESSES = 14
REHEARSED = "test_empty_and_single and float32 or test_masks_and_bad_rows and float32 or test_gradcheck"
LARGEST_REPORT = 15 << 20


def run(settings: Settings, job: Job, file: Lines, deadline: float, folders: Sequence[Path]) -> int:
    """Run what is not known to pass; returns how many tests were left at the end, as far as one knows."""
    if _find(settings, "pytest") is None:
        file.write("kits", "skipped", reason="pytest is not installed")
        return 1
    folder = settings.work / "kits"
    folder.mkdir(exist_ok=True)
    (folder / "test_device.py").write_text(TESTS.format(kind=settings.kind), encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    done = {line["cell"] for line in lines.read(folders) if line["stage"] == "kits" and line["status"] == "ok"}
    known = folder / "passed.json"
    known.write_text(json.dumps(sorted(done)), encoding="utf-8")
    output, report = folder / "output.txt", folder / "kits.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-c", "pytest.ini", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.device.kit_lines", f"--junitxml={report}", "test_device.py"]
    if rehearsed(settings.kind):
        command += ["-k", REHEARSED]
    elif settings.kind == "npu":
        command += ["-k", "not TestDecoding"]
    if _find(settings, "xdist") is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        command += ["-n", str(max(1, min(MOST_PROCESSES, cores - 1))), "--dist", "worksteal", "--max-worker-restart", "200"]
    if _find(settings, "pytest_timeout") is not None:
        command += ["--timeout", str(TIMEOUT)]
    variables = {**settings.environment, "DEVICE_KIT_LINES": str(settings.out), "DEVICE_KIT_PASSED": str(known)}
    variables["DEVICE_KIT_ATTEMPT"] = str(job.attempt)
    started = processes.now()
    process = processes.start(command, env=variables, output=output, cwd=folder)
    while process.poll() is None and processes.now() < deadline - min(GENTLY, (deadline - started) / 4):
        _wait()
    cut = process.poll() is None
    processes.end(process, gently=max(0.0, min(GENTLY, deadline - processes.now())))
    if report.exists() and report.stat().st_size < LARGEST_REPORT:
        shutil.copy(report, settings.out / "kits.xml")
    found = {"seconds": processes.now() - started, "detail": processes.tail(output)}
    if cut:
        file.write("kits", "skipped", reason="the stage's time was up", cut=True, **found)
    elif process.returncode == 0:
        file.write("kits", "ok", attempt=job.attempt, **found)
    elif process.returncode == 1:
        file.write("kits", "wrong", reason="some tests failed, each has its line", attempt=job.attempt, **found)
    else:
        file.write("kits", "error", reason=processes.died(process.returncode), attempt=job.attempt, **found)
    return int(cut)


def _wait() -> None:
    import time

    time.sleep(0.1)


def _find(settings: Settings, module: str) -> object:
    """Whether workers will find a module: here, or where their path leads."""
    if importlib.util.find_spec(module) is not None:
        return True
    places = settings.environment["PYTHONPATH"].split(os.pathsep)
    return next((True for place in places if (Path(place) / module).is_dir() or (Path(place) / f"{module}.py").exists()), None)
