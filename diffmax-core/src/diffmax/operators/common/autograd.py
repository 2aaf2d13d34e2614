"""The autograd context of a call: gradients, torch.func transforms, forward mode, tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_FAKE = torch._C._TorchDispatchModeKey.FAKE


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors may get a backward."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def forward_levels() -> int:
    """The number of jvp transforms around the call. An autograd.Function handles one; tangents of a second are silently 0."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors has a tangent. In compiled code, the level of `forward_ad` does not show forward mode."""
    with _unrecorded():  # unpacking makes an alias, which would stay in a compiler's graph
        return any(t is not None and torch._VF._unpack_dual(t, level=0).tangent is not None for t in tensors)


def is_recorded() -> bool:
    """Whether operations go into a graph under construction, whose tensors' values are not to be read."""
    if torch._C._len_torch_dispatch_stack() != 0 and torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)


def gives_no_values() -> bool:
    """Whether operations give tensors without values, whatever they are given: under a FakeTensorMode."""
    return torch._C._len_torch_dispatch_stack() != 0 and torch._C._get_dispatch_mode(_FAKE) is not None


def _unrecorded() -> AbstractContextManager[object]:
    """A context whose operations a graph under construction does not record."""
    if not is_recorded():
        return nullcontext()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()
