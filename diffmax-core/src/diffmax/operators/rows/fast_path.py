"""The fast path: which calls can skip torch's dispatcher because it would have nothing to do."""

from __future__ import annotations

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
_KEYS_ARE_SHOWN = hasattr(torch._C.DispatchKeySet, "raw_repr")  # missing in torch 2.4, where no call is plain
if _KEYS_ARE_SHOWN:
    _TENSORS = (_keys("CPU", "AutocastCPU", "AutogradCPU", "ADInplaceOrView"), _keys("CPU", "AutocastCPU"))
    _STATES = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))


def is_plain(x: Tensor) -> bool:
    """Whether x is a plain CPU tensor, and only the kernel would act on it.

    Not so with subclasses, modes, tracers, profilers, functionalization, or a lazy negation. The caller checks for gradients
    and torch.func.
    """
    return (
        type(x) is Tensor
        and _KEYS_ARE_SHOWN
        and _dispatch_keys(x).raw_repr() in _TENSORS
        and _dispatch_tls_local_include_set().raw_repr() in _STATES
        and _len_torch_function_stack() == 0
        and not _profiler_enabled()
    )
