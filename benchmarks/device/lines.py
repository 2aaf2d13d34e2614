"""The files of a run: one of JSON lines per stage, each line whole and on disk before the next thing is done.

A line has `stage`, `cell`, `status`, `seconds`, `seed`, and what the cell found. Status: "ok"; "wrong", a result that is not
right; "error"; "timeout"; "skipped", with the reason; "part", a note of the run itself. A line with a `contestant` is what is
known of one of a cell's contestants before the cell is through. A process may be killed at any moment: a line that was
cut off is no line, and the next one does not suffer from it.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]

FAILED = ("wrong", "error", "timeout")
LONGEST_TEXT = 1500  # characters of a reason
LARGEST_FILE = 15 << 20  # beyond it lines lose their long texts


class Lines:
    """The file of one stage, open for appending; any number of processes may have it open."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.stage = stage
        self.path = folder / f"{stage}.jsonl"
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self.file).st_size
        if size and os.pread(self.file, 1, size - 1) != b"\n":
            os.write(self.file, b"\n")  # an earlier run was killed in the middle of a line

    def write(self, cell: str, status: str, **found: Any) -> None:
        """One line, in one write, on disk when this returns."""
        line = {"stage": self.stage, "cell": cell, "status": status, **found, "at": int(time.time())}
        if os.fstat(self.file).st_size > LARGEST_FILE:
            line = {key: value for key, value in line.items() if key not in ("detail", "reason")}
        os.write(self.file, json.dumps(plain(line), allow_nan=False).encode() + b"\n")
        os.fsync(self.file)

    def close(self) -> None:
        os.close(self.file)


def plain(value: Any) -> Any:
    """What JSON holds: no NaN, no absolute path, no endless text; six digits of a number."""
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    text = without_paths(str(value))
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT // 2]} ... {text[-LONGEST_TEXT // 2 :]}"


def without_paths(text: str) -> str:
    """`text` with every absolute path cut down to its last part: it goes into published files."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\",()]+/)+([^\s/:'\",()]*)", r"\1", text)


def read(folders: Iterable[Path]) -> Iterator[Line]:
    """Every line of the runs in some folders, in the order in which they were written."""
    for folder in folders:
        for path in sorted(folder.glob("*.jsonl")):
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # cut off
                if isinstance(line, dict) and {"stage", "cell", "status"} <= line.keys():
                    yield line


def outcomes(folders: Iterable[Path]) -> tuple[set[str], dict[str, int]]:
    """The cells that are through, and how often the others have failed."""
    done, failures = set(), {}
    for line in read(folders):
        if line.get("prepare") or "contestant" in line:
            continue
        if line["status"] == "ok":
            done.add(line["cell"])
        elif line["status"] in FAILED:
            failures[line["cell"]] = failures.get(line["cell"], 0) + 1
    return done, {cell: count for cell, count in failures.items() if cell not in done}


def refusals(folder: Path) -> set[str]:
    """The cells that were skipped for a reason of their own, not for want of time."""
    last = {line["cell"]: line for line in read([folder]) if "contestant" not in line and not line.get("prepare")}
    return {cell for cell, line in last.items() if line["status"] == "skipped" and not line.get("cut")}
