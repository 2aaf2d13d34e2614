"""The fast path: which calls can skip torch's dispatcher because it would have nothing to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_keys, _dispatch_tls_local_include_set, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled


def _keys(*names: str) -> int:
    """A set of dispatch keys, as the dispatcher writes it."""
    keys = torch._C.DispatchKeySet.from_raw_repr(0)
    for name in names:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


# A strided tensor on the CPU, made outside and inside of torch.inference_mode; and a thread that is in no mode, likewise.
_KEYS_ARE_SHOWN = hasattr(torch._C.DispatchKeySet, "raw_repr")  # not in torch 2.4, where no call is plain
_TYPES = frozenset({Tensor, torch.nn.Parameter})
_OTHERS = frozenset({type(None), bool, int, float, str})  # quicker than to ask whether a number is a tensor
if _KEYS_ARE_SHOWN:
    _TENSORS = (_keys("CPU", "AutocastCPU", "AutogradCPU", "ADInplaceOrView"), _keys("CPU", "AutocastCPU"))
    _STATES = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))


def is_plain(*arguments: Any) -> bool:
    """Whether the tensors among the arguments lie on the CPU and nobody but the kernel has a part in an operator of them.

    Not so with subclasses, modes, tracers, profilers, functionalization, or a lazy negation. The caller checks for gradients
    and torch.func.
    """
    if not (
        _KEYS_ARE_SHOWN
        and _dispatch_tls_local_include_set().raw_repr() in _STATES
        and _len_torch_function_stack() == 0
        and not _profiler_enabled()
    ):
        return False
    for given in arguments:
        kind = type(given)
        if kind in _OTHERS:
            continue
        if kind in _TYPES:
            if _dispatch_keys(given).raw_repr() not in _TENSORS:
                return False
        elif isinstance(given, Tensor):
            return False
    return True
