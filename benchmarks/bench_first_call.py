"""`python -m benchmarks.bench_first_call`: what the first call of an operator on a CPU compiles, in seconds of processor time.

Each call is made by a process of its own with an empty cache of kernels, one after the other: as diffmax compiles, and as Numba
does by itself, which is every function that a kernel calls once more alone, with Python's collector of garbage running.
Importing Numba is part of it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.report import target, targets_block

OPERATORS = {
    "rows": "diffmax.diffmax_bisect(scores, 0.7)",
    "attention": "diffmax.attention(query, query, query, alpha=0.7)",
}
CALL = """
import json, os, sys, time, torch, diffmax
torch.set_num_threads(1)
scores, query = torch.randn(4, 100, requires_grad=True), torch.randn(1, 2, 64, 64, requires_grad=True)
start = time.process_time()
if sys.argv[1] == "numba alone":
    import contextlib
    from diffmax.kernels.numba import cache, parts
    # the parts of kernels are made by decorators when their modules are imported, which is later
    parts.KNOWN = (99,), (99,)
    cache._without_collecting = contextlib.nullcontext
result = eval(sys.argv[2])
forward = time.process_time() - start
(result * torch.randn_like(result)).sum().backward()
print(json.dumps({"forward": forward, "backward": time.process_time() - start - forward}))
"""
CONTESTANTS = "diffmax", "numba alone"


def main(arguments: list[str]) -> None:
    options = harness.command_line("bench_first_call", __doc__ or "").parse_args(arguments)
    harness.publish("bench_first_call", arguments, options.output, lambda: found(options.quick), shown)


def found(quick: bool) -> Row:
    """The middle, least and largest time of each operator's first forward and backward."""
    rows = []
    for operator in ["rows"] if quick else OPERATORS:
        runs = [{who: first_call(who, operator) for who in CONTESTANTS} for _ in range(1 if quick else 3)]
        for direction in ("forward", "backward"):
            for who in CONTESTANTS:
                times = [run[who][direction] for run in runs]
                middle, others = statistics.median(times), statistics.median(run["numba alone"][direction] for run in runs)
                figures = {"median_s": middle, "min_s": min(times), "max_s": max(times), "of_numba_alone": middle / others}
                case = {"operator": operator, "direction": direction, "contestant": who, "correct": True}
                rows.append({**case, **{name: round(figure, 3) for name, figure in figures.items()}})
    first = next(row["median_s"] for row in rows if row["contestant"] == "diffmax")
    return {"targets": [target("numba", "first forward of rows, s of processor time", "<=", 4, first)], "rows": rows}


def first_call(contestant: str, operator: str) -> dict[str, float]:
    """Seconds of processor time of the first forward and backward of a process without kernels on disk."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "NUMBA_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CALL, contestant, OPERATORS[operator]]
        done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    times: dict[str, float] = json.loads(done.stdout)
    return times


def shown(result: Row) -> str:
    """A line for each operator and direction, and the goal."""
    lines = [
        f"{row['operator']:>16} {row['direction']:>9} {row['contestant']:>12}  {row['median_s']:6.1f} s"
        f"   {row['min_s']:.1f} to {row['max_s']:.1f}   {row['of_numba_alone']:.2f}"
        for row in result["rows"]
    ]
    return "\n".join([*lines, targets_block(result["targets"])])


if __name__ == "__main__":
    main(sys.argv[1:])
