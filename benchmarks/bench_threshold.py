"""Threshold and lazy attention on the CPU against torch's attention: compiled and portable kernels, by length.

    python -m benchmarks.bench_threshold               # 2k and 4k tokens, on one thread and on two; about 10 minutes
    python -m benchmarks.bench_threshold --quick
    python -m benchmarks.bench_threshold --document RESULT.json      # the table of docs/lazy.md

Eight heads of size 64 in float32, causal, query, key and value N(0, 1). "sdpa" is `scaled_dot_product_attention`, "compiled"
the backend `numba`, "portable" the backend `cpu`. On one thread in processor time, on two by the wall clock, there of the
members that the goals name. Outputs and gradients are checked against the float64 reference first.
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
from benchmarks.bench_attention import Attention, difference, outcome, step
from benchmarks.harness import Call, Row
from benchmarks.report import target, targets_block

HEADS, SIZE, WIDTH, CHECKED, ROUNDS = 8, 64, 512, 200, 5
LENGTHS = (2048, 4096)
PORTABLE = 2048  # the portable kernels are timed up to this length
GOALS = {"lazy": 1.7, "analytic": 1.7}  # times sdpa's forward
BACKENDS = {"compiled": "numba", "portable": "cpu"}


def main(arguments: list[str]) -> None:
    parser = harness.command_line("bench_threshold", __doc__ or "")
    parser.add_argument("--document", type=Path, metavar="RESULT", help="print the table of a result, and measure nothing")
    options = parser.parse_args(arguments)
    if options.document:
        print(document(json.loads(options.document.read_text())["rows"]))
        return
    rounds = 1 if options.quick else ROUNDS

    def found() -> Row:
        rows = harness.rows_of(cells(options.quick), lambda case: run_case(case, rounds))
        return {"targets": targets(rows), "rows": rows}

    def show(result: Row) -> str:
        return f"{table(result['rows'])}\n{targets_block(result['targets'])}"

    harness.publish("bench_threshold", arguments, options.output, found, show)


def members() -> dict[str, Callable[..., Tensor]]:
    """Functions of query, key and value, and of a backend."""
    bias = torch.zeros(HEADS, WIDTH)
    threshold: Any = diffmax.threshold_attention

    def lazy(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
        return diffmax.lazy_attention(query, key, value, bias.to(query.dtype), -1.0, backend=backend)

    def analytic(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
        out = diffmax.threshold_rectified_attention(query, key, value, 0.5, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return {
        "lazy": lazy,
        "softmax": functools.partial(threshold, threshold=0.0, weights="softmax"),
        "diffmax": functools.partial(threshold, threshold=0.0, weights="diffmax", alpha=0.5),
        "rectified": functools.partial(threshold, threshold=0.0),
        "analytic": analytic,
    }


def cells(quick: bool) -> list[Row]:
    lengths = (256,) if quick else LENGTHS
    axes: dict[str, Any] = {"operation": ("forward", "both"), "length": lengths}
    one = harness.grid(member=tuple(members()), **axes, threads=(1,))
    return one + harness.grid(member=tuple(GOALS), **axes, threads=(2,))


def inputs(length: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, 1, HEADS, length, SIZE, generator=generator).unbind())


def contestants(case: Row) -> dict[str, Attention]:
    names = ("compiled", "portable") if case["length"] <= PORTABLE and case["threads"] == 1 else ("compiled",)
    field: dict[str, Attention] = {"sdpa": lambda *tensors: scaled_dot_product_attention(*tensors, is_causal=True)}
    return field | {name: functools.partial(members()[case["member"]], backend=BACKENDS[name]) for name in names}


def run_case(case: Row, rounds: int) -> list[Row]:
    """One row per contestant; who fails its check, or raises, is not timed and keeps the reason."""
    rows = {name: {"contestant": name, **case} for name in contestants(case)}
    with harness.threads(case["threads"]):
        clock = "cpu" if case["threads"] == 1 else "wall"
        return harness.measure(rows, lambda name: prepare(name, case), rounds, ("sdpa",), clock=clock)


def prepare(name: str, case: Row) -> tuple[Row, Call]:
    function = contestants(case)[name]
    exact = function if name == "sdpa" else functools.partial(members()[case["member"]], backend="reference")
    checked = inputs(min(case["length"], CHECKED), seed=1)
    reason = difference(*(outcome(f, checked, dtype) for f, dtype in ((function, torch.float32), (exact, torch.float64))))
    with torch.no_grad():
        zeros = {} if name == "sdpa" else {"zeros": share_of_zeros(case["member"])}
    return {"reason": reason, **zeros}, step(function, inputs(case["length"]), case["operation"])


@functools.cache
def share_of_zeros(member: str, length: int = 1024) -> float:
    """Of the weights that a query sees, in inputs like those that are timed."""
    query, key, _ = (t[:, :1] for t in inputs(length))
    many = [t.repeat(1, HEADS, 1, 1) for t in (query, key)]
    whole = members()[member](*many, torch.eye(length).expand(1, HEADS, length, length), backend="cpu")
    return float(((whole[0, 0] == 0).sum() - length * (length - 1) / 2) / (length * (length + 1) / 2))


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """The goals that these rows can speak about: the worst of all lengths, on two threads."""
    found = []
    for member, goal in GOALS.items():
        ratios = [
            row["ratio_sdpa"]
            for row in rows
            if (row["contestant"], row["member"], row["operation"], row["threads"]) == ("compiled", member, "forward", 2)
            and row["length"] >= min(LENGTHS)
            and row["correct"]
        ]
        found.append(target("compiled", f"{member}, forward on two threads, by sdpa", "<=", goal, max(ratios, default=None)))
    return [goal for goal in found if goal is not None]


def table(rows: list[Row]) -> str:
    title = f"{HEADS} heads of size {SIZE}, float32, causal; times sdpa's time"
    return harness.table(title, rows, "sdpa", tables=("threads",), lines=("member", "operation", "length"))


def document(rows: list[Row]) -> str:
    """A Markdown table: times sdpa's time, forward / forward with backward."""
    lengths = sorted({row["length"] for row in rows})
    columns = [("compiled", 1, n) for n in lengths] + [("compiled", 2, n) for n in lengths] + [("portable", 1, min(lengths))]
    heads = [f"{who}, {n:,} tokens, {threads} thread{'s' * (threads > 1)}" for who, threads, n in columns]
    lines = ["| member | zeros | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(columns)]
    for member in dict.fromkeys(row["member"] for row in rows):
        zeros = next((row["zeros"] for row in rows if row["member"] == member and "zeros" in row), None)
        figures = [_pair(rows, member, *column) for column in columns]
        lines.append(f"| {member} | {'' if zeros is None else f'{zeros:.0%}'} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _pair(rows: list[Row], member: str, who: str, threads: int, length: int) -> str:
    wanted = (member, who, threads, length)
    found = {
        row["operation"]: row["ratio_sdpa"]
        for row in rows
        if (row["member"], row["contestant"], row["threads"], row["length"]) == wanted and row["correct"]
    }
    return " / ".join(f"{found[of]:.{1 if found[of] >= 1 else 2}f}" for of in ("forward", "both")) if found else "\u2013"


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
