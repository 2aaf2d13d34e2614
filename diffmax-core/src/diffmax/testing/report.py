"""A pytest plugin, loaded on request (`-p diffmax.testing.report`): a JSON report of a conformance run, to publish.

pytest -p diffmax.testing.report --diffmax-report acme.json
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import diffmax
from diffmax.machine.dispatch import registry
from diffmax.plugin import Backend

_REPORTS = pytest.StashKey[dict[str, Any]]()
_LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --diffmax-report, --diffmax-note and --diffmax-seed."""
    parser.addoption("--diffmax-report", metavar="PATH", help="write a JSON report of the conformance tests")
    parser.addoption("--diffmax-note", default="", metavar="TEXT", help="what a reader of the report must know of the device")
    parser.addoption("--diffmax-seed", type=int, default=0, metavar="N", help="of the conformance tests' random inputs; 0")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the report."""
    config.stash[_REPORTS] = {}
    config.stash[_LEFT_OUT] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count the tests of each backend that options such as -k leave out."""
    for item in items:
        if backend := getattr(getattr(item, "cls", None), "backend", None):
            item.config.stash[_LEFT_OUT][backend] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Note the outcome of every test of a BackendConformance class."""
    report = yield
    backend = getattr(getattr(item, "cls", None), "backend", None)
    if backend and (report.when == "call" or report.outcome != "passed"):
        outcome = "expected failure" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        asked = getattr(getattr(item, "instance", None), "asked", ())
        if outcome == "passed" and asked and not any(asked):
            outcome = "refused"  # as declared: the backend does not claim it
        operator, *_ = getattr(getattr(item, "cls", None), "operators", ("",))
        entry = {"operator": operator, "test": item.name, "outcome": outcome}
        if outcome == "expected failure":
            entry["reason"] = report.wasxfail
        elif outcome not in ("passed", "refused"):
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
    described = {backend.name: backend for backend in registry.backends()}
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
                "claims": _claims(described.get(backend)),
                "counts": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
                "left out": session.config.stash[_LEFT_OUT][backend],
                "tests": run["tests"],
            }
        )
    environment = {"diffmax-core": diffmax.__version__, "torch": torch.__version__, "python": platform.python_version()}
    found = {"environment": environment, "note": session.config.getoption("--diffmax-note"), "runs": runs}
    Path(path).write_text(json.dumps(found, indent=1) + "\n")


def _claims(backend: Backend | None) -> dict[str, dict[str, list[str]]]:
    """Of each operator that the backend provides, dtypes and features."""
    if backend is None:
        return {}
    return {
        operator: {
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in kernel.dtypes],
            "features": sorted(kernel.features),
        }
        for operator, kernel in backend.provided.items()
    }
