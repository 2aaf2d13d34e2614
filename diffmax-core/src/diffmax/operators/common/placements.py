"""Sharding rules of operators whose batch entries and heads are independent: written from the axes of their tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffmax.operators.common.schema import Schema
from diffmax.operators.common.sharding import Sharding

INDEPENDENT = "BH"


class Result(NamedTuple):
    """A tensor that an operator returns.

    Attributes:
        axes: As of an argument.
        like: The argument that has the same shape, and shares an axis where that does; None: it shares none.
        summed: Whether it is, where `like` is shared, a sum over those who share it, as a gradient; else all have the same.
        made: Whether it is made for these arguments; if not, it is (0,).
    """

    axes: str
    like: str | None = None
    summed: bool = True
    made: Callable[[Mapping[str, Any]], bool] = lambda _: True


def rule(
    schema: Schema[Any],
    axes: Mapping[str, str],
    results: Mapping[str, Result],
    allowed: Callable[[Mapping[str, Any]], str] = lambda _: INDEPENDENT,
) -> Callable[..., list[Sharding]]:
    """DTensor's rule: everything whole, or the batch or the heads sharded wherever a tensor has them.

    Args:
        schema: The operator's. Its argument `query` has both axes.
        axes: A letter per axis of each tensor argument, B for the batch and H for heads, aligned at the last. A tensor may lack
            leading axes, or share one: then its size is 1, and it stays whole.
        results: By name, in the schema's order.
        allowed: Which of the letters may be sharded in a call with these arguments, which it may also refuse.
    """

    def shardings(*flat: Any) -> list[Sharding]:
        given = {name: argument for name, argument in zip(schema.names, flat, strict=False) if argument is not None}
        whole = _sharding("", given, schema.names[: len(flat)], axes, results)
        query, letters = given["query"], allowed(given)
        sizes = {letter: query.shape[axes["query"].index(letter)] for letter in letters}
        return [
            whole,
            *(
                _sharding(letter, given, schema.names[: len(flat)], axes, results)
                for letter, size in sizes.items()
                if size > 1 and _is_cut_alike(_places(letter, given, axes), given, size, query.mesh)
            ),
        ]

    return shardings


def _sharding(
    letter: str, given: Mapping[str, Any], names: tuple[str, ...], axes: Mapping[str, str], results: Mapping[str, Result]
) -> Sharding:
    from torch.distributed.tensor import Partial, Replicate, Shard

    places = _places(letter, given, axes)

    def returned(result: Result) -> Any:
        if not letter or not result.made(given):
            return Replicate()
        axis = result.axes.index(letter) if result.like is None else places[result.like]
        return Shard(axis) if axis is not None else Partial() if result.summed else Replicate()

    arguments = [None if name not in places else Replicate() if places[name] is None else Shard(places[name]) for name in names]
    return [returned(result) for result in results.values()], arguments


def _places(letter: str, given: Mapping[str, Any], axes: Mapping[str, str]) -> dict[str, Any]:
    """Where each given tensor has the axis; None if it does not have it, or shares it."""
    return {name: _axis(given[name], axes[name], letter) for name in axes if name in given}


def _axis(t: Any, axes: str, letter: str) -> int | None:
    axis = axes.index(letter) - (len(axes) - t.ndim) if letter and letter in axes else -1
    return axis if axis >= 0 and t.shape[axis] != 1 else None


def _is_cut_alike(places: Mapping[str, Any], given: Mapping[str, Any], size: int, mesh: Any) -> bool:
    """Whether what each rank gets belongs together.

    Key heads that are fewer than query heads must be cut evenly by every number of parts that the mesh can ask for. Cut
    unevenly, they would be cut elsewhere than the query heads.
    """
    counts = {given[name].shape[axis] for name, axis in places.items() if axis is not None} - {size}
    dims = [count for count in mesh.shape if count > 1]
    parts = {math.prod(some) for n in range(1, len(dims) + 1) for some in itertools.combinations(dims, n)}
    return all(count % part == 0 for count in counts for part in parts if part <= count)
