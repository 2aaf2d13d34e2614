"""What tests ran with: a pytest plugin that records a session, and the table of versions that is made of such records.

    PYTHONPATH=.ci/record python -m pytest -p ran --ran docs/compatibility/NAME.json ...
    python .ci/record/ran.py          writes the table of docs/versioning.md again

`make floor` and the jobs of CI record theirs in build/ran, and keep them as artifacts; what is committed is in the table.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "versioning.md"
RECORDS = ROOT / "docs" / "compatibility"
BEGIN, END = "<!-- .ci/record/ran.py writes what follows -->\n", "<!-- .ci/record/ran.py wrote what precedes -->\n"
PACKAGES = ("torch", "numba", "transformers", "triton")
OUTCOMES = ("passed", "failed", "skipped")


def pytest_addoption(parser: Any) -> None:
    """Add --ran."""
    parser.addoption("--ran", metavar="PATH", help="write versions and outcomes of this session, as JSON")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: Any) -> None:
    """Write the record, of a session that came to its end."""
    if (path := config.getoption("--ran")) and exitstatus in (0, 1):
        found = {outcome: len(terminalreporter.stats.get(outcome, [])) for outcome in OUTCOMES}
        found["failed"] += len(terminalreporter.stats.get("error", []))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        asked = {"tests": [name.removeprefix(f"{ROOT}/") for name in config.args], "marks": config.option.markexpr}
        asked |= {"sample": config.getoption("--sample", 1), "share": "/".join(map(str, config.getoption("--share", (1, 1))))}
        Path(path).write_text(json.dumps(record(asked, found), indent=1) + "\n", encoding="utf-8")


def record(asked: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """Versions of this environment, what was asked for, and what came out."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed(name) for name in PACKAGES},
        "asked": asked,
        "counts": counts,
    }


def installed(name: str) -> str | None:
    """The version of a package, without the mark of its build; None: not installed."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def table(records: list[dict[str, Any]]) -> str:
    """A row a combination of versions; sessions of one are added up."""
    rows: dict[tuple[str, ...], Counter[str]] = {}
    for one in records:
        names = (one["python"], *(one["packages"][name] or "none" for name in PACKAGES), one["system"])
        rows.setdefault(names, Counter()).update(one["counts"])
    head = ("Python", "torch", "Numba", "transformers", "Triton", "system", *OUTCOMES)
    lines = [head, ("---",) * len(head)]
    lines += [(*names, *(str(found[outcome]) for outcome in OUTCOMES)) for names, found in sorted(rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(page: str, records: list[dict[str, Any]]) -> str:
    """The page with its table made again."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{PAGE.name} must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table(records)}\n{END}{after}"


def committed() -> list[dict[str, Any]]:
    """The records in docs/compatibility."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), committed()), encoding="utf-8")
    sys.exit(0)
