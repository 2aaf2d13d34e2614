"""Who else computes something like it, where it can be imported; one that is missing is a line, and nothing stops for it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import faults
from benchmarks.device.context import SkipError

MOST_COMPILATIONS = 12  # of softmax, in one process


def module(name: str) -> Any:
    """An imported rival.

    Raises:
        SkipError: It is not installed, or does not work with what is.
    """
    if faults.missing(name):
        raise SkipError(f"no module named {name!r}")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise SkipError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


_compilations = 0


def compiled_softmax(x: Tensor, calls: Callable[[Callable[[Tensor], Tensor]], object]) -> Callable[[Tensor], Tensor]:
    """softmax compiled for the shape of x; `calls` runs what will be timed, so that it compiles here and not in the clock."""
    global _compilations
    if _compilations >= MOST_COMPILATIONS:
        raise SkipError(f"{MOST_COMPILATIONS} compilations are enough for one process")
    if faults.missing("compiled"):
        raise SkipError("no compiler")
    _compilations += 1
    torch._dynamo.reset()
    function: Callable[[Tensor], Tensor] = torch.compile(lambda x: torch.softmax(x, -1), dynamic=False)
    calls(function)
    return function


def sdpa(backend: str) -> Callable[..., Tensor]:
    """torch's attention by one backend: "flash", "cudnn", or "any" for what it chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if faults.missing(backend):
        raise SkipError(f"no backend {backend!r}")
    if backend == "any":
        return scaled_dot_product_attention
    wanted = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def attend(*tensors: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(wanted):
            return scaled_dot_product_attention(*tensors, **options)

    return attend


@functools.lru_cache(maxsize=1)
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(length: int, device: str, *, causal: bool) -> Callable[..., Tensor]:
    """FlexAttention with its block mask, which is built here and not in the clock."""
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.reset()  # a length of its own each: the limit on recompilations would be reached
    if faults.missing("flex"):
        raise SkipError("no FlexAttention")
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device) if causal else None
    return lambda query, key, value: _flex()(query, key, value, block_mask=mask)


def adasplash(alpha: float, *, causal: bool) -> Callable[..., Tensor]:
    """AdaSplash-2 where it can (alpha 1/2), else the first."""
    package = module("adasplash")
    second, first = (getattr(package, name, None) for name in ("adasplash_v2", "adasplash_v1"))
    if alpha == 0.5 and second is not None and causal:
        return lambda query, key, value: second(query, key, value)
    attend = first or package.adasplash
    return lambda query, key, value: attend(query, key, value, alpha=2 - alpha, is_causal=causal)


def row_rivals(alpha: float) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Who computes the same rows: entmax's bisection, AdaSplash's."""

    def bisection() -> Callable[[Tensor], Tensor]:
        function = module("entmax").entmax_bisect
        return lambda x: function(x, 2 - alpha)

    def splash() -> Callable[[Tensor], Tensor]:
        function = module("adasplash").triton_entmax
        return lambda x: function(x, 2 - alpha)

    return {"entmax_bisect": bisection, "adasplash": splash}


def fused_npu(heads: int, length: int, size: int) -> Callable[..., Tensor]:
    """torch_npu's softmax attention, causal as its documentation has it: the mask says what is hidden."""
    torch_npu = module("torch_npu")
    hidden = torch.ones(length, length, dtype=torch.bool, device="npu").triu(1)
    scale = size**-0.5
    return lambda q, k, v: torch_npu.npu_fusion_attention(q, k, v, heads, "BNSD", atten_mask=hidden, scale=scale)[0]
