"""`python -m diffmax report FILE ...`: one page, in Markdown, of the reports that `diffmax.testing.report` writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTCOMES = ("passed", "refused", "failed", "expected failure", "skipped")

_HEAD = """# Published reports

What the conformance kit of `diffmax.testing` found, backend by backend. *Refused* are calls that need what the backend does
not claim, and that it refused with the reason. *Left out* are tests that were not asked for in a run.
Made by `python -m diffmax report` from the JSON that `--diffmax-report` writes.
"""


@dataclass(frozen=True)
class Run:
    """One backend in one session of the kit.

    Attributes:
        counts: For each operator, how many tests had which outcome.
        others: Of the tests that did not pass, operator, name, outcome and reason.
        claims: Of each operator, the dtypes and features that the backend claims; reports of earlier versions have none.
    """

    backend: str
    distribution: str
    device: str
    environment: Mapping[str, str]
    note: str
    left_out: int
    counts: Mapping[str, Counter[str]]
    others: Sequence[tuple[str, str, str, str]]
    claims: Mapping[str, Mapping[str, Sequence[str]]]


def read(path: str | Path) -> list[Run]:
    """The runs of one report.

    Raises:
        ValueError: The file is no such report.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        return [_run(run, given["environment"], given.get("note", "")) for run in given["runs"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # JSON or UTF-8 that is none is a ValueError
        raise ValueError(
            f"report: the file must be what pytest's --diffmax-report wrote, got {path}\n  {type(error).__name__}: {error}"
        ) from error


def _run(run: Mapping[str, Any], environment: Mapping[str, str], note: str) -> Run:
    counts: dict[str, Counter[str]] = {}
    others = []
    for test in run["tests"]:
        operator = test.get("operator", "")
        counts.setdefault(operator, Counter())[test["outcome"]] += 1
        if test["outcome"] not in ("passed", "refused"):
            others.append((operator, test["test"], test["outcome"], test["reason"]))
    distribution = f"{run['distribution']} {run['version']}".strip()
    left_out = run.get("left out", 0)
    return Run(
        run["backend"], distribution, run["device"], dict(environment), note, left_out, counts, others, run.get("claims", {})
    )


def page(paths: Sequence[str | Path]) -> str:
    """The page, in Markdown: every backend in a table, then what did not pass.

    Raises:
        ValueError: A file is no report of the kit.
    """
    runs = sorted((run for path in paths for run in read(path)), key=lambda run: (run.distribution, run.backend, run.device))
    rows = [_row(run, operator) for run in runs for operator in sorted(run.counts)]
    lines = [_HEAD, *_table(("backend", "device", "operator", *OUTCOMES), rows), ""]
    lines += _table(("backend", "distribution", "tested with", "note", "left out"), [_circumstances(run) for run in runs])
    claimed = [_claimed(run, operator) for run in runs for operator in sorted(run.claims)]
    if claimed:
        lines += ["", "## What they claim", "", *_table(("backend", "operator", "dtypes", "features"), claimed)]
    for run in runs:
        if run.others:
            lines += ["", f"## What did not pass: {run.backend}", ""]
            lines += _table(("operator", "test", "outcome", "reason"), [_first_line(*other) for other in run.others])
    return "\n".join(lines) + "\n"


def _row(run: Run, operator: str) -> tuple[str, ...]:
    found = run.counts[operator]
    return f"`{run.backend}`", run.device, f"`{operator}`", *(str(found[outcome]) for outcome in OUTCOMES)


def _circumstances(run: Run) -> tuple[str, ...]:
    versions = ", ".join(f"{name} {version}" for name, version in run.environment.items())
    return f"`{run.backend}`", run.distribution, versions, run.note, str(run.left_out)


def _claimed(run: Run, operator: str) -> tuple[str, ...]:
    claims = run.claims[operator]
    return f"`{run.backend}`", f"`{operator}`", ", ".join(claims["dtypes"]), ", ".join(claims["features"])


def _first_line(operator: str, test: str, outcome: str, reason: str) -> tuple[str, ...]:
    return f"`{operator}`", f"`{test}`", outcome, next(iter(reason.strip().splitlines()), "")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield _cells(*columns)
    yield "|" + "---|" * len(columns)
    yield from (_cells(*row) for row in rows)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
