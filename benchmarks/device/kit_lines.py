"""A pytest plugin: each test's outcome as a line, written by the process that hears of all of them.

Tests that an earlier run passed are left out. A process whose device context is gone ends itself; pytest-xdist starts another.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device.lines import Lines
from benchmarks.device.worker import FIGURES

STASH = pytest.StashKey[Lines]()
FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Open the file, in the one process that hears of every test."""
    if not hasattr(config, "workerinput"):
        config.stash[STASH] = Lines(Path(os.environ["DEVICE_KIT_LINES"]), "kits")
        config.pluginmanager.register(Writer(config.stash[STASH]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed before."""
    passed = set(json.loads(Path(os.environ["DEVICE_KIT_PASSED"]).read_text(encoding="utf-8")))
    left = [item for item in items if name_of(item.nodeid) not in passed]
    if len(left) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Remember who failed."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After a failure look whether the device is still there for the next test."""
    if item.stash.get(FAILED, False) and hasattr(item.config, "workerinput") and item.module.place.lost():
        os._exit(75)


def name_of(nodeid: str) -> str:
    """The cell of a test."""
    return "kits " + nodeid.partition("::")[2].replace("::", " ")


class Writer:
    """Writes the lines."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's call, or what kept it from being called."""
        if report.when != "call" and not (report.failed or (report.skipped and report.when == "setup")):
            return
        found: dict[str, Any] = {"seconds": report.duration, "attempt": int(os.environ["DEVICE_KIT_ATTEMPT"]), "seed": 0}
        status = "ok" if report.passed else "skipped" if report.skipped else "error"
        if not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            found["reason"] = crash.message if crash is not None else str(report.longrepr)[-600:]
            if report.failed and found["reason"].startswith("AssertionError"):
                status = "wrong"
                figures = FIGURES.search(found["reason"])
                found |= {"error": float(figures[1]), "allowed": float(figures[2])} if figures else {}
            if report.failed:
                found["detail"] = str(report.longrepr)[-1000:]
        self.lines.write(name_of(report.nodeid), status, **found)
