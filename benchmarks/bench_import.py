"""`python -m benchmarks.bench_import`: what diffmax costs before it computes anything.

- Import: a fresh process imports torch, then times `import diffmax`. The first such process is not counted: it may have to
  write byte code. Also noted: which modules it pulls in that it must not (triton, numba).
- Overhead: one call on a CPU tensor of 8 elements, beside the least that an operator of torch.library costs: one that is
  defined here with Library.define and Library.impl and returns a clone. The difference holds the argument checks, the
  choice of a kernel and its work. Calls are timed in batches that take turns, in processor time. A second figure, which no
  goal speaks of, is the ratio to an operator with the schema of torch.ops.diffmax.bisect, which returns three clones.
- Choice: what looking up the backend adds to a call, of that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diffmax
from benchmarks.environment import environment, result_path
from benchmarks.report import targets_block
from benchmarks.timing import CLOCKS, summarize
from diffmax.machine.dispatch import kernel

# torch's import leaves the garbage collector about to look through all of torch's objects: 80 ms in whatever is imported next.
IMPORT = """
import gc, time, torch
gc.collect()
start = time.perf_counter()
import diffmax
seconds = time.perf_counter() - start
import json, sys
print(json.dumps({"seconds": seconds, "heavy": [name for name in ("triton", "numba") if name in sys.modules]}))
"""


SCHEMA = (
    "bare_schema(Tensor x, float e, Tensor? e_tensor, int dim, int n_iter, bool ensure_sum_one, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_import", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, to see that everything runs")
    parser.add_argument("--output", help="result file (default: benchmarks/results/<device>/<date>-<commit>-import.json)")
    options = parser.parse_args(arguments)
    env = environment("bench_import", arguments)
    imported = time_import(1 if options.quick else 11)
    called = time_calls(batches=3 if options.quick else 25, calls=20 if options.quick else 200)
    milliseconds = 1e3 * imported["median_s"]
    overhead, of_schema = (
        called["diffmax"]["median_s"] / called[name]["median_s"] for name in ("bare_operator", "bare_schema")
    )
    found = [
        _target("import diffmax beyond import torch, ms", 50, milliseconds),
        _target("times a bare operator, 8 elements, alpha=0.85", 2, overhead),
        _target("choosing the backend, us per call", 2, 1e6 * called["choice"]["median_s"]),
    ]
    path = Path(options.output) if options.output else result_path("bench_import", env)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": env,
        "import": imported,
        "calls": called,
        "times_bare_schema": round(of_schema, 2),
        "targets": found,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in called.items():
        print(f"{name:>14}  {1e6 * row['median_s']:8.1f} us   p20 {1e6 * row['p20_s']:.1f}   p80 {1e6 * row['p80_s']:.1f}")
    print(f"{'import':>14}  {milliseconds:8.1f} ms   beyond torch; heavy modules: {', '.join(imported['heavy']) or 'none'}")
    print(f"times a bare operator of the same schema, with three results: {of_schema:.2f}")
    print(targets_block(found))


def time_import(repeats: int) -> dict[str, Any]:
    # what pip installs is compiled; here the first run does it, which is not counted
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", IMPORT]
    runs = [json.loads(subprocess.check_output(command, text=True, env=environ)) for _ in range(repeats + 1)]
    return {**summarize([run["seconds"] for run in runs[1:]]), "heavy": runs[0]["heavy"]}


def time_calls(batches: int, calls: int) -> dict[str, dict[str, float | int]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.library._scoped_library("diffmax_bench", "DEF") as library, torch.no_grad():
        library.define("bare(Tensor x) -> Tensor")
        library.impl("bare", lambda x: x.clone(), "CPU")
        library.define(SCHEMA)
        library.impl("bare_schema", lambda x, *rest: (x.clone(), x.clone(), x.clone()), "CPU")
        x = torch.randn(8, generator=torch.Generator().manual_seed(0))
        bodies: dict[str, Callable[[], object]] = {
            "bare_operator": lambda: torch.ops.diffmax_bench.bare(x),
            "bare_schema": lambda: torch.ops.diffmax_bench.bare_schema(x, 0.15, None, 0, 50, True, ""),
            "softmax": lambda: torch.softmax(x, -1),
            "diffmax": lambda: diffmax.diffmax_bisect(x, 0.85),
            "choice": lambda: kernel("bisect", x, "", tensor_alpha=False),
        }
        samples: dict[str, list[float]] = {name: [] for name in bodies}
        for _ in range(batches + 1):
            for name, body in bodies.items():
                samples[name].append(timeit.timeit(body, timer=CLOCKS["cpu"], number=calls) / calls)
    torch.set_num_threads(threads)
    return {name: summarize(values[1:]) for name, values in samples.items()}  # the first batch warms up


def _target(what: str, goal: float, value: float) -> dict[str, Any]:
    return {"kernel": "package", "what": what, "sign": "<=", "goal": goal, "value": round(value, 2), "met": value <= goal}


if __name__ == "__main__":
    main(sys.argv[1:])
