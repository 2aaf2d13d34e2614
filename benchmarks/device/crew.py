"""Workers: processes that take cells, and what is done when one hangs, dies or must be started afresh.

A worker gets its cells in a file, notes in another what it is at (`Notes`), and writes the lines itself. Whoever watches it
writes a line only where it cannot: it hung, or it is dead. The other cells then go on in a new process. A cell that a rival
made hang or die is taken up again without that rival.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.device import processes
from benchmarks.device.cells import Cell
from benchmarks.device.lines import Lines

ROOT = Path(__file__).resolve().parents[2]
STICKY = 75  # exit status: the device's context is gone, the cell has its line
NO_DEVICE = 76  # exit status: torch sees no device
PATIENCE = float(os.environ.get("DEVICE_PATIENCE", "1"))  # a factor of every cell's time, for rehearsals
START_SECONDS = 90.0  # until a worker has imported torch
POLL_SECONDS = 0.05
OURS = "diffmax"


def is_ours(contestant: str) -> bool:
    """Whether it is diffmax, with or without more: "diffmax, bounds"."""
    return contestant.partition(",")[0] == OURS


@dataclass
class Job:
    """A cell in a queue: how often it was tried before, and the contestants to leave out."""

    cell: Cell
    attempt: int = 1
    without: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return {"id": self.cell.id, "attempt": self.attempt, "without": self.without}


class Notes:
    """What a worker is at, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, what: str, cell: str, contestant: str | None = None, seconds: float = 0.0) -> None:
        note = {"what": what, "cell": cell, "contestant": contestant, "seconds": seconds, "since": processes.now()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")

    def read(self) -> list[dict[str, Any]]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1]]


@dataclass
class Settings:
    """What all workers of a run share."""

    out: Path
    work: Path
    kind: str
    seed: int
    environment: dict[str, str]


