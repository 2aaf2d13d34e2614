"""Matrix products of attention's Triton forward, counted on the CPU by following its decisions in float64: a cost model.

`python -m benchmarks.count_products` prints them in units of one dense product of queries and keys. FlashAttention's forward
takes 2. What is counted is tiles of 64 by 64 that are multiplied; what it costs beside the products is not in it.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor

TILE = 64
CUT = {"bfloat16": 2e-3, "float16": 5e-4, "float32": 1e-6}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.count_products", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of 64 queries per row of the table")
    options = parser.parse_args(arguments)
    print(f"{'alpha':>5} {'scores':>14} {'dtype':>8} {'live':>5} {'solver':>6} {'inference':>9} {'training':>8}")
    for alpha in (0.5, 0.85, 0.9):
        for name in ("randn 1", "randn 3", "randn 8", "0 %", "51 %", "70 %", "85 %"):
            for dtype in ("bfloat16", "float32"):
                found = mean_counts(name, alpha, dtype, options.keys, options.blocks)
                print(f"{alpha:5} {name:>14} {dtype:>8} {found[0]:5.2f} {found[1]:6.2f} {found[2]:9.2f} {found[3]:8.2f}")
    return 0


def mean_counts(name: str, alpha: float, dtype: str, keys: int, blocks: int) -> tuple[float, ...]:
    """Means over blocks of queries: share of live tiles, the solver's products, and all of inference's and of training's."""
    torch.manual_seed(0)
    rows = [counts(scores(name, keys), 1 - alpha, CUT[dtype]) for _ in range(blocks)]
    live, solver, solver_keeping = (sum(column) / blocks for column in zip(*rows, strict=True))
    return live, solver_keeping, solver + 2 * live, solver_keeping + 3 * live


def scores(name: str, keys: int) -> Tensor:
    """(64, keys): N(0, sigma), or N(0, 2) in the tiles that a share of block sparsity leaves, and far below elsewhere."""
    kind, _, value = name.partition(" ")
    if kind == "randn":
        return torch.randn(TILE, keys, dtype=torch.float64) * float(value)
    x = torch.randn(TILE, keys, dtype=torch.float64) * 2
    empty = torch.rand(keys // TILE) < float(kind) / 100
    empty[-1] = False
    return x - 1e3 * empty.repeat_interleave(TILE)


def counts(x: Tensor, e: float, cut: float) -> tuple[float, float, float]:
    """Of one block of queries: the share of live tiles, and the solver's products where U is not computed and where it is."""
    solved = [_solver(x, e, cut, linear) for linear in (False, True)]
    return solved[0][1], solved[0][0], solved[1][0]


def _solver(x: Tensor, e: float, cut: float, linear: bool) -> tuple[float, float]:
    n, k = x.shape[1], 1 / e
    high = torch.full((TILE,), -math.expm1(-e * math.log(n)), dtype=torch.float64)
    sample = x[:, (2 * torch.arange(TILE) + 1) * n // (2 * TILE)]
    reference, m = sample.amax(1), x.amax(1)
    tops = x.view(TILE, -1, TILE).amax(2)
    delta = _root_of_sample(e * (sample - reference[:, None]), n / TILE, high, e)
    sums = _sums(e * (x - reference[:, None]), delta, k)
    delta = delta - e * (m - reference)
    products, steps = 1.0, 0
    low = torch.zeros_like(delta)
    while True:
        known = sums[0] > 0
        ready = known & _promises(*sums, delta.clamp_min(0), k, cut, linear)
        moved, low = _next(delta, low, high, *sums, e)
        delta = torch.where(known, moved, 0.0)
        alive = (e * (tops - m[:, None]) > delta[:, None] - 1).any(0).double().mean().item()
        if bool(ready.all()) or steps > 30:
            return products, alive
        products += alive
        steps += 1
        sums = _sums(e * (x - m[:, None]), delta, k)


def _root_of_sample(z: Tensor, share: float, high: Tensor, e: float) -> Tensor:
    near = z > -0.35
    count = near.sum(1).clamp_min(1) * share
    mean = torch.where(near, z, 0.0).sum(1) / near.sum(1).clamp_min(1)
    delta = (mean - torch.expm1(-e * count.log())).clamp_min(0).minimum(high)
    low = torch.zeros_like(delta)
    for _ in range(2):
        total, slope, curve = (t * share for t in _sums(z, delta, 1 / e))
        moved, low = _next(delta, low, high, total, slope, curve, e)
        delta = torch.where(total > 0, moved, delta)
    return delta


def _sums(z: Tensor, delta: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor]:
    b = (z - delta[:, None] + 1).clamp_min(0)
    return (b**k).sum(1), torch.where(b > 0, b ** (k - 1), 0.0).sum(1), torch.where(b > 0, b ** (k - 2), 0.0).sum(1)


def _next(
    delta: Tensor, low: Tensor, high: Tensor, total: Tensor, slope: Tensor, curve: Tensor, e: float
) -> tuple[Tensor, Tensor]:
    excess = torch.expm1(-e * total.log())
    newton = -total * excess / slope
    low = torch.maximum(low, delta + newton)
    bend = (-0.5 * (1 / e - 1) * excess * (curve * total / slope.square() - 1)).clamp(-0.5, 0.5) if e <= 0.5 else 0.0
    return torch.minimum(torch.maximum(delta + newton / (1 - bend), low), high), low


def _promises(total: Tensor, slope: Tensor, curve: Tensor, delta: Tensor, k: float, cut: float, linear: bool) -> Tensor:
    """`attention_steps.promises`."""
    c, h = ((total - 1) / slope).abs(), total.clamp_min(1e-300).log().abs()
    spread = (curve * total / slope.square() - 1).clamp_min(0)
    missing = h * h * (spread + 0.02) * h.clamp_max(1)
    if linear:
        left = missing / slope
        fine = (left <= 0.5 * cut * (1 - delta)) & (left * left * curve <= cut * cut)
        fine = fine if k >= 2 else c <= cut * cut + 2.0**-24
    else:
        fine = (missing if k >= 2 else h) <= 0.25 * cut
    return fine & (c <= 0.25 * (1 - delta))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
