"""What a public function or a module does where torch.fx or torch.jit.trace calls it.

torch.fx sees it as one step, since arguments that have no shape yet cannot be checked. torch.jit.trace passes through it,
without the warnings that it gives where a check looks at a size.
"""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy

# Whether this thread is inside `captured` already.
_state = threading.local()
_state.inside = False


def is_captured(*arguments: Any) -> bool:
    """Whether a call with these arguments is to go through `captured`."""
    if torch._C._get_tracing_state() is not None and not getattr(_state, "inside", False):
        return True
    for given in arguments:  # noqa: SIM110  (any() takes three times as long, in every call)
        if isinstance(given, Proxy):
            return True
    return False


def captured(target: Any, *arguments: Any, **options: Any) -> Any:
    """`target`, a public function or a module, called with the arguments that `is_captured` was asked about and the others."""
    proxy = next((given for given in (*arguments, *options.values()) if isinstance(given, Proxy)), None)
    if proxy is not None:
        return _step(target, proxy.tracer, arguments, options)
    run = target.forward if isinstance(target, nn.Module) else target
    _state.inside = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
            return run(*arguments, **options)
    finally:
        _state.inside = False


def _step(target: Any, tracer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Proxy:
    """One node of a graph of torch.fx."""
    if not isinstance(target, nn.Module):
        step: Proxy = tracer.create_proxy("call_function", target, arguments, options)
    elif target is not tracer.root:
        step = tracer.create_proxy("call_module", tracer.path_of_module(target), arguments, options)
    else:  # no module has itself for a part
        names = [name for name, _ in (*target.named_parameters(), *target.named_buffers())]
        state = {name: tracer.create_proxy("get_attr", name, (), {}) for name in names}
        step = tracer.create_proxy("call_function", _Whole(target), (state, *arguments), options)
    return step


class _Whole:
    """A module as a function of its parameters and buffers, and of what it is called with."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)
        self.__name__ = self.__qualname__ = type(module).__name__
        self.__module__ = __name__

    def __call__(self, state: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        return torch.func.functional_call(self.module, state, arguments, options)
