"""Differential attention on the CPU: both maps of every head in one call, against two calls and against a single map.

    python -m benchmarks.bench_differential               # 256 to 4k tokens, on one thread; about 8 minutes
    python -m benchmarks.bench_differential --quick
    python -m benchmarks.bench_differential --document RESULT.json      # the table of docs/differential.md

Four heads of two maps in float32, without the projections, in processor time. "fused" is what `diffmax.nn.DiffAttention` does;
"two calls" does the first maps in one call and the second maps in another, as timm does; "one map" is the first call alone:
attention with as many heads and half the maps. Outputs and gradients are checked against the module's weights in float64.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax
from benchmarks import harness
from benchmarks.bench_attention import difference, outcome, step
from benchmarks.harness import Call, Row
from benchmarks.report import target, targets_block
from diffmax.nn import DiffAttention

HEADS, ALPHA, FACTOR, CHECKED, ROUNDS = 4, 0.5, 0.4, 256, 9
LENGTHS = (256, 1024, 4096)
BASES = ("two calls", "one map")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--document"]:
        print(document(json.loads(Path(arguments[1]).read_text())["rows"]))
        return

    def show(rows: list[Row]) -> str:
        return table(rows) + "\n" + targets_block(targets(rows))

    harness.run("bench_differential", __doc__, arguments, cells, run_case, ROUNDS, show)


def cells(quick: bool) -> list[Row]:
    lengths = (128,) if quick else LENGTHS
    axes: dict[str, Any] = {"weights": ("diffmax", "softmax"), "size": (32, 64), "operation": ("forward", "both")}
    return harness.grid(**axes, length=lengths, threads=(1,))


def inputs(case: Row, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query and key (1, 2 H, length, size), with scores of deviation 2, and value (1, H, length, 2 size)."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 2 * HEADS, length, case["size"], generator=generator).unbind()
    return 2 * query, key, torch.randn(1, HEADS, length, 2 * case["size"], generator=generator)


def contestants(case: Row) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    call: Any = scaled_dot_product_attention
    if case["weights"] == "diffmax":
        call = functools.partial(diffmax.attention, alpha=ALPHA)

    def two(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first, second = (call(query[:, i::2], key[:, i::2], value) for i in (0, 1))
        out: Tensor = first - FACTOR * second
        return out

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = call(query[:, 0::2], key[:, 0::2], value)
        return out

    return {"fused": differential(case, fused=True), "two calls": two, "one map": one}


def differential(case: Row, fused: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What the module does between its projections."""
    alpha = {"alpha": ALPHA} if case["weights"] == "diffmax" else {}
    module = DiffAttention(2 * HEADS * case["size"], HEADS, weights=case["weights"], fused=fused, **alpha)
    factor = torch.tensor(FACTOR)
    return lambda query, key, value: module._difference(query, key, value, factor, None, False, 0.0)


def run_case(case: Row, rounds: int) -> list[Row]:
    """One row per contestant; who fails its check, or raises, is not timed and keeps the reason."""
    rows = {name: {"contestant": name, **case} for name in contestants(case)}
    return harness.measure(rows, lambda name: prepare(name, case), rounds, BASES)


def prepare(name: str, case: Row) -> tuple[Row, Call]:
    function = contestants(case)[name]
    exact = contestants(case)["one map"] if name == "one map" else differential(case, fused=False)
    checked = inputs(case, min(case["length"], CHECKED), seed=1)
    reason = difference(*(outcome(f, checked, dtype) for f, dtype in ((function, torch.float32), (exact, torch.float64))))
    return {"reason": reason}, step(function, inputs(case, case["length"]), case["operation"])


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """The goals that these rows can speak about, for diffmax weights: the worst of both sizes and of 1024 tokens and more."""
    found = []
    for base, goal in (("two calls", 1.1), ("one map", 2.2)):
        for operation in ("forward", "both"):
            ratios = [
                row[f"ratio_{base}"]
                for row in rows
                if (row["contestant"], row["weights"], row["operation"]) == ("fused", "diffmax", operation)
                and row["length"] >= 1024
                and row["correct"]
            ]
            found.append(target("diffmax", f"{operation}, fused by {base}", "<=", goal, max(ratios) if ratios else None))
    return [goal for goal in found if goal is not None]


def table(rows: list[Row]) -> str:
    title = f"{HEADS} heads of 2 maps, float32, one thread, alpha = {ALPHA}; times two calls' time"
    return harness.table(title, rows, "two calls", tables=("weights",), lines=("operation", "size", "length"))


def document(rows: list[Row]) -> str:
    """A Markdown table of "fused": times two calls' time, and times one map's, forward / forward with backward."""
    columns = (("diffmax", "two calls"), ("diffmax", "one map"), ("softmax", "two calls"))
    heads = [f"{weights} by {base}" for weights, base in columns]
    lines = [f"| map size, tokens | {' | '.join(heads)}, as timm makes them |", "|---" * 4 + "|"]
    held = {(r["weights"], r["size"], r["length"], r["operation"]): r for r in rows if r["contestant"] == "fused"}
    for size, length in sorted({key[1:3] for key in held}):
        figures = [
            " / ".join(_ratio(held[weights, size, length, of][f"ratio_{base}"]) for of in ("forward", "both"))
            for weights, base in columns
        ]
        lines.append(f"| {size}, {length:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _ratio(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio >= 1.8 else f"{ratio:.2f}"


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
