"""Microseconds of one call on 8 numbers for four ways to register a differentiable operator: the table of decision 0008.

Run: python docs/decisions/0008_overhead.py
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CALLS, REPEATS = 2000, 15


def square(x: Tensor) -> Tensor:
    """The work itself: one operator, so that what is measured is the wiring."""
    return x * x


def custom_op() -> Callable[[Tensor], Tensor]:
    """torch.library.custom_op with register_autograd."""
    op = torch.library.custom_op("overhead_a::square", square, mutates_args=(), schema="(Tensor x) -> Tensor")
    op.register_fake(torch.empty_like)
    op.register_autograd(lambda ctx, grad: 2 * grad * ctx.saved_tensors[0], setup_context=_save_input)
    return op


def register_autograd() -> Callable[[Tensor], Tensor]:
    """Library.define and impl, with torch.library.register_autograd."""
    _library("overhead_b")
    torch.library.register_autograd(
        "overhead_b::square", lambda ctx, grad: 2 * grad * ctx.saved_tensors[0], setup_context=_save_input
    )
    return torch.ops.overhead_b.square


def autograd_key() -> Callable[[Tensor], Tensor]:
    """Library.define and impl, with a kernel under the Autograd key that calls an autograd.Function: what diffmax does."""
    library = _library("overhead_c")
    op = torch.ops.overhead_c.square

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            with torch._C._AutoDispatchBelowAutograd():
                return op(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad * ctx.saved_tensors[0]

    def differentiable(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return Square.apply(x)
        with torch._C._AutoDispatchBelowAutograd():
            return op(x)

    library.impl("square", differentiable, "Autograd")
    return op


def _library(name: str) -> torch.library.Library:
    library = torch.library.Library(name, "DEF")
    library.define("square(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("square", square, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{name}::square", torch.empty_like, lib=library)
    _KEPT.append(library)
    return library


_KEPT: list[torch.library.Library] = []


def _save_input(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def microseconds(call: Callable[[], object]) -> float:
    """Median over repeats, after a warm-up."""
    timeit.timeit(call, number=CALLS // 4)
    return 1e6 * statistics.median(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    x, leaf = torch.randn(8), torch.randn(8, requires_grad=True)
    grad = torch.ones(8)
    ways = {
        "no operator: the Python function": square,
        "custom_op + register_autograd": custom_op(),
        "define/impl + register_autograd": register_autograd(),
        "define/impl + Autograd key with a Function": autograd_key(),
    }
    print("| way | no gradient | forward with gradient | forward and backward |\n|---|---|---|---|")
    for name, op in ways.items():
        with torch.no_grad():
            plain = microseconds(lambda op=op: op(x))
        forward = microseconds(lambda op=op: op(leaf))
        both = microseconds(lambda op=op: torch.autograd.grad(op(leaf), leaf, grad))
        print(f"| {name} | {plain:.0f} | {forward:.0f} | {both:.0f} |")


if __name__ == "__main__":
    main()
