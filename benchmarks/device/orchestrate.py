"""The run: stage after stage, each with its share of the time, none able to stop or starve another.

This process imports neither torch nor diffmax. A stage's cells are asked in workers (`crew`), kits in pytest (`kits`).
What is "ok" in the folder, or in an earlier run's, is not asked again; what failed is, once more, when all else is through.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import signal
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from benchmarks.device import kits, lines, processes, site, stages
from benchmarks.device.cells import REHEARSALS, Cell
from benchmarks.device.crew import Crew, Job, Settings, environment
from benchmarks.device.lines import Lines
from benchmarks.device.stages import Stage

MOST_ATTEMPTS = 2
PASSES = (False, True, False, False)  # what was never asked; what failed, again; and while there is time, what was left over
LAST_SECONDS = 5.0  # of the whole, to end in


def run(options: Namespace) -> int:
    """A whole run; the exit status: 0 if every cell that was asked is ok or skipped, 1 if some failed, 2 without a device."""
    begun = processes.now()
    deadline = begun + options.seconds - min(LAST_SECONDS, options.seconds / 10)
    kind = next(name for name, of in REHEARSALS.items() if of == options.kind) if options.interpret else options.kind
    folder, work = options.out, options.work
    folder.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    log = Lines(folder, "run")
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "big")
    paths, how = site.paths(options.bundle, work)
    variables = environment(work, kind, paths)
    variables |= {"DEVICE_BUNDLE": str(options.bundle), "DEVICE_FAULTS": " ".join(options.inject)}
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        settings = Settings(folder, Path(scratch), kind, seed, variables)
        log.write("run", "part", seed=seed, kind=kind, only=options.only, budget=options.seconds, site=how, **facts(options))
        with _ended_by_signals():
            found = _stages(settings, options, log, deadline)
    log.write("run", "ok" if found != 2 else "error", seconds=round(processes.now() - begun, 1))
    print(summary([folder]))
    if found == 2:
        print("device: torch sees no device here; run `python -m diffmax`; nothing was measured", file=sys.stderr)
    return found


def _stages(settings: Settings, options: Namespace, log: Lines, deadline: float) -> int:
    folders = [*options.also, settings.out]
    chosen = [stage for stage in stages.of(settings.kind) if not options.only or stage.name in options.only]
    refused: set[str] = set()  # what said in this run that it cannot be here
    for number, again in enumerate(PASSES):
        refused = lines.refusals(settings.out) if number > 1 else refused
        for place, stage in enumerate(chosen):
            jobs = _jobs(stage.cells, folders, again, refused)
            waiting = [later for later in chosen[place:] if _jobs(later.cells, folders, again, refused)]
            left = deadline - processes.now()
            if not jobs or left <= 0:
                continue
            until = processes.now() + left * stage.share / sum(later.share for later in waiting)
            try:
                unasked, no_device = _stage(settings, stage, jobs, until, log, folders)
            except Exception:  # noqa: BLE001  (the other stages go on, whatever this one met)
                log.write(f"stage {stage.name}", "error", reason=traceback.format_exc())
                continue
            log.write(f"stage {stage.name}", "part", again=again, cells=len(jobs), unasked=unasked)
            if no_device:
                return 2
    failed = lines.outcomes([settings.out])[1]
    return 1 if failed else 0


def _jobs(cells: Sequence[Cell], folders: Sequence[Path], again: bool, refused: Collection[str]) -> list[Job]:
    """What is left to ask: first what never failed, then what failed once."""
    done, failures = lines.outcomes(folders)
    asked = [(cell, failures.get(cell.id, 0)) for cell in cells if cell.id not in done and cell.id not in refused]
    return [Job(cell, count + 1) for cell, count in asked if (0 < count < MOST_ATTEMPTS if again else count == 0)]


def _stage(
    settings: Settings, stage: Stage, jobs: list[Job], deadline: float, log: Lines, folders: Sequence[Path]
) -> tuple[int, bool]:
    """How many cells were left unasked, and whether there is no device."""
    file = Lines(settings.out, stage.name)
    try:
        if stage.name == "kits":
            return kits.run(settings, jobs[0], file, deadline, folders), False
        _prepare(settings, stage, jobs, deadline, log)
        crew = Crew(settings, stage.name, file, parallel=stage.parallel, chunk=stage.chunk)
        return len(crew.run(jobs, deadline)), crew.no_device
    finally:
        file.close()


def _prepare(settings: Settings, stage: Stage, jobs: list[Job], deadline: float, log: Lines) -> None:
    """Compile side by side what the cells need, before the clock."""
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(job.cell.kernels, job)
    first.pop("", None)
    if not first or not stage.ahead:
        return
    until = processes.now() + stage.ahead * (deadline - processes.now())
    Crew(settings, stage.name, log, parallel=stages.PREPARING, chunk=6, prepare=True).run(list(first.values()), until)


def facts(options: Namespace) -> dict[str, object]:
    """When and on what, as far as one knows without torch."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": site.commit(options.bundle),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "faults": " ".join(options.inject),
    }


def summary(folders: Sequence[Path]) -> str:
    """Cells by stage and status."""
    counts: dict[str, dict[str, int]] = {}
    last = {(line["stage"], line["cell"]): line["status"] for line in lines.read(folders) if "contestant" not in line}
    for (stage, _), status in last.items():
        if stage != "run":
            by = counts.setdefault(stage, {})
            by[status] = by.get(status, 0) + 1
    shown = {stage: ", ".join(f"{count} {status}" for status, count in sorted(by.items())) for stage, by in counts.items()}
    return "\n".join(f"{stage:10} {text}" for stage, text in shown.items())


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A polite end runs the clean-up: workers are killed with us."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
