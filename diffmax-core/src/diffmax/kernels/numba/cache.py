"""Numba's compilation with its cache on disk where there is a place for one, and without where there is none.

Containers run as a user without a home, on images that cannot be written to. The kernels are compiled in memory there, at each
start of a process.

Numba takes what it has kept for a function if the function's own file has not changed. Here a function is made of what stands
in all files of this folder, so their content is part of its name, and of the names of its files in the cache.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

PATIENCE = 2.0  # seconds after which a compilation says that it is one
_told: set[str] = set()


def compile_cached(decorator: Callable[..., Callable[[Any], Any]], *arguments: Any, function: Any, **options: Any) -> Any:
    """`decorator(*arguments, cache=True, **options)(function)`, where Numba finds no place for a cache with cache=False."""
    function.__qualname__ += f"_{sources()}"
    with _telling(), _without_collecting():
        try:
            return decorator(*arguments, cache=True, **options)(function)
        except (RuntimeError, OSError) as error:  # no locator for the file; a disk that is full or cannot be written to
            if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
                raise
            _tell_once(error)
            return decorator(*arguments, cache=False, **options)(function)


@functools.cache
def sources() -> str:
    """A hash of all Python files of this folder."""
    files = sorted(
        (file.name, file.read_bytes()) for file in resources.files(__package__).iterdir() if file.name.endswith(".py")
    )
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _tell_once(error: Exception) -> None:
    if "cache" in _told:
        return
    _told.add("cache")
    chosen = os.environ.get("NUMBA_CACHE_DIR") if isinstance(error, RuntimeError) else None
    fact = f"cannot write to NUMBA_CACHE_DIR, {chosen}" if chosen else "Numba has no folder to keep them in"
    warnings.warn(
        f"diffmax: kernels are compiled anew in each process: {fact} ({error})\n"
        "set NUMBA_CACHE_DIR to a folder that this user can write to; diffmax.warmup() fills it\n"
        "of a read-only image: docs/containers.md",
        RuntimeWarning,
        stacklevel=4,
    )


@contextmanager
def _telling() -> Iterator[None]:
    """Say once per process, on the log, that it is a compilation that takes so long."""
    timer = threading.Timer(PATIENCE, _say_that_it_compiles)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Leave cyclic garbage: Numba makes millions of objects that stay; going through them again and again is a third of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _say_that_it_compiles() -> None:
    if "time" not in _told:
        _told.add("time")
        logging.getLogger("diffmax").warning(
            "diffmax compiles its kernels for this processor: some seconds for rows, up to 15 for attention and for "
            "its backward; once where they can be kept (NUMBA_CACHE_DIR); diffmax.warmup() does it ahead of time"
        )
