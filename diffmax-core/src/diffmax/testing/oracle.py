"""The operator to any number of digits, by a solver that shares nothing with diffmax's own: bracketing, in mpmath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mpmath


def solve_exactly(row: Sequence[float], alpha: float | mpmath.mpf, digits: int = 40) -> list[mpmath.mpf]:
    """The weights of one row by Eq. 1, correct to about `digits` digits.

    Args:
        row: Finite scores or -inf.
        alpha: In (0, 1).
        digits: Working precision.
    Returns:
        One weight per score.
    Example:
        >>> [round(float(p), 4) for p in solve_exactly([3.0, 2.0, 1.0, 0.0], 0.5)]
        [0.8307, 0.1693, 0.0, 0.0]
    """
    import mpmath  # here, so that the rest of diffmax.testing works without it

    with mpmath.workdps(digits + 10):
        e = 1 - mpmath.mpf(alpha)
        scores = [mpmath.mpf(x) for x in row]
        top = max(scores)
        if top == -mpmath.inf:
            return [mpmath.mpf(0)] * len(scores)
        z = [e * (x - top) for x in scores]

        def weights(t: mpmath.mpf) -> list[mpmath.mpf]:
            return [(v - t) ** (1 / e) if v > t else mpmath.mpf(0) for v in z]

        def excess(t: mpmath.mpf) -> mpmath.mpf:
            return mpmath.fsum(weights(t)) - 1

        low, high = mpmath.mpf(-1), -(mpmath.mpf(len(z)) ** -e)
        root = low if excess(low) == 0 else high if excess(high) == 0 else None
        if root is None:
            root = mpmath.findroot(excess, (low, high), solver="anderson", tol=mpmath.mpf(10) ** (-2 * digits), maxsteps=500)
        return weights(root)
