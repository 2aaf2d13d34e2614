"""Runs a compiled kernel on every thread that torch would use: on torch's own threads, or else on some of Python's.

A kernel is a C function of one address, where it finds a job; threads that are given the same job share it out themselves.
Two pools of threads would take the processor from each other, since OpenMP's keep it for a while after each of torch's
operators. So the job is handed to the OpenMP library that torch has loaded, if that can be found.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmax.kernels.numba.jobs import DONE

Words = np.ndarray[Any, np.dtype[np.int64]]
Kernel = Callable[[bytes | int], int]
_Team = Callable[[int, int, int, int], None]
_WORD = Struct("q")

# So much scratch memory stays for the next call, at most.
LEFT_BYTES = 1 << 22
_left: list[Tensor] = []
_pool: ThreadPoolExecutor | None = None
_is_forked_child = False


def run_on_threads(kernel: Kernel, address: int, job: int, count: int) -> None:
    """Call kernel(job), whose machine code is at `address`, on `count` threads, of which the calling one is the first.

    Inside a parallel region of torch's, OpenMP gives it the calling thread alone.
    """
    team = torchs_threads()
    if team is not None:
        team(address, job, count, 0)
        return
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="diffmax")
    others = [_pool.submit(kernel, job) for _ in range(count - 1)]
    kernel(job)
    for other in others:
        other.result()


def run_job(name: str, kernel: Kernel, address: int, words: Words, threads: int, tasks: int) -> None:
    """Run a job, whose words begin as `jobs` says, on some threads, of which one is enough. It must do all of its tasks."""
    job = words.ctypes.data
    if threads == 1:
        done = kernel(job)
    else:
        run_on_threads(kernel, address, job, threads)
        done = int(words[DONE])
    if done != tasks:
        raise RuntimeError(f"diffmax: the {name} kernel did {done} of {tasks} tasks")


def take(size: int) -> Tensor:
    """Scratch memory: what an earlier call left, if that is enough, since to get and free it costs a short call much."""
    if size <= LEFT_BYTES:
        try:
            memory = _left.pop()
        except IndexError:  # another thread has it
            pass
        else:
            if len(memory) >= size:
                return memory
    return torch.empty(size, dtype=torch.uint8)


def leave(memory: Tensor) -> None:
    """Give back what `take` gave, for the next call."""
    if not _left and len(memory) <= LEFT_BYTES:
        _left.append(memory)


def run_bytes(kernel: Kernel, address: int, job: bytes, threads: int) -> int:
    """Run a job that is not looked at afterwards; how many of its tasks were done."""
    if threads == 1:
        return kernel(job)
    shared = ctypes.create_string_buffer(job)
    run_on_threads(kernel, address, ctypes.addressof(shared), threads)
    done: int = _WORD.unpack_from(shared, 8 * DONE)[0]
    return done


def run_packed(name: str, kernel: Kernel, address: int, job: bytes, threads: int, tasks: int) -> None:
    """As `run_job`, of a job that is not looked at afterwards."""
    done = run_bytes(kernel, address, job, threads)
    if done != tasks:
        raise RuntimeError(f"diffmax: the {name} kernel did {done} of {tasks} tasks")


def torchs_threads() -> _Team | None:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library behind torch's operators, None if it has none.

    That entry is GNU's; LLVM's and Intel's libraries have it too on Linux. In a forked child the threads are gone, and
    OpenMP would wait for them for ever.
    """
    return None if _is_forked_child else _openmp_entry()


@functools.cache
def _openmp_entry() -> _Team | None:
    if sys.platform != "linux" or not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # a library that is loaded already; a symbol is looked for in it and in those that it needs
        entry = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    entry.restype = None
    team: _Team = entry
    return team


def _after_fork() -> None:
    global _pool, _is_forked_child
    _pool, _is_forked_child = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
