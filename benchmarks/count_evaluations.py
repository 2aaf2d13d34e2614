"""How many steps the GPU solver of rows takes, counted on the CPU in float64: `docs/performance.md` quotes it.

    python -m benchmarks.count_evaluations

It repeats the decisions of diffmax/kernels/triton/rows/forward.py in plain PyTorch, to count what a kernel does not report. A
row is evaluated once before the first step that is counted (for 16 bits and k = 2 twice), and once in each step. Float32
powers that are not multiplied take early steps with the hardware's logarithm, and at least one exact step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALPHAS = (0.1, 0.5, 0.75, 0.85, 0.9, 0.95, 0.99)
SIGMAS = (0.3, 1.0, 3.0, 10.0)
START_CUT, HALLEY_STEPS, EARLY_STEPS, CUT, FAR = -0.35, 8, 3, 2.4e-4, 4e-3
INTEGER_EXPONENTS = (2, 3, 4, 5, 10)

Sums = tuple[Tensor, Tensor, Tensor]


class Row:
    """The iterates of rows (rows, n) at one alpha: `delta`, `low`, and the sums at `delta`."""

    def __init__(self, x: Tensor, alpha: float) -> None:
        self.e, self.n = 1 - alpha, x.shape[1]
        self.k = 1 / self.e
        self.whole = round(self.k) if min(abs(self.k - k) for k in INTEGER_EXPONENTS) < 1e-9 else 0
        self.z = self.e * (x - x.amax(1, keepdim=True))
        self.high = torch.full((len(x),), 1 - self.n**-self.e, dtype=torch.float64)
        near = self.z > START_CUT
        count = near.sum(1).double()
        self.delta = ((self.z * near).sum(1) / count + 1 - count.pow(-self.e)).clamp_min(0).minimum(self.high)
        if self.whole == 2:
            self.delta = torch.full_like(self.high, 0.5)
        self.low = torch.zeros_like(self.high) if self.whole == 2 else self.delta.clone()
        self.sums = self.evaluate()

    def evaluate(self) -> Sums:
        """S, S_1 and the sum of [z - t]^(k-2)."""
        b = (self.z - self.delta[:, None] + 1).clamp_min(0)
        r = torch.where(b > 0, b.pow(self.k - 2), 0.0)
        return (r * b * b).sum(1), (r * b).sum(1), r.sum(1)

    def step(self, chosen: Tensor, number: int = 0) -> None:
        """`next_delta` for the chosen rows, and an evaluation."""
        total, slope, curve = self.sums
        excess = torch.expm1(-self.e * total.log())
        newton = -total * excess / slope
        bends = 2 <= self.k <= 512 and number < HALLEY_STEPS
        bend = (-0.5 * (self.k - 1) * excess * (curve * total / slope**2 - 1)).clamp(-0.5, 0.5) * bends
        longer = newton / (1 - bend)
        if self.whole == 2:
            square = slope**2 - curve * (total - 1)
            longer = torch.where((square > 0) & bends, (total - 1) / (slope + square.clamp_min(0).sqrt()), longer)
        self.low = torch.where(chosen, torch.maximum(self.low, self.delta + newton), self.low)
        moved = torch.maximum(self.delta + longer, self.low).minimum(self.high)
        self.delta = torch.where(chosen, moved, self.delta)
        self.sums = self.evaluate()

    def unsolved(self) -> Tensor:
        """`is_unsolved`."""
        total, slope, curve = self.sums
        c = (total - 1) / slope
        if self.k < 2:
            return (c.abs() > 2 * CUT**2) | (c * c * curve > 2 * CUT**2)
        far = (c.abs() > CUT * (1 - self.delta)) | (c * c * curve > 2 * CUT**2)
        return far | ((c < 0) & (self.n * (self.e * c) ** 2 > 2 * CUT**2))

    def ends_far(self) -> Tensor:
        """`ends_far`."""
        total, slope, curve = self.sums
        h = (total - 1).abs()
        left = h * h * (curve * total / slope**2 - 1)
        return (left * h * self.e if self.k >= 2 else left) > CUT

    def is_far(self) -> Tensor:
        """`is_far`, of bfloat16."""
        total, slope, _ = self.sums
        c = (total - 1) / slope
        if self.k < 2:
            return c.abs() > 8e-6
        return ((total - 1).abs() > FAR) | ((c < 0) & (self.n * (self.e * c) ** 2 > FAR**2))

    def steps_while(self, wanted: Callable[[], Tensor], most: int = 60) -> Tensor:
        """Step the rows that are wanted until none is: how many steps each took."""
        number = torch.zeros(len(self.z))
        going = wanted()
        for taken in range(most):
            if not going.any():
                break
            number += going
            self.step(going, taken)
            going = going & wanted()
        return number


def steps(x: Tensor, alpha: float, sixteen: bool) -> tuple[float, float]:
    """Means over the rows of (rows, n): early steps, and steps."""
    row, everyone = Row(x, alpha), torch.ones(len(x), dtype=torch.bool)
    if sixteen:
        for _ in range(2 if row.whole == 2 else 1):
            row.step(everyone)
        return 0.0, float(row.steps_while(row.is_far).mean())
    if row.whole or row.e < 1 / 64:
        return 0.0, float(row.steps_while(row.unsolved).mean())
    early = row.steps_while(row.ends_far, EARLY_STEPS)
    row.step(everyone)
    return float(early.mean()), 1 + float(row.steps_while(row.unsolved).mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    names = " | ".join(f"sigma = {sigma:g}" for sigma in SIGMAS)
    print(f"| alpha | {names} | 16 bits: {names} |")
    print("|---" * (1 + 2 * len(SIGMAS)) + "|")
    rows = {sigma: torch.randn(64, 1024).double() * sigma for sigma in SIGMAS}
    for alpha in ALPHAS:
        cells = []
        for sixteen in (False, True):
            for sigma in SIGMAS:
                early, exact = steps(rows[sigma], alpha, sixteen)
                cells.append(f"{early:.1f} + {exact:.1f}" if early else f"{exact:.1f}")
        print(f"| {alpha} | " + " | ".join(cells) + " |")
