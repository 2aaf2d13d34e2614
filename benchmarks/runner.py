"""One runner for the row operator's benchmarks: check, time, measure memory, write the JSON, print the table."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.check import check
from benchmarks.contestants import Contestant, contestants
from benchmarks.environment import environment, result_path, without_paths
from benchmarks.memory import peak_bytes
from benchmarks.report import table, targets, targets_block
from benchmarks.shapes import Case, cases, takes_part
from benchmarks.timing import interleave, summarize

ROUNDS = {"default": 7, "full": 7, "quick": 3}

# What a contestant can fail with and still leave the others measurable: no C++ compiler, too little memory, a wrong argument.
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, OSError, ArithmeticError, NotImplementedError, AssertionError)


def main(bench: str, operations: tuple[str, ...], description: str, arguments: list[str]) -> None:
    options = _parse(bench, description, arguments)
    grid = "full" if options.full else "quick" if options.quick else "default"
    field = [c for c in contestants() if options.only is None or c.name in options.only]
    started = time.perf_counter()
    env = environment(bench, arguments)
    threads = options.threads or ([1] if options.quick else [1, 2])
    rows = run(list(cases(operations, grid, tuple(threads))), field, grid)
    env["seconds"] = round(time.perf_counter() - started)

    result = {"environment": env, "rows": rows, "targets": [] if options.quick else targets(rows, env["kernels"])}
    path = Path(options.output) if options.output else result_path(bench, env)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_dump(result))
    print(table(rows))
    print(targets_block(result["targets"]))
    print(f"\n{len(rows)} rows, {sum(not row['correct'] for row in rows)} of them not correct; {env['seconds']} s; {path.name}")


def run(todo: list[Case], field: list[Contestant], grid: str) -> list[dict[str, Any]]:
    """The rows of all cells; torch's number of threads is put back afterwards."""
    rows = []
    threads = torch.get_num_threads()
    try:
        for case in (bar := tqdm(todo, unit="cell")):
            bar.set_description(case.label())
            rows += run_case(case, [c for c in field if takes_part(c.name, case, grid)], ROUNDS[grid])
    finally:
        torch.set_num_threads(threads)
    return rows


def run_case(case: Case, field: list[Contestant], rounds: int) -> list[dict[str, Any]]:
    """One row per contestant. Who fails the check, or raises, is not timed and keeps the reason."""
    torch.set_num_threads(case.threads)
    x, grad = case.scores()
    rows, calls = {}, {}
    for contestant in field:
        row: dict[str, Any] = {"contestant": contestant.name, **vars(case), "correct": False, "reason": None}
        rows[contestant.name] = row
        try:
            call, p, grad_x = _prepare(case, contestant, x, grad)
            verdict = check(x, grad, p, grad_x, contestant.exact_e(case), contestant.ours)
            row |= {"correct": verdict.correct, "reason": verdict.reason, "error_ulp": verdict.error, "zeros": verdict.zeros}
            if verdict.correct:
                row["peak_bytes"] = peak_bytes(call)
                calls[contestant.name] = call
        except FAILURES as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            row |= {"correct": False, "reason": without_paths(f"{type(error).__name__}: {first_line}")}
    clock = "cpu" if case.threads == 1 else "wall"
    for name, samples in interleave(calls, rounds, clock).items():
        rows[name] |= {**summarize(samples), "clock": clock}
    for row in rows.values():
        for name in ("softmax", "diffmax"):
            row[f"ratio_{name}"] = _ratio(row, rows.get(name, {}))
    return list(rows.values())


def _prepare(case: Case, contestant: Contestant, x: Tensor, grad: Tensor) -> tuple[Callable[[], object], Tensor, Tensor | None]:
    """What is timed, and the weights and gradient that it computes."""
    function = contestant.build(case)
    if case.operation == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(x)

        return forward, forward(), None

    leaf = x.clone().requires_grad_()
    p = function(leaf)

    def backward() -> Tensor:
        return torch.autograd.grad(p, leaf, grad, retain_graph=True)[0]

    def both() -> Tensor:
        return torch.autograd.grad(function(leaf), leaf, grad)[0]

    call = {"backward": backward, "both": both}[case.operation]
    return call, p.detach(), call()


def _ratio(row: dict[str, Any], base: dict[str, Any]) -> float | None:
    return row["median_s"] / base["median_s"] if "median_s" in row and "median_s" in base else None


def _dump(result: dict[str, Any]) -> str:
    """Indented, but one line per row: a thousand rows stay readable, and a diff says which changed."""
    rows = ",\n".join(f"  {json.dumps(_rounded(row))}" for row in result["rows"])
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Four significant digits; JSON knows no infinity, a failed check may."""
    return {k: (float(f"{v:.4g}") if abs(v) < float("inf") else str(v)) if isinstance(v, float) else v for k, v in row.items()}


def _parse(bench: str, description: str, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{bench}", description=description)
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--full", action="store_true", help="the whole product of sizes, alphas, sigmas, dtypes and contestants")
    grid.add_argument("--quick", action="store_true", help="small tensors, to see that everything runs")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default: 1 2; quick: 1)")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in contestants()], help="contestants (default: all)")
    parser.add_argument("--output", help="result file (default: benchmarks/results/<device>/<date>-<commit>-<bench>.json)")
    return parser.parse_args(arguments)
