"""Forked children: OpenMP's threads stay in the parent, so a child must not wait for them."""

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
    """Wrap `function`, which runs torch operators, so that in a forked child it uses one torch thread.

    With more, it would wait for OpenMP's threads, which stay in the parent. The number is global, so one call runs at a time.
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
