"""The former path of `diffmax.reference.attention`, with the backward's arguments of plugin interface 1.3."""

from __future__ import annotations

from torch import Tensor

from diffmax.plugin import AttentionCall, AttentionGradients, Saved, Wanted
from diffmax.reference import attention as reference
from diffmax.reference.attention import attention

__all__ = ["attention", "attention_backward"]


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    m: Tensor,
    delta: Tensor,
    u: Tensor,
    live: Tensor,
    call: AttentionCall,
    needs_e: bool,
    needs_bias: bool = False,
    needs_sink: bool = False,
) -> AttentionGradients:
    """`diffmax.reference.attention.attention_backward` with flat arguments, for kernels with `api_version=(1, 3)` or older."""
    saved, wanted = Saved(m, delta, u, live), Wanted(needs_e, needs_bias, needs_sink)
    return reference.attention_backward(grad, query, key, value, saved, call, wanted)