class Worker:
    """A process and the cells that it was given."""

    count = 0

    def __init__(self, settings: Settings, stage: str, jobs: list[Job], *, prepare: bool) -> None:
        Worker.count += 1
        base = settings.work / f"worker-{os.getpid()}-{Worker.count}"
        self.jobs, self.output, self.notes = jobs, base.with_suffix(".txt"), Notes(base.with_suffix(".notes"))
        given = base.with_suffix(".json")
        given.write_text(json.dumps([job.plain() for job in jobs]), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.device.worker", "--stage", stage, "--jobs", str(given)]
        command += ["--out", str(settings.out), "--notes", str(self.notes.path), "--kind", settings.kind]
        command += ["--seed", str(settings.seed), "--work", str(settings.work), *(["--prepare"] if prepare else [])]
        self.started = processes.now()
        self.process = processes.start(command, env=settings.environment, output=self.output, cwd=ROOT)

    def at(self) -> dict[str, Any] | None:
        """What it began last; None between cells."""
        notes = self.notes.read()
        return notes[-1] if notes and notes[-1]["what"] == "begin" else None

    def overdue(self) -> bool:
        """Whether what it is at takes longer than it may."""
        notes = self.notes.read()
        if not notes:
            return processes.now() > self.started + START_SECONDS
        last = notes[-1]
        return processes.now() > last["since"] + (PATIENCE * last["seconds"] if last["what"] == "begin" else START_SECONDS)

    def left(self) -> list[Job]:
        """Its cells that are not through."""
        through = {note["cell"] for note in self.notes.read() if note["what"] == "end"}
        return [job for job in self.jobs if job.cell.id not in through]


class Crew:
    """Workers side by side over one queue.

    Attributes:
        parallel: How many at once.
        chunk: Cells of one process.
        prepare: Nothing is measured: kernels are compiled, and what goes wrong there says nothing yet.
    """

    def __init__(
        self, settings: Settings, stage: str, lines: Lines, *, parallel: int = 1, chunk: int = 1000, prepare: bool = False
    ) -> None:
        self.settings, self.stage, self.lines = settings, stage, lines
        self.parallel, self.chunk, self.prepare = parallel, chunk, prepare
        self.no_device = False
        self.barren = 0  # processes in a row that did not reach their first cell

    def run(self, jobs: Sequence[Job], deadline: float) -> list[Job]:
        """Work until all are through or the time is up; returns what was not begun."""
        queue: deque[Job] = deque(jobs)
        crew: list[Worker] = []
        try:
            self._work(queue, crew, deadline)
        finally:
            for worker in crew:
                processes.end(worker.process)
                queue.extend(worker.left())
        return list(queue)

    def _work(self, queue: deque[Job], crew: list[Worker], deadline: float) -> None:
        while (queue or crew) and self.barren < 2 and not self.no_device:
            while queue and len(crew) < self.parallel and processes.now() < deadline:
                size = min(self.chunk, -(-len(queue) // (self.parallel - len(crew))))
                crew.append(Worker(self.settings, self.stage, self._taken(queue, size), prepare=self.prepare))
            time.sleep(POLL_SECONDS)
            for worker in list(crew):
                if worker.process.poll() is not None:
                    queue.extendleft(reversed(self._ended(worker)))
                elif worker.overdue():
                    queue.extendleft(reversed(self._hung(worker)))
                elif processes.now() >= deadline:
                    queue.extendleft(reversed(self._cut(worker)))
                else:
                    continue
                crew.remove(worker)
            if processes.now() >= deadline and not crew:
                break

    def _taken(self, queue: deque[Job], size: int) -> list[Job]:
        """The next cells; side by side everyone gets some of the first, and of each kind."""
        step = max(1, len(queue) // size) if self.parallel > 1 else 1
        taken = list(queue)[: size * step : step]
        left = [job for job in queue if job not in taken]
        queue.clear()
        queue.extend(left)
        return taken

    def _ended(self, worker: Worker) -> list[Job]:
        code, at = worker.process.returncode, worker.at()
        processes.end(worker.process)  # what it left behind
        if code == NO_DEVICE:
            self.no_device = True
            self._line("start", "error", reason=processes.tail(worker.output, 400))
            return worker.left()
        if not worker.notes.read():
            self.barren += 1
            self._line("start", "error", reason=processes.died(code), detail=processes.tail(worker.output))
            return worker.left()
        self.barren = 0
        if at is None:
            if code not in (0, STICKY):
                self._line("between cells", "error", reason=processes.died(code), detail=processes.tail(worker.output))
            return worker.left()
        return self._failed(worker, at, "error", processes.died(code))

    def _hung(self, worker: Worker) -> list[Job]:
        at = worker.at()
        processes.end(worker.process)
        if at is None:
            self.barren += not worker.notes.read()
            self._line("start", "timeout", reason=f"no cell within {START_SECONDS:g} s", detail=processes.tail(worker.output))
            return worker.left()
        return self._failed(worker, at, "timeout", f"not done after {PATIENCE * at['seconds']:g} s")

    def _cut(self, worker: Worker) -> list[Job]:
        at = worker.at()
        processes.end(worker.process)
        if at is not None:
            took = processes.now() - at["since"]
            self._line(at["cell"], "skipped", reason=f"the stage's time was up {took:.1f} s after it was begun", cut=True)
        return worker.left()

    def _failed(self, worker: Worker, at: dict[str, Any], status: str, reason: str) -> list[Job]:
        """A line for the cell, or for a rival that spoilt it; the jobs to go on with."""
        left, found = worker.left(), {"seconds": processes.now() - at["since"], "detail": processes.tail(worker.output)}
        rival = at["contestant"]
        again = []
        for job in left:
            if job.cell.id != at["cell"]:
                again.append(job)
            elif rival is not None and not is_ours(rival):
                self._line(job.cell.id, status, contestant=rival, attempt=job.attempt, reason=reason, **found)
                again.append(Job(job.cell, job.attempt, [*job.without, rival]))
            else:
                self._line(job.cell.id, status, attempt=job.attempt, reason=reason, **found)
        return again

    def _line(self, cell: str, status: str, **found: Any) -> None:
        cell = f"{self.stage}: {cell}" if cell in ("start", "between cells") else cell
        self.lines.write(cell, status, **({"prepare": True} if self.prepare else {}), **found)


def environment(work: Path, kind: str, site: Sequence[Path]) -> dict[str, str]:
    """The variables of workers: where modules and caches are, and one thread each."""
    paths = [str(ROOT), *map(str, site), os.environ.get("PYTHONPATH", "")]
    more = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, **more, **({"TRITON_INTERPRET": "1"} if kind == "interpret" else {})}
