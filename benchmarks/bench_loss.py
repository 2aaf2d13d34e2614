"""`python -m benchmarks.bench_loss`: a training step's loss and its gradient at the size of a language model's vocabulary.

A call is forward and backward: the mean loss of a batch of rows and its gradient for the scores. Contestants are cross-entropy
and entmax's losses, in processor time on one thread. Before the clock each must pass a check: the loss and the gradient against
`diffmax.reference` in float64, row by row (cross-entropy: against itself in float64). Who fails gets no number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entmax
import torch
from torch import Tensor
from tqdm import tqdm

import diffmax
from benchmarks.environment import environment, result_path, without_paths
from benchmarks.memory import peak_bytes
from benchmarks.runner import FAILURES
from benchmarks.timing import interleave, summarize
from diffmax import reference

Loss = Callable[[Tensor, Tensor], Tensor]

CLASSES = (32768, 131072)
ALPHAS = (0.5, 0.85)
SIGMAS = (1.0, 5.0)
DTYPES = ("float32", "bfloat16")
SMALL, LARGE = 8, 64  # rows; a small batch is one block of `diffmax.operators.loss.terms`, a large one is several
SAMPLE_ROWS = 4
OWN_ULP, RIVAL_ULP = 16, 256


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_loss", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few classes, to see that everything runs")
    parser.add_argument("--output", help="result file (default: benchmarks/results/<device>/<date>-<commit>-loss.json)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    env = environment("bench_loss", arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = run((512,) if options.quick else CLASSES, rounds=1 if options.quick else 3)
    finally:
        torch.set_num_threads(threads)
    env["seconds"] = round(time.perf_counter() - started)
    path = Path(options.output) if options.output else result_path("bench_loss", env)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({"environment": env}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    print(table(rows))
    print(f"\n{len(rows)} rows, {sum(not row['correct'] for row in rows)} of them not correct; {env['seconds']} s; {path.name}")


def contestants(alpha: float, dtype: str, rows: int) -> dict[str, Loss]:
    """Loss by name. entmax computes in its input's dtype, so bfloat16 is no fair test of it; entmax15 is alpha = 0.5 alone."""
    field: dict[str, Loss] = {
        "cross_entropy": torch.nn.functional.cross_entropy,
        "diffmax_loss": lambda x, y: diffmax.diffmax_loss(x, y, alpha),
    }
    if dtype == "float32" and rows == SMALL:
        field["entmax_bisect_loss"] = lambda x, y: entmax.entmax_bisect_loss(x, y, 2 - alpha).mean()
        if alpha == 0.5:
            field["entmax15_loss"] = lambda x, y: entmax.entmax15_loss(x, y).mean()
            field["entmax15_loss[k=100]"] = lambda x, y: entmax.entmax15_loss(x, y, 100).mean()
    return field


def run(classes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    results = []
    cells = list(itertools.product(classes, DTYPES, (SMALL, LARGE), ALPHAS, SIGMAS))
    for n, dtype, rows, alpha, sigma in tqdm(cells, unit="cell"):
        case = {"n": n, "rows": rows, "alpha": alpha, "sigma": sigma, "dtype": dtype, "threads": 1}
        results += run_case(case, contestants(alpha, dtype, rows), rounds)
    return results


def run_case(case: dict[str, Any], field: dict[str, Loss], rounds: int) -> list[dict[str, Any]]:
    """One row per contestant; who fails its check, or raises, is not timed and keeps the reason."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(case["rows"], case["n"], generator=generator) * case["sigma"]
    x = scores.to(getattr(torch, case["dtype"])).requires_grad_()
    y = torch.randint(case["n"], (case["rows"],), generator=generator)
    rows, calls = {}, {}
    for name, loss in field.items():
        rows[name] = {"contestant": name, **case, "correct": False, "reason": None}
        try:
            reason = fault(name, loss, x, y, case["alpha"])
            rows[name] |= {"correct": reason is None, "reason": reason}
            if reason is None:
                calls[name] = step(loss, x, y)
                rows[name]["peak_tensors"] = round(peak_bytes(calls[name]) / x.nbytes, 2)
        except FAILURES as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            rows[name]["reason"] = without_paths(f"{type(error).__name__}: {first_line}")
    for name, samples in interleave(calls, rounds, "cpu").items():
        rows[name] |= {key: float(f"{value:.4g}") for key, value in summarize(samples).items()}
    base = rows["cross_entropy"]
    for row in rows.values():
        if "median_s" in row and "median_s" in base:
            row["ratio_cross_entropy"] = float(f"{row['median_s'] / base['median_s']:.4g}")
    return list(rows.values())


def step(loss: Loss, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(loss(x, y), x)[0]


def fault(name: str, loss: Loss, x: Tensor, y: Tensor, alpha: float) -> str | None:
    """What is wrong with a contestant's loss and gradient on a few rows, None if nothing is."""
    x, y = x[:SAMPLE_ROWS].detach().requires_grad_(), y[:SAMPLE_ROWS]
    value = loss(x, y)
    grad = torch.autograd.grad(value, x)[0]
    exact_value, exact_grad = exact(x.detach().double(), y, None if name == "cross_entropy" else alpha)
    eps, allowed = torch.finfo(x.dtype).eps, OWN_ULP if name == "diffmax_loss" else RIVAL_ULP
    errors = {
        "loss": abs(value.item() - exact_value) / max(1.0, abs(exact_value)) / eps,
        "gradient": ((grad.double() - exact_grad).abs().max() / exact_grad.abs().max()).item() / eps,
    }
    return next((f"the {what} errs by {e:.1f} ulp, allowed {allowed}" for what, e in errors.items() if not e <= allowed), None)


def exact(x: Tensor, y: Tensor, alpha: float | None) -> tuple[float, Tensor]:
    """The mean loss and its gradient in float64, from their definitions."""
    onehot = torch.nn.functional.one_hot(y, x.shape[1])
    if alpha is None:
        return torch.nn.functional.cross_entropy(x, y).item(), (x.softmax(1) - onehot) / len(x)
    e = 1 - alpha
    p = reference.bisect(x, e, 1, 200, True)[0]
    losses = (1 - (p ** (1 + e)).sum(1)) / (e * (1 + e)) + ((p - onehot) * x).sum(1)
    return losses.mean().item(), (p - onehot) / len(x)


def table(rows: list[dict[str, Any]]) -> str:
    """Per cell: cross-entropy's time, and everybody's as a multiple of it, with peak memory in tensors like the scores."""
    lines = [
        "forward and backward, one thread; times cross-entropy's time (peak memory beyond the scores, in tensors like them)"
    ]
    for cell, group in itertools.groupby(rows, lambda r: (r["n"], r["dtype"], r["rows"], r["alpha"], r["sigma"])):
        n, dtype, count, alpha, sigma = cell
        shown = []
        for row in group:
            if not row["correct"]:
                shown.append(f"{row['contestant']} RED: {row['reason']}")
                continue
            time_shown = f"{row['median_s'] * 1e3:.2f} ms" if row["contestant"] == "cross_entropy" else ""
            shown.append(
                f"{row['contestant']} {time_shown or format(row['ratio_cross_entropy'], '.2f')} ({row['peak_tensors']:.2f})"
            )
        lines.append(f"n={n} rows={count} {dtype} alpha={alpha} sigma={sigma:g}:  " + "  ".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
