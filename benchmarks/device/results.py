"""What some runs found, cell by cell: the last good line of each, or what is known of it without one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.device.cells import rehearsed
from benchmarks.device.lines import FAILED, Line, read


class Results:
    """The lines of some folders, merged.

    Attributes:
        cells: By name, its own line: an "ok" one if there is, else the last. Where a run was cut off before it, those of its
            contestants make one, of status "part".
        runs: What each run said of itself.
        device: What it said of the device.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.cells: dict[str, Line] = {}
        self.runs: list[Line] = []
        parts: dict[str, Line] = {}
        for line in read(folders):
            if line.get("prepare"):
                continue
            if line["stage"] == "run":
                if line["cell"] == "run" and line["status"] == "part":
                    self.runs.append(line)
            elif "contestant" in line:
                whole = parts.setdefault(line["cell"], {"stage": line["stage"], "cell": line["cell"], "contestants": {}})
                whole["contestants"][line["contestant"]] = line
            elif self.cells.get(line["cell"], {}).get("status") != "ok":
                self.cells[line["cell"]] = line
        for cell, part in parts.items():
            if "contestants" not in self.cells.get(cell, {}):
                self.cells[cell] = {**part, "status": "part"} | self.cells.get(cell, {})
        self.device = self.cells.get("device", {})

    @property
    def rehearsed(self) -> bool:
        """Whether any of it comes from an interpreter, or has faults made on purpose: nothing of it may be published."""
        return not self.runs or any(rehearsed(run.get("kind", "")) or run.get("faults") for run in self.runs)

    def starting(self, prefix: str) -> Iterator[Line]:
        return (line for cell, line in self.cells.items() if cell.startswith(prefix))

    def failed(self) -> list[Line]:
        return [line for line in self.cells.values() if line["status"] in FAILED]

    def time(self, cell: str, contestant: str, passed: str, *, graph: bool = False) -> float | None:
        """Median milliseconds; in graphs if that is asked for and known. None: not measured."""
        return time_of(self.cells.get(cell, {}), contestant, passed, graph=graph)

    def ratio(
        self, cell: str, rivals: str | Iterable[str], passed: str, *, own: str = "diffmax", graph: bool = False
    ) -> float | None:
        """Our time over that of the first rival that has one."""
        ours = self.time(cell, own, passed, graph=graph)
        names = [rivals] if isinstance(rivals, str) else rivals
        theirs = next((t for name in names if (t := self.time(cell, name, passed, graph=graph)) is not None), None)
        return None if ours is None or theirs is None else ours / theirs


def time_of(line: Line, contestant: str, passed: str, *, graph: bool = False) -> float | None:
    found: dict[str, Any] = line.get("contestants", {}).get(contestant, {})
    times = found.get(passed) if found.get("status") in ("ok", "part", None) else None
    if not isinstance(times, dict) or "median_ms" not in times:
        return None
    cold = times.get("graph_cold", {}) if graph else {}
    return float(cold.get("median_ms", times["median_ms"]))
