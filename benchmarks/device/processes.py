"""Starting a process so that it ends with this one, and ending it with all that it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def start(command: list[str], *, env: dict[str, str], output: Path, cwd: Path) -> subprocess.Popen[bytes]:
    """A process in a group of its own, whose output goes to a file; killed when this process is, however that happens."""
    parent = os.getpid()

    def alone() -> None:
        os.setpgid(0, 0)
        die_with(parent)

    with output.open("ab") as file:
        return subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, preexec_fn=alone
        )


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, where there is such a call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)


def end(process: subprocess.Popen[Any], *, gently: float = 0.0) -> None:
    """Kill a process's group; `gently`: the seconds it has to write down what it knows after an interrupt."""
    if gently and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(gently)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)  # a process that hangs in a driver does not even take a kill


def tail(path: Path, characters: int = 1200) -> str:
    """The end of a process's output."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")[-characters:].strip()
    except OSError:
        return ""


def died(code: int) -> str:
    """An exit status in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process ended with status {code}"


def now() -> float:
    """The clock of deadlines: the same in all processes of a machine."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
