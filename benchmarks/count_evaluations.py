"""How often the GPU solver evaluates S per row, counted on the CPU in float64: `docs/performance.md` quotes it.

    python -m benchmarks.count_evaluations

It repeats the solver of diffmax/kernels/triton/common/numerics.py in plain PyTorch, to count what a kernel does not report.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHAS = (0.1, 0.5, 0.75, 0.85, 0.95, 0.99)
SIGMAS = (0.3, 1.0, 3.0, 10.0)
START_CUT, HALLEY_STEPS, LARGEST_HALLEY_K = -0.35, 8, 512


def sums(z: Tensor, delta: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor]:
    """S, S_1 and the sum of [z - t]^(k-2)."""
    b = (z - delta[:, None] + 1).clamp_min(0)
    r = torch.where(b > 0, b.pow(k - 2), 0.0)
    return (r * b * b).sum(1), (r * b).sum(1), r.sum(1)


def evaluations(x: Tensor, alpha: float, cut: float) -> Tensor:
    """Per row."""
    e, k, n = 1 - alpha, 1 / (1 - alpha), x.shape[1]
    z = e * (x - x.amax(1, keepdim=True))
    near = z > START_CUT
    count = near.sum(1).double()
    high = 1 - n**-e
    delta = ((z * near).sum(1) / count + 1 - count.pow(-e)).clamp(0, high)
    low, done = delta.clone(), torch.zeros(len(x), dtype=torch.bool)
    number = torch.zeros(len(x))
    for step in range(60):
        total, slope, curve = sums(z, delta, k)
        number += ~done
        c = (total - 1) / slope
        if k >= 2:
            far = (c.abs() > cut * (1 - delta)) | (c * c * curve > 2 * cut**2) | ((c < 0) & (n * (e * c) ** 2 > 2 * cut**2))
        else:
            far = c.abs() > 2 * cut**2
        done |= ~far
        if done.all():
            break
        excess = torch.expm1(-e * total.log())
        newton = -total * excess / slope
        low = torch.maximum(low, torch.where(done, low, delta + newton))
        bend = (-0.5 * (k - 1) * excess * (curve * total / slope**2 - 1)).clamp(-0.5, 0.5)
        bend = bend if 2 <= k <= LARGEST_HALLEY_K and step < HALLEY_STEPS else torch.zeros_like(bend)
        moved = torch.maximum(delta + newton / (1 - bend), low).clamp_max(high)
        delta = torch.where(done, delta, moved)
    return number


if __name__ == "__main__":
    torch.manual_seed(0)
    names = " | ".join(f"sigma = {sigma:g}" for sigma in SIGMAS)
    print(f"| alpha | {names} | 16 bits: {names} |")
    print("|---" * (1 + 2 * len(SIGMAS)) + "|")
    rows = {sigma: torch.randn(64, 1024).double() * sigma for sigma in SIGMAS}
    for alpha in ALPHAS:
        counts = [evaluations(rows[sigma], alpha, cut).mean() for cut in (2.4e-4, 2e-3) for sigma in SIGMAS]
        print(f"| {alpha} | " + " | ".join(f"{count:.1f}" for count in counts) + " |")
