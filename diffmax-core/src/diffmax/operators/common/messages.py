"""Messages between the ranks of a process group: differentiable collectives, and an agreement before the first of them.

A group is a process group, or for sums and maxima its name, which a graph can contain. All messages pass through the functions
at the top.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.distributed_c10d import _get_process_group_store

from diffmax.operators.common.numerics import accumulation_dtype

# Room in an agreement: the same for every function, so that ranks that call different ones can tell.
FACTS = 20

# How long a rank may take to answer after a message has failed.
ROLL_CALL_SECONDS = 5.0

resolve: Callable[[Any], dist.ProcessGroup] = torch._C._distributed_c10d._resolve_process_group

# torch 2.13 renamed both
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(t: Tensor, operation: str, group: Any) -> Tensor:
    """The sum or maximum over the ranks."""
    with _answered(group):
        reduced: Tensor = collectives.wait_tensor(collectives.all_reduce(t.contiguous(), operation, group))
    return reduced


def all_to_all(t: Tensor, group: dist.ProcessGroup, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
    """Of (n,), the run of `sends[r]` numbers goes to rank r; of the result, the run of `receives[r]` is from rank r."""
    exchanged = t.new_empty(sum(receives))
    with _answered(group):
        dist.all_to_all_single(exchanged, t.contiguous(), list(receives), list(sends), group=group)
    return exchanged


def all_gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's (n,), as (ranks * n,)."""
    gathered = t.new_empty(group.size() * t.shape[0])
    with _answered(group):
        _gather_single(gathered, t.contiguous(), group=group)
    return gathered


def reduce_scatter(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of every rank's (ranks * n,), this rank's (n,) of the sum."""
    scattered = t.new_empty(t.shape[0] // group.size())
    with _answered(group):
        _scatter_single(scattered, t.contiguous(), group=group)
    return scattered


@contextlib.contextmanager
def _answered(group: Any) -> Iterator[None]:
    """A message that fails, because a rank has ended or does not take part, says which rank.

    Each rank on which it fails answers in the group's store. The group cannot be used after that.
    """
    try:
        yield
    except RuntimeError as error:
        group = resolve(group) if isinstance(group, str) else group
        absent = _absent(group)
        if not absent:
            raise
        raise RuntimeError(
            f"diffmax.distributed: a message needs every rank of the group, got no answer from {_ranks(absent)} of "
            f"{group.size()} within {ROLL_CALL_SECONDS:g} s\n"
            f"{'it has ended, or does' if len(absent) == 1 else 'they have ended, or do'} not make this call: see the logs of "
            f"{_ranks(absent)}, then start the group again"
        ) from error


def _absent(group: dist.ProcessGroup) -> list[int]:
    """The ranks that do not answer; if nobody can be asked, the store's host, rank 0."""
    keys = [f"diffmax/answer/{rank}" for rank in range(group.size())]
    missing = [rank for rank in range(group.size()) if rank != group.rank()]
    try:
        store = _get_process_group_store(group)
        store.set(keys[group.rank()], "here")
        end = time.monotonic() + ROLL_CALL_SECONDS
        while missing and time.monotonic() < end:
            time.sleep(0.02)
            missing = [rank for rank in missing if not store.check([keys[rank]])]
    except RuntimeError:
        return [0]
    return missing


def _ranks(some: Sequence[int]) -> str:
    return f"rank{'s' * (len(some) > 1)} {', '.join(map(str, some))}"


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
    """`all_to_all`. Its transpose is itself, with what is sent and received exchanged."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Send."""
        ctx.group, ctx.sends, ctx.receives = group, sends, receives
        return all_to_all(t, group, sends, receives)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The transpose."""
        return Exchange.apply(grad, ctx.group, ctx.receives, ctx.sends), None, None, None


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


def agree(
    name: str, facts: Mapping[str, Any], number: int, problem: Exception | None, group: Any, device: torch.device
) -> list[int]:
    """Every rank's `number`, at least 0, if all ranks make the same call `name` with the same facts; else raise on every rank.

    One message of the ranks + 2 * FACTS integers, and more only for what an error tells. `problem` is what is wrong on this
    rank. Without the message, ranks that disagree would wait for each other, or exchange messages of different lengths.
    """
    group = resolve(group) if isinstance(group, str) else group
    own = {"the function": name, **facts}
    if len(own) > FACTS:
        raise AssertionError(f"room for {FACTS} facts, got {len(own)}")
    codes = [zlib.crc32(repr(fact).encode()) for fact in own.values()] if problem is None else []
    numbers = [0] * group.size()
    numbers[group.rank()] = 1 + number if problem is None else 0
    rest = FACTS - len(codes)  # where a rank has no fact, what it sends is lower than any other's
    message = [*numbers, *codes, *[-1] * rest, *(-code for code in codes), *[-(2**32)] * rest]
    largest = all_reduce(torch.tensor(message, device=device), "max", group).tolist()
    found, high, low = largest[: len(numbers)], largest[len(numbers) : -FACTS], [-code for code in largest[-FACTS:]]
    refusing = [rank for rank, n in enumerate(found) if n == 0]
    differing = [place for place in range(FACTS) if high[place] not in (-1, low[place])]
    if not refusing and not differing:
        return [n - 1 for n in found]
    told: list[Any] = [None] * group.size()
    with _answered(group):
        dist.all_gather_object(told, [repr(fact) for fact in own.values()] if problem is None else str(problem), group)
    if problem is not None:
        raise problem
    if refusing:
        raise ValueError(
            f"{name}: every rank's arguments must be valid, got invalid ones on {_ranks(refusing)}\n"
            + "\n".join(f"  rank {rank}: {told[rank]}" for rank in refusing)
        )
    if 0 in differing:  # the facts are then those of different functions
        differing = [0]
    wrong = {what: [of_rank[place] for of_rank in told] for place, what in enumerate(own) if place in differing}
    raise ValueError(
        f"{name}: {' and '.join(wrong)} must be the same on every rank, got different ones\n"
        + "\n".join(f"  {what}: {_by_rank(values)}" for what, values in wrong.items())
    )


def check_here(name: str, what: str, t: Any, hint: str = "") -> None:
    """Check that what a rank gives is its own part, with values. hint: what else to do with a DTensor."""
    if type(t).__name__ == "DTensor":  # compared by name, because the import takes half a second
        raise TypeError(f"{name}: {what} must be this rank's part, got a DTensor\npass {what}.to_local(){hint}")
    if isinstance(t, Tensor) and t.device.type == "meta":
        raise ValueError(f"{name}: {what} must have values to send, got a tensor on the meta device")


@contextlib.contextmanager
def refusals(name: str, group: Any, x: Any) -> Iterator[None]:
    """Where a rank checks its arguments before an operator that agrees: what it raises, the others hear of, and raise too."""
    try:
        yield
    except Exception as problem:
        of_messages = isinstance(x, Tensor) and x.device.type != "meta"
        agree(name, {}, 0, problem, group, x.device if of_messages else torch.device("cpu"))
        raise


def _by_rank(values: Sequence[str]) -> str:
    """Which ranks have which value."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on {_ranks(some)}" for value, some in ranks.items())


def refuse_transforms(name: str) -> None:
    """Raise under a torch.func transform or in forward mode: neither has a meaning here that would not be slow or silent."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{name}: torch.func transforms and forward-mode differentiation are not supported\n"
            "use reverse mode: Tensor.backward, torch.autograd.grad"
        )
