"""Numba's compilation with its cache on disk where there is a place for one, and without where there is none.

Containers run as a user without a home, on images that cannot be written to. The kernels are compiled in memory there, at each
start of a process.

Numba takes what it has kept for a function if the function's own file has not changed. Here a function is made of what stands
in all files of this folder, and of what they import from others, whose numbers are part of the machine code. All that is part
of its name, and of the names of its files in the cache.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import inspect
import logging
import os
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

PATIENCE = 2.0  # seconds after which a compilation says that it is one
_IMPORT = re.compile(r"^ *from (diffmax\.[\w.]+) import (\([^)]*\)|.*)", re.MULTILINE)
_NAME = re.compile(r"\w+")
# What reading a damaged file may raise, as pickle's documentation warns.
_UNREADABLE = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError)
_told: set[str] = set()
_lock = threading.Lock()
_compiling: list[bool] = []  # an entry for each compilation under way: whether the collector runs without it


def compile_cached(decorator: Callable[..., Callable[[Any], Any]], *arguments: Any, function: Any, **options: Any) -> Any:
    """`decorator(*arguments, cache=True, **options)(function)`, where Numba finds no place for a cache with cache=False."""
    function.__qualname__ += f"_{sources()}"
    with _telling(), _without_collecting():
        for other_name in ("", "_again"):  # where a disk or a copy that failed left half a file under the first
            function.__qualname__ += other_name
            try:
                return decorator(*arguments, cache=True, **options)(function)
            except _UNREADABLE as error:
                _tell_of_damage(function, error)
            except (RuntimeError, OSError) as error:  # no locator for the file; a disk that is full or cannot be written to
                if isinstance(error, RuntimeError) and "bitcode" in str(error):  # LLVM's, of what was unpickled
                    _tell_of_damage(function, error)
                    continue
                if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
                    raise
                _tell_once(error)
                break
        return decorator(*arguments, cache=False, **options)(function)


@functools.cache
def sources() -> str:
    """A hash of all Python files of this folder, and of the numbers and functions that they import."""
    files = sorted(
        (file.name, file.read_text(encoding="utf-8"))
        for file in resources.files(__package__).iterdir()
        if file.name.endswith(".py")
    )
    imported = {(module, name) for _, text in files for module, names in _IMPORT.findall(text) for name in _NAME.findall(names)}
    said = [_said(module, name) for module, name in sorted(imported) if not module.startswith(str(__package__))]
    return hashlib.sha256(repr((files, said)).encode()).hexdigest()[:16]


def _said(module: str, name: str) -> str | None:
    """What a name of a module stands for, if it is a number or a function."""
    value = getattr(importlib.import_module(module), name, None)
    if isinstance(value, (bool, int, float, str, tuple)):
        return repr(value)
    return inspect.getsource(value) if inspect.isfunction(value) else None


def kept_in() -> str:
    """The folder that compiled kernels are kept in, or that there is none, for a report."""
    from numba.core import caching

    find: Any = caching.CompileResultCacheImpl
    try:
        return f"kept in {find(_said).locator.get_cache_path()}"  # of any function beside the kernels
    except RuntimeError:  # no place that this user can write to
        return "compiled anew in each process: set NUMBA_CACHE_DIR to a folder that this user can write to"


def _tell_once(error: Exception) -> None:
    if "cache" in _told:
        return
    _told.add("cache")
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if isinstance(error, OSError):
        fact = f"writing what is compiled failed: {error}"
    else:  # Numba's words name the function by a name of ours that tells nobody anything
        fact = f"cannot write to NUMBA_CACHE_DIR, {chosen}" if chosen else "Numba has no folder to keep them in"
    warnings.warn(
        f"diffmax: kernels are compiled anew in each process: {fact}\n"
        "set NUMBA_CACHE_DIR to a folder that this user can write to; diffmax.warmup() fills it\n"
        "of a read-only image: https://diffmax.github.io/diffmax/containers.html",
        RuntimeWarning,
        stacklevel=4,
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _tell_of_damage(function: Any, error: Exception) -> None:
    warnings.warn(
        f"diffmax: what was kept of a compiled kernel cannot be read, and is compiled anew: {_first_line(error)}\n"
        f"to be rid of this: delete the files *{function.__qualname__}* in NUMBA_CACHE_DIR or __pycache__",
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
    with _lock:
        _compiling.append(gc.isenabled() or any(_compiling))
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            enabled = bool(_compiling) and _compiling.pop()  # none in a child that was forked from here
            if enabled and not _compiling:
                gc.enable()


def _collect_in_child() -> None:
    """A process that is forked meanwhile has none of the threads that would turn the collector on again."""
    global _lock
    _lock = threading.Lock()
    if any(_compiling):
        gc.enable()
    _compiling.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_collect_in_child)


def _say_that_it_compiles() -> None:
    if "time" not in _told:
        _told.add("time")
        logging.getLogger("diffmax").warning(
            "diffmax compiles its kernels for this processor: some seconds for rows, up to 11 for attention and for "
            "its backward; once where they can be kept (NUMBA_CACHE_DIR); diffmax.warmup() does it ahead of time"
        )
