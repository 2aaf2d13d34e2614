"""How far a kernel may be from the truth: measured on the plain-PyTorch reference, not chosen by hand.

What one run of the reference errs by is luck: on another processor, or for scores that differ in their last bit, it is a third
of that or three times as much. The yardstick is the largest error over the input and some of its neighbours: the same problem,
its roundings drawn anew (docs/decisions/0067-a-stable-yardstick.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 16
# Large inputs are drawn less often: their largest error is one of many already, and costs more to measure. But not less than
# this: one weight next to the threshold can hold most of a mean error.
FEWEST_DRAWS = 6
NUMBERS = 1 << 15


class Gate(NamedTuple):
    """What a result is compared with: the truth, in float64, and the largest error that it may have."""

    exact: Tensor
    allowed: float


def gates(
    compute: Callable[..., Tensor | tuple[Tensor, ...]],
    *inputs: Tensor | None,
    average: bool = False,
    scale: Tensor | float = 1.0,
    stacked: bool = False,
    numbers: int = 0,
) -> list[Gate]:
    """The truth about each result of `compute`, and the error allowed: twice the reference's own in that dtype, and 2 ulp.

    The reference's error is the largest over `inputs` and up to 15 neighbours of them: every number an ulp or two up, down, or
    as it is, by a generator of its own with torch's seed. Each is compared with float64 on the same numbers.

    float64 results are compared with a truth of the same precision: the reference errs there by as many ulp as in float32, and
    the allowed error is that of two such computations.

    Args:
        compute: The reference. It is called with `inputs` in their own dtypes and in float64 (where the first of them is
            float64: in float32 and in float64), and returns one result or several.
        inputs: On the CPU, in the dtypes that the kernel gets. None and what is not floating is passed on as it is.
        average: Errors are averaged over a result, and so are the numbers of which an ulp is taken.
        scale: What errors and ulp are relative to; it broadcasts against the results.
        stacked: `compute` takes all draws at once, along a new first dimension, and returns them so.
        numbers: How many numbers one run computes with, if that is more than the largest of `inputs` has.
    Returns:
        A Gate per result.
    """
    in_float64 = next(t.dtype for t in inputs if t is not None) == torch.float64
    draws = _neighbours([t.float() if in_float64 and _floating(t) else t for t in inputs], numbers)  # type: ignore[union-attr]
    narrow, wide = _results(compute, draws, stacked), _results(compute, [_double(t) for t in draws], stacked)
    given = _results(compute, [t if t is None else t.unsqueeze(0) for t in inputs], stacked) if in_float64 else wide
    found = []
    for ours, truth, exact in zip(narrow, wide, given, strict=True):
        eps = torch.finfo(torch.float64 if in_float64 else ours.dtype).eps
        error = _size(ours.double() - truth, scale, average) * eps / torch.finfo(ours.dtype).eps
        allowed = 2 * error + 2 * eps * max(1.0, _size(exact[:1], scale, average))
        found.append(Gate(exact[0], 2 * allowed if in_float64 else allowed))
    return found


def reordered(terms: int, result: Tensor, dtype: torch.dtype | None = None) -> float:
    """How far a result may be from itself where its sums of `terms` numbers are taken in another order, or by other code.

    2 ulp and, on either side, a random walk of that many roundings of half an ulp: (2 + sqrt(terms)) eps of the largest number,
    or of 1. It is for comparing a kernel with itself; with the truth it is compared by a gate.

    Args:
        terms: How many numbers its longest sum has.
        result: One of the two.
        dtype: What is rounded to, if it is not the result's.
    """
    eps = torch.finfo(dtype or result.dtype).eps
    return (2 + math.sqrt(terms)) * eps * max(1.0, float(result.detach().abs().max()))


def _neighbours(inputs: list[Tensor | None], numbers: int) -> list[Tensor | None]:
    """Stacks of draws along a new first dimension; the first is what was given."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    numbers = max(1, numbers, *(t.numel() for t in inputs if t is not None))
    count = min(DRAWS, max(FEWEST_DRAWS, NUMBERS // numbers))

    def drawn(t: Tensor) -> Tensor:
        if not _floating(t):
            return t.unsqueeze(0).expand(count, *t.shape)
        steps = torch.randint(-1, 2, (count, *t.shape), generator=generator)
        steps[0] = 0
        moved = (t.double() * (1 + torch.finfo(t.dtype).eps * steps)).to(t.dtype)
        return torch.where(moved.isfinite(), moved, t)

    return [t if t is None else drawn(t.detach()) for t in inputs]


def _results(compute: Callable[..., Tensor | tuple[Tensor, ...]], draws: list[Tensor | None], stacked: bool) -> list[Tensor]:
    if stacked:
        results = compute(*draws)
        return [results] if isinstance(results, Tensor) else list(results)
    count = next(len(t) for t in draws if t is not None)
    each = [compute(*(t if t is None else t[i] for t in draws)) for i in range(count)]
    return [torch.stack(r) for r in zip(*((r,) if isinstance(r, Tensor) else r for r in each), strict=True)]


def _size(t: Tensor, scale: Tensor | float, average: bool) -> float:
    """The largest of the draws, of which each counts by its largest number or the average."""
    if t.numel() == 0:
        return 0.0
    sizes = (t.detach().abs() / scale).nan_to_num().flatten(1)
    return float(sizes.mean(1).max() if average else sizes.max())


def _floating(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


def _double(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t
