"""Matrix products of attention's Triton forward, counted on the CPU by following its decisions in float64: a cost model.

`python -m benchmarks.count_products` prints them in units of one dense product of queries and keys. FlashAttention's forward
takes 2. What is counted is tiles of 64 by 64 that are multiplied; what it costs beside the products is not in it.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64
CUT = {"bfloat16": 2e-3, "float16": 5e-4, "float32": 1e-6}
SUM = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 5e-7}
LARGE_K = 5.0


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
    drawn = [scores(name, keys) for _ in range(blocks)]
    inference, training = (
        [sum(column) / blocks for column in zip(*(counts(x, 1 - alpha, dtype, linear) for x in drawn), strict=True)]
        for linear in (False, True)
    )
    return training[1], training[0], inference[0] + 2 * inference[2], training[0] + 3 * training[2]


def scores(name: str, keys: int) -> Tensor:
    """(64, keys): N(0, sigma), or N(0, 2) in the tiles that a share of block sparsity leaves, and far below elsewhere."""
    kind, _, value = name.partition(" ")
    if kind == "randn":
        return torch.randn(TILE, keys, dtype=torch.float64) * float(value)
    x = torch.randn(TILE, keys, dtype=torch.float64) * 2
    empty = torch.rand(keys // TILE) < float(kind) / 100
    empty[-1] = False
    return x - 1e3 * empty.repeat_interleave(TILE)


class Followed(NamedTuple):
    """What the kernels do for a block of queries.

    Attributes:
        start: Products of the sample, and of the dense pass.
        further: Share of the tiles that each further evaluation visits.
        live: Share of the tiles that the output visits.
        passes: How often it does.
        delta, low: Where the first further evaluation is, or the output if there is none, relative to the largest score; and
            what is certain not to exceed the root, (64,).
    """

    start: float
    further: list[float]
    live: float
    passes: int
    delta: Tensor
    low: Tensor


def counts(x: Tensor, e: float, dtype: str, linear: bool) -> tuple[float, float, float]:
    """Of a block of queries: the solver's products, the share of live tiles, and that times the passes that write the output.

    linear: whether U is computed too.
    """
    found = follow(x, e, dtype, linear)
    return found.start + sum(found.further), found.live, found.passes * found.live


def follow(x: Tensor, e: float, dtype: str, linear: bool) -> Followed:
    """The kernels' decisions for the scores of a block of queries, (64, keys) in float64, -inf where masked."""
    n, k = x.shape[1], 1 / e
    m, tops = x.amax(1), x.view(TILE, -1, TILE).amax(2)
    delta, reference, high, sampled = _estimate(x, e)
    sums = _sums(e * (x - reference[:, None]), delta, k)
    delta = delta - e * (m - reference)
    further: list[float] = []
    low = torch.zeros_like(delta)
    while True:
        known = sums[0] > 0
        ready = known & _promises(*sums, delta.clamp_min(0), k, dtype, linear)
        moved, low = _next(delta, low, high, *sums, e)
        delta = torch.where(known, moved, 0.0)
        if not further:
            first = delta, torch.where(known, low, 0.0)
        alive = (e * (tops - m[:, None]) > delta[:, None] - 1).any(0).double().mean().item()
        sums = _sums(e * (x - m[:, None]), delta, k)
        if bool(ready.all()) or len(further) > 30:
            passes = 1 if bool(_good_enough(*sums, delta, k, dtype, linear).all()) else 2
            return Followed(1.0 + sampled * TILE / n, further, alive, passes, *first)
        further.append(alive)


def _estimate(x: Tensor, e: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """delta relative to the largest score of a sample, that score, the largest delta, and how many tiles were multiplied."""
    n, k = x.shape[1], 1 / e
    high = torch.full((TILE,), -math.expm1(-e * math.log(n)), dtype=torch.float64)
    sample = x[:, _spread(n, 1)]
    reference = sample.amax(1)
    delta = _root_of_sample(e * (sample - reference[:, None]), n / TILE, high, e)
    tiles = min(n // TILE // 16, 8) if e * LARGE_K <= 1 else 0
    if tiles <= 1:
        return delta, reference, high, 1
    sums = (t * n / (TILE * tiles) for t in _sums(e * (x[:, _spread(n, tiles)] - reference[:, None]), delta, k))
    moved, _ = _next(delta, torch.full_like(delta, -math.inf), high, *sums, e)
    return torch.where(moved.isfinite(), moved, delta), reference, high, 1 + tiles


def _spread(n: int, tiles: int) -> Tensor:
    return (2 * torch.arange(TILE * tiles) + 1) * n // (2 * TILE * tiles)


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


def _promises(total: Tensor, slope: Tensor, curve: Tensor, delta: Tensor, k: float, dtype: str, linear: bool) -> Tensor:
    """`steps.promises`."""
    c, h = ((total - 1) / slope).abs(), total.clamp_min(1e-300).log().abs()
    spread = (curve * total / slope.square() - 1).clamp_min(0)
    missing, near = h**3 * spread / k, c <= 0.25 * (1 - delta)
    if k >= LARGE_K:
        missing, near = missing / 3, h <= 1.5
    else:
        missing = torch.where(total >= 1, missing, h * h * (spread + 0.02) * h.clamp_max(1))
    cut = CUT[dtype]
    if linear:
        fine = (missing <= cut * (1 - delta) * slope) & (missing <= 2 * cut)
        return near & (fine if k >= 2 else c <= cut * cut + 2.0**-24)
    return near & ((missing if k >= 2 else h) <= 0.5 * SUM[dtype])


def _good_enough(total: Tensor, slope: Tensor, curve: Tensor, delta: Tensor, k: float, dtype: str, linear: bool) -> Tensor:
    """`steps.good_enough`."""
    c, cut = ((total - 1) / slope).abs(), CUT[dtype]
    if not linear:
        return (total - 1).abs() <= SUM[dtype]
    return (c <= cut * (1 - delta)) & ((total - 1).abs() <= 2 * cut) if k >= 2 else c <= 2 * cut * cut + 2.0**-23


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
