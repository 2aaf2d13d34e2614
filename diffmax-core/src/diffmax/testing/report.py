"""A pytest plugin, loaded on request (`-p diffmax.testing.report`): a JSON report of a conformance run, to publish.

pytest -p diffmax.testing.report --diffmax-report acme.json
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import diffmax

_REPORTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --diffmax-report and --diffmax-seed."""
    parser.addoption("--diffmax-report", metavar="PATH", help="write a JSON report of the conformance tests")
    parser.addoption("--diffmax-seed", type=int, default=0, metavar="N", help="of the conformance tests' random inputs; 0")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the report."""
    config.stash[_REPORTS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Note the outcome of every test of a BackendConformance class."""
    report = yield
    backend = getattr(getattr(item, "cls", None), "backend", None)
    if backend and (report.when == "call" or report.outcome != "passed"):
        outcome = "expected failure" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        entry = {"test": item.name, "outcome": outcome}
        if outcome == "expected failure":
            entry["reason"] = report.wasxfail
        elif outcome != "passed":
            entry["reason"] = str(call.excinfo.value if call.excinfo is not None else report.longrepr)
        device = getattr(getattr(item, "cls", None), "device", "")
        run = item.config.stash[_REPORTS].setdefault(backend, {"device": device, "tests": []})
        run["tests"].append(entry)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report."""
    path = session.config.getoption("--diffmax-report")
    if not path:
        return
    origins = {record.backend: (record.distribution, record.version) for record in diffmax.backends()}
    runs = []
    for backend, run in session.config.stash[_REPORTS].items():
        outcomes = [entry["outcome"] for entry in run["tests"]]
        distribution, version = origins.get(backend, ("", ""))
        runs.append(
            {
                "backend": backend,
                "distribution": distribution,
                "version": version,
                "device": run["device"],
                "counts": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
                "tests": run["tests"],
            }
        )
    environment = {"diffmax-core": diffmax.__version__, "torch": torch.__version__, "python": platform.python_version()}
    Path(path).write_text(json.dumps({"environment": environment, "runs": runs}, indent=1) + "\n")
