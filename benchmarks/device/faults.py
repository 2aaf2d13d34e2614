"""Faults on purpose, for rehearsals: `--inject raise:PART_OF_A_CELL`, wrong:, hang:, die:, sticky:, slow:, missing:RIVAL.

"raise" and "wrong" act in the interpreted kernels (`interpreted`), "missing" where rivals are imported. The others act as a
cell, or a contestant of one ("die:CELL@CONTESTANT"), begins, the first time that it is tried.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

armed: dict[str, bool] = {"raise": False, "wrong": False, "sticky": False}


class KernelFaultError(Exception):
    """No RuntimeError, as Triton's own are none."""


def _wanted(kind: str) -> list[str]:
    # names of cells hold spaces: faults are given with "_" for them
    given = (fault.partition(":") for fault in os.environ.get("DEVICE_FAULTS", "").split())
    return [where.replace("_", " ") for name, _, where in given if name == kind]


def _hits(kind: str, cell: str, contestant: str | None) -> bool:
    for where in _wanted(kind):
        place, _, who = where.partition("@")
        if place in cell and (who == (contestant or "")):
            return True
    return False


@contextlib.contextmanager
def during(cell: str, attempt: int) -> Iterator[None]:
    """Arm the faults of kernels while a cell runs."""
    for kind in ("raise", "wrong"):
        armed[kind] = _hits(kind, cell, None)
    try:
        begin(cell, None, attempt)
        yield
    finally:
        armed["raise"] = armed["wrong"] = False


def begin(cell: str, contestant: str | None, attempt: int) -> None:
    """What happens as a cell or a contestant of it begins."""
    if attempt > 1:
        return
    if _hits("hang", cell, contestant):
        time.sleep(1e6)
    if _hits("slow", cell, contestant):
        time.sleep(2)
    if _hits("die", cell, contestant):
        os.kill(os.getpid(), signal.SIGKILL)
    if _hits("sticky", cell, contestant):
        armed["sticky"] = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def bend(results: Any) -> Any:
    """A kernel's results, wrong or not at all if a fault is armed."""
    if armed["raise"]:
        raise KernelFaultError("this kernel does not compile")
    if armed["wrong"]:
        first, *rest = results
        return (first * 1.25, *rest)
    return results


def missing(rival: str) -> bool:
    return rival in _wanted("missing")
