"""A process that asks cells one after the other: `python -m benchmarks.device.worker`, started by `crew`."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.device.crew import NO_DEVICE, STICKY, Job, Notes
from benchmarks.device.lines import Lines
from benchmarks.device.stages import every_cell

FIGURES = re.compile(r"error ([\d.e+-]+|nan|inf), (?:allowed|reference) ([\d.e+-]+)")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.worker")
    for name in ("--stage", "--kind"):
        parser.add_argument(name, required=True)
    for name in ("--jobs", "--out", "--notes", "--work"):
        parser.add_argument(name, required=True, type=Path)
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args(arguments)
    _end_with_parent()

    from benchmarks.device.place import here  # torch, from here on

    place = here(options.kind)
    if isinstance(place, str):
        print(place)
        return NO_DEVICE
    cells = every_cell(options.kind)
    lines = Lines(options.out, "run" if options.prepare else options.stage)
    notes = Notes(options.notes)
    for given in json.loads(options.jobs.read_text(encoding="utf-8")):
        job = Job(cells[given["id"]], given["attempt"], given["without"])
        if not _ask(job, place, options, lines, notes):
            return STICKY
    return 0


def _ask(job: Job, place: Any, options: argparse.Namespace, lines: Lines, notes: Notes) -> bool:
    """One cell, whatever becomes of it; False if the process is of no use any more."""
    from benchmarks.device import faults
    from benchmarks.device.context import Context, seed_of

    cell, seed = job.cell, seed_of(options.seed, job.cell.id, job.attempt)
    tag = {"seed": seed, "attempt": job.attempt, **({"prepare": True} if options.prepare else {})}

    def part(contestant: str, status: str = "part", **found: Any) -> None:
        if not options.prepare:
            lines.write(cell.id, status, contestant=contestant, seconds=time.perf_counter() - started, **tag, **found)

    context = Context(cell, place, seed, options.work, job.attempt, job.without, options.prepare)
    context.note = lambda contestant, seconds: notes.write("begin", cell.id, contestant, seconds)
    context.part = part
    notes.write("begin", cell.id, None, cell.seconds)
    started = time.perf_counter()
    module, _, function = cell.run.partition(":")

    def asked() -> dict[str, Any]:
        with faults.during(cell.id, job.attempt):
            return importlib.import_module(f"benchmarks.device.{module}").__dict__[function](context, **cell.case)

    found = guarded(asked)
    lost = place.lost() if found["status"] in ("error", "wrong") else False
    if lost:
        found["context_lost"] = True
    if not options.prepare or found["status"] == "error":
        lines.write(cell.id, seconds=time.perf_counter() - started, **tag, **_once(cell.case, found))
    notes.write("end", cell.id)
    if not lost:
        place.free()
    return not lost


def guarded(call: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """What a call found, with its status; an exception of any kind is an answer too."""
    from benchmarks.device.context import SkipError, WrongError

    try:
        return {"status": "ok", **(call() or {})}
    except SkipError as why:
        return {"status": "skipped", "reason": str(why)}
    except WrongError as wrong:
        return {"status": "wrong", "reason": str(wrong), **wrong.figures}
    except AssertionError as wrong:
        found = FIGURES.search(str(wrong))
        figures = {"error": float(found[1]), "allowed": float(found[2])} if found else {}
        return {"status": "wrong", "reason": str(wrong), **figures}
    except Exception as error:  # noqa: BLE001  (Triton's errors are no RuntimeError, and an error must not end the others)
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message')}"
        return {"status": "error", "reason": reason, "detail": "".join(traceback.format_tb(error.__traceback__)[-4:])}


def _once(case: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The case beside what was found; what was found goes first where both have a name."""
    status = found.pop("status")
    return {"status": status, **{key: value for key, value in case.items() if key not in found}, **found}


def _end_with_parent() -> None:
    """Where the kernel does not end us with our parent, look for it now and then."""
    import os

    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
