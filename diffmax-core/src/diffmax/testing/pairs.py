"""Cases chosen by pairs: most faults need one choice or two, and a product of all choices repeats each pair many times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def every_pair(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value per factor in which each value meets each value of every other factor: a covering array.

    Greedy, and the same each time. docs/decisions/0082-cases-by-pairs.md.

    Args:
        factors: Two or more, none of them empty.
    Returns:
        At least as many rows as the two longest factors have pairs, and seldom many more.
    Example:
        >>> every_pair("ab", (1, 2), "xy")
        [('a', 1, 'x'), ('a', 2, 'y'), ('b', 1, 'y'), ('b', 2, 'x')]
    """
    levels = [[(factor, level) for level in range(len(values))] for factor, values in enumerate(factors)]
    missing = dict.fromkeys(pair for one, other in combinations(levels, 2) for pair in product(one, other))
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for factor in sorted({*range(len(factors))} - {*row}):
            row[factor] = max(levels[factor], key=lambda it: sum(_pair(it, other) in missing for other in row.items()))[1]
        for pair in combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(values[row[factor]] for factor, values in enumerate(factors)))
    return rows


def _pair(one: tuple[int, int], other: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (one, other) if one < other else (other, one)
