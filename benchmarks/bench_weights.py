"""`python -m benchmarks.bench_weights`: what `return_weights="sparse"` costs on the CPU, relative to the call without it.

Eight heads on one thread, in processor time. Gaussian queries and keys; sigma is the spread of the scores. "map" is the memory
that dense float32 weights would take. Before the clock the weights times the values are compared with the output.
"""

from __future__ import annotations

import torch

import diffmax
from benchmarks import harness
from benchmarks.harness import Call, Row

HEADS, HEAD_SIZE = 8, 64
SETTINGS = ((1.0, 0.9), (1.0, 0.5), (3.0, 0.5))


def main(arguments: list[str]) -> None:
    harness.run("bench_weights", __doc__, arguments, cells, run_case, 3, table)


def cells(quick: bool) -> list[Row]:
    lengths = (256,) if quick else (2048, 8192)
    return [
        {"length": length, "sigma": sigma, "alpha": alpha, "threads": 1}
        for length in lengths
        for sigma, alpha in SETTINGS
        if (sigma, alpha) != (1.0, 0.9) or length < 8192  # 4 GB of lists: nothing is sparse there
    ]


def run_case(case: Row, rounds: int) -> list[Row]:
    """A row without weights, and one with them."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, case["length"], HEAD_SIZE, generator=generator).unbind()
    query, key = (t * case["sigma"] ** 0.5 for t in (query, key))

    def prepare(name: str) -> tuple[Row, Call]:
        if name == "without":
            return {"reason": None}, lambda: diffmax.attention(query, key, value, alpha=case["alpha"])
        out, weights = diffmax.attention(query, key, value, alpha=case["alpha"], return_weights="sparse")
        head = weights.head(0, 0)
        sums = torch.zeros_like(value[0, 0]).index_add_(0, head.rows(), head.values.unsqueeze(1) * value[0, 0][head.indices])
        error = float((sums - out[0, 0]).abs().max())
        found = {
            "support_mean": float(weights.supports().double().mean()),
            "lists_bytes": sum(t.numel() * t.element_size() for t in weights[:3]),
            "map_bytes": 4 * HEADS * case["length"] ** 2,
            "reason": None if error < 1e-4 else f"weights times values differ from the output by {error:.1e}",
        }
        return found, lambda: diffmax.attention(query, key, value, alpha=case["alpha"], return_weights="sparse")

    return harness.measure({name: {"weights": name, **case} for name in ("without", "with")}, prepare, rounds, ("without",))


def table(rows: list[Row]) -> str:
    lines = [f"{HEADS} heads of size {HEAD_SIZE}, float32, one thread", ""]
    lines += ["| length | sigma | alpha | keys read | time | peak memory | lists | map |", "|---|---|---|---|---|---|---|---|"]
    for without, found in zip(rows[::2], rows[1::2], strict=True):
        if not (without["correct"] and found["correct"]):
            lines.append(
                f"| {found['length']} | {found['sigma']} | {found['alpha']} | {found['reason'] or without['reason']} |"
            )
            continue
        ratio = found["median_s"] / without["median_s"]
        sizes = (f"{found[name] / 2**20:.1f} MB" for name in ("peak_bytes", "lists_bytes", "map_bytes"))
        cells = (found["length"], found["sigma"], found["alpha"], f"{found['support_mean']:.1f}", f"{ratio:.1f} times", *sizes)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
