"""What a forked child may not do: wait for OpenMP's threads, which stayed in the parent."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

_is_child = False
_alone = threading.RLock()


def alone_in_child(function: _Function) -> _Function:
    """`function`, which runs operators of torch, on one thread of torch's where this process is a forked child.

    They would wait there for OpenMP's threads, which stayed in the parent. The number is global, so one call runs at a time.
    """

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        if not _is_child:
            return function(*arguments, **options)
        with _alone:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return function(*arguments, **options)
            finally:
                torch.set_num_threads(threads)

    return cast("_Function", guarded)


def _after_fork() -> None:
    global _is_child, _alone
    _is_child, _alone = True, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
