"""`python -m benchmarks.bench_import`: what diffmax costs before it computes anything.

- Import: a fresh process imports torch, then times `import diffmax`. The first such process is not counted: it may have to
  write byte code. Also noted: the processor time, which says more where others use the cores, and which modules it pulls in
  that it must not (triton, numba).
- Overhead: one call on a CPU tensor of 8 elements, beside the least that an operator of torch.library costs: one that is
  defined here with Library.define and Library.impl and returns a clone. The difference holds the argument checks, the
  choice of a kernel and its work. Calls are timed in batches that take turns, in processor time. A second figure, which no
  goal speaks of, is the ratio to an operator with the schema of torch.ops.diffmax.bisect, which returns three clones.
- Choice: what looking up the backend adds to a call, of that.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable

import torch

import diffmax
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.report import target, targets_block
from benchmarks.timing import CLOCKS, summarize
from diffmax.machine.dispatch import kernel

# torch's import leaves the garbage collector about to look through all of torch's objects: 80 ms in whatever is imported next.
IMPORT = """
import gc, time, torch
gc.collect()
start, processor = time.perf_counter(), time.process_time()
import diffmax
seconds, processor = time.perf_counter() - start, time.process_time() - processor
import json, sys
heavy = [name for name in ("triton", "numba") if name in sys.modules]
print(json.dumps({"seconds": seconds, "processor": processor, "heavy": heavy}))
"""


SCHEMA = (
    "bare_schema(Tensor x, float e, Tensor? e_tensor, int dim, int n_iter, bool ensure_sum_one, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


def main(arguments: list[str]) -> None:
    options = harness.command_line("bench_import", __doc__ or "").parse_args(arguments)
    harness.publish("bench_import", arguments, options.output, lambda: found(options.quick), shown)


def found(quick: bool) -> Row:
    imported = time_import(1 if quick else 11)
    called = time_calls(batches=3 if quick else 25, calls=20 if quick else 200)
    seconds = {name: row["median_s"] for name, row in called.items()}
    targets = [
        target("package", "import diffmax beyond import torch, ms", "<=", 50, 1e3 * imported["median_s"]),
        target(
            "package", "times a bare operator, 8 elements, alpha=0.85", "<=", 2, seconds["diffmax"] / seconds["bare_operator"]
        ),
        target("package", "choosing the backend, us per call", "<=", 2, 1e6 * seconds["choice"]),
    ]
    of_schema = round(seconds["diffmax"] / seconds["bare_schema"], 2)
    return {"import": imported, "calls": called, "times_bare_schema": of_schema, "targets": targets}


def shown(result: Row) -> str:
    def line(name: str, row: Row, scale: float, unit: str) -> str:
        low, middle, high = (scale * row[key] for key in ("p20_s", "median_s", "p80_s"))
        return f"{name:>14}  {middle:8.1f} {unit}   p20 {low:.1f}   p80 {high:.1f}"

    heavy = ", ".join(result["import"]["heavy"]) or "none"
    lines = [line(name, row, 1e6, "us") for name, row in result["calls"].items()]
    processor = f"{1e3 * result['import']['processor_s']:.1f} ms of the processor"
    lines.append(f"{line('import', result['import'], 1e3, 'ms')}   beyond torch; {processor}; heavy modules: {heavy}")
    lines.append(f"times a bare operator of the same schema, with three results: {result['times_bare_schema']:.2f}")
    return "\n".join([*lines, targets_block(result["targets"])])


def time_import(repeats: int) -> Row:
    # what pip installs is compiled; here the first run does it, which is not counted
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", IMPORT]
    runs = [json.loads(subprocess.check_output(command, text=True, env=environ)) for _ in range(repeats + 1)]
    processor = statistics.median(run["processor"] for run in runs[1:])
    return {**summarize([run["seconds"] for run in runs[1:]]), "processor_s": processor, "heavy": runs[0]["heavy"]}


def time_calls(batches: int, calls: int) -> dict[str, dict[str, float | int]]:
    with harness.threads(1), torch.library._scoped_library("diffmax_bench", "DEF") as library, torch.no_grad():
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
    return {name: summarize(values[1:]) for name, values in samples.items()}  # the first batch warms up


if __name__ == "__main__":
    main(sys.argv[1:])
