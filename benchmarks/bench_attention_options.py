"""`python -m benchmarks.bench_attention_options`: what each option of attention costs on the CPU, relative to the plain call.

One head on one thread, in processor time, forward alone and forward with backward; scores as in `bench_attention`. Before the
clock each option's output and gradients are compared with `reference` in float64. Who fails gets no number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import diffmax
from benchmarks.attention_options import ALPHA, OPTIONS, learned
from benchmarks.bench_attention import CHECKED, HEAD_SIZE, ULP, inputs
from benchmarks.environment import environment, result_path, without_paths
from benchmarks.runner import FAILURES
from benchmarks.timing import interleave, summarize
from diffmax.operators.attention import call as building

LENGTH = 2048
KINDS = ("randn", "sharp", "local")
BACKENDS = ("numba", "cpu")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_attention_options", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, to see that everything runs")
    parser.add_argument(
        "--output", help="result file (default: benchmarks/results/<device>/<date>-<commit>-attention-options.json)"
    )
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    env = environment("bench_attention_options", arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cells = itertools.product(BACKENDS, KINDS, ("forward", "both"))
        length, rounds = (256, 1) if options.quick else (LENGTH, 5)
        rows = [row for cell in tqdm(list(cells), unit="cell") for row in run_cell(*cell, length, rounds)]
    finally:
        torch.set_num_threads(threads)
    env["seconds"] = round(time.perf_counter() - started)
    path = Path(options.output) if options.output else result_path("bench_attention_options", env)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{json.dumps({"environment": env}, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    print(table(rows))
    print(f"\n{len(rows)} rows, {sum(not row['correct'] for row in rows)} of them not correct; {env['seconds']} s; {path.name}")


def run_cell(
    backend: str, kind: str, operation: str, length: int, rounds: int, options: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One row per option."""
    rows, calls = {}, {}
    for name, make in (OPTIONS if options is None else options).items():
        where = {"option": name, "backend": backend, "kind": kind, "operation": operation, "length": length, "alpha": ALPHA}
        rows[name] = {**where, "threads": 1, "correct": False, "reason": None}
        try:
            rows[name]["reason"] = reason = fault(backend, kind, make)
            rows[name]["correct"] = reason is None
            if reason is None:
                calls[name] = step(backend, inputs(kind, length), make(length), operation)
        except FAILURES as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            rows[name]["reason"] = without_paths(f"{type(error).__name__}: {first_line}")
    for name, samples in interleave(calls, rounds, "cpu").items():
        rows[name] |= {key: float(f"{value:.4g}") for key, value in summarize(samples).items()}
    for row in rows.values():
        if "median_s" in row and "median_s" in rows["plain"]:
            row["ratio_plain"] = float(f"{row['median_s'] / rows['plain']['median_s']:.4g}")
    return list(rows.values())


def attend(backend: str, tensors: tuple[Tensor, ...], given: dict[str, Any]) -> Tensor:
    out = diffmax.attention(*tensors, **{"alpha": ALPHA, "backend": backend, **given})
    return out[0] if given.get("return_stats") else out


def step(backend: str, tensors: tuple[Tensor, ...], given: dict[str, Any], operation: str) -> Callable[[], object]:
    if operation == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(backend, tensors, given)

        return forward
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    wanted = (*leaves, *learned(given))
    grad = torch.ones_like(leaves[2])
    return lambda: torch.autograd.grad(attend(backend, leaves, given), wanted, grad)


def fault(backend: str, kind: str, make: Callable[[int], dict[str, Any]]) -> str | None:
    """What is wrong with an option's output and gradients, None if nothing is."""
    tensors = inputs(kind, CHECKED, seed=1)
    results = []
    seed = torch.tensor([1, 2])
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = tuple(t.to(dtype).requires_grad_() for t in tensors)
        given = make(CHECKED)
        with mock.patch.object(building, "draw_seed", lambda p, _device: seed if p > 0 else None):
            out = attend(name, leaves, given)
        wanted = (*leaves, *learned(given))
        results.append([out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))])
    for place, (got, truth) in enumerate(zip(*results, strict=True)):
        error = ((got - truth).abs().mean() / truth.abs().max().clamp_min(1.0)).item() / torch.finfo(torch.float32).eps
        if not error <= ULP:
            return f"{'the output' if place == 0 else f'gradient {place}'} errs by {error:.0f} ulp, allowed {ULP}"
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """Per cell: the plain call's time, and every option's as a multiple of it."""
    lines = [f"one head of size {HEAD_SIZE}, float32, alpha {ALPHA}, one thread; times the plain call's time"]
    for cell, group in itertools.groupby(rows, lambda r: (r["backend"], r["kind"], r["operation"], r["length"])):
        shown = []
        for row in group:
            if not row["correct"]:
                shown.append(f"{row['option']} RED: {row['reason']}")
            elif row["option"] == "plain":
                shown.append(f"plain {row['median_s'] * 1e3:.1f} ms")
            else:
                shown.append(f"{row['option']} {row['ratio_plain']:.2f}")
        lines.append(f"{' '.join(map(str, cell))}:  " + "  ".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
