"""Messages between the ranks of a process group: differentiable collectives, and an agreement before the first of them.

A group is a process group, or for sums and maxima its name, which a graph can contain. All messages pass through the functions
at the top.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.autograd import forward_ad

from diffmax.operators.common.numerics import accumulation_dtype

# torch 2.13 renamed both
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(t: Tensor, operation: str, group: Any) -> Tensor:
    """The sum or maximum over the ranks."""
    reduced: Tensor = collectives.wait_tensor(collectives.all_reduce(t.contiguous(), operation, group))
    return reduced


def all_to_all(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row r of (ranks, n) goes to rank r; row r of the result is from rank r."""
    exchanged = torch.empty_like(t, memory_format=torch.contiguous_format)
    dist.all_to_all_single(exchanged, t.contiguous(), group=group)
    return exchanged


def all_gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's (n,), as (ranks * n,)."""
    gathered = t.new_empty(group.size() * t.shape[0])
    _gather_single(gathered, t.contiguous(), group=group)
    return gathered


def reduce_scatter(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of every rank's (ranks * n,), this rank's (n,) of the sum."""
    scattered = t.new_empty(t.shape[0] // group.size())
    _scatter_single(scattered, t.contiguous(), group=group)
    return scattered


class Add(torch.autograd.Function):
    """Parts, one on each rank, to their sum, which every rank then holds: one value. Its transpose is `Hand`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: str | dist.ProcessGroup) -> Tensor:
        """Send."""
        ctx.group = group
        return all_reduce(part, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return Hand.apply(grad, ctx.group), None


class Hand(torch.autograd.Function):
    """One value that every rank holds, to a copy of its own for each rank's part of the computation. Transpose: `Add`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str | dist.ProcessGroup) -> Tensor:
        """A view."""
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return Add.apply(grad, ctx.group), None


class Exchange(torch.autograd.Function):
    """`all_to_all`, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Send."""
        ctx.group = group
        return all_to_all(t, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return Exchange.apply(grad, ctx.group), None


class Gather(torch.autograd.Function):
    """`all_gather`. Its transpose is `Scatter`."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Send."""
        ctx.group = group
        return all_gather(t, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return Scatter.apply(grad, ctx.group), None


class Scatter(torch.autograd.Function):
    """`reduce_scatter`, summed in the accumulation dtype. Its transpose is `Gather`."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Send."""
        ctx.group = group
        return reduce_scatter(t.to(accumulation_dtype(t.dtype)), group).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return Gather.apply(grad, ctx.group), None


def agree(facts: Mapping[str, Any], number: int, group: Any, device: torch.device) -> tuple[int, list[str]]:
    """The largest `number` of all ranks, and which facts differ between ranks, in one message of fixed length.

    Without it, ranks that disagree would wait for each other, or exchange messages of different lengths.
    """
    codes = [zlib.crc32(repr(fact).encode()) for fact in facts.values()]
    message = torch.tensor([number, *codes, *(-code for code in codes)], device=device)
    largest, *extremes = all_reduce(message, "max", group).tolist()
    highest, lowest = extremes[: len(codes)], [-code for code in extremes[len(codes) :]]
    return int(largest), [name for name, high, low in zip(facts, highest, lowest, strict=True) if high != low]


def refuse_transforms(name: str) -> None:
    """Raise under a torch.func transform or in forward mode: neither has a meaning here that would not be slow or silent."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{name}: torch.func transforms and forward-mode differentiation are not supported\n"
            "use reverse mode: Tensor.backward, torch.autograd.grad"
        )
