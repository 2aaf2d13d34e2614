"""What autograd has in mind with a call: whether it records it, and by which of torch's ways."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether the backward of a call with these tensors may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def forward_levels() -> int:
    """How many jvp transforms enclose the call. An autograd.Function knows of one: the tangents of a second are silently 0."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through one of them; compiled code enters it unseen by `forward_ad`."""
    with _unrecorded():  # looking makes an alias, which a compiler's graph would keep
        return any(t is not None and torch._VF._unpack_dual(t, level=0).tangent is not None for t in tensors)


def _unrecorded() -> AbstractContextManager[object]:
    """What is done inside it, a graph that is being made does not show."""
    if torch._C._len_torch_dispatch_stack() == 0 or torch._C._get_dispatch_mode(_PROXY) is None:
        return nullcontext()
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()
