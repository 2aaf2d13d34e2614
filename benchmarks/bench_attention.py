"""`python -m benchmarks.bench_attention`: fused attention on the CPU, against torch's softmax attention and unfused diffmax.

One head on one thread, in processor time, forward alone and forward with backward. Scores are of three kinds: "randn" is
what an untrained model has, where nothing is sparse; "sharp" is randn, three times as wide on both sides, where rows are
sparse but tiles are not; "local" has queries that look at keys near their own place, where most tiles are empty. The measured
share of empty tiles is in every row. Before the clock the output and gradients of each contestant are compared with
`diffmax.reference.attention` in float64 (torch's own: with itself in float64). Who fails gets no number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

import diffmax
from benchmarks.environment import environment, result_path, without_paths
from benchmarks.memory import peak_bytes
from benchmarks.runner import FAILURES
from benchmarks.timing import interleave, summarize

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

LENGTHS = (1024, 4096)
ALPHAS = (0.5, 0.85)
KINDS = ("randn", "sharp", "local")
HEAD_SIZE = 64
CHECKED = 512  # the length at which outputs are compared: float64 in full
ULP = 256  # of the largest entry; scores of a hundred have an error of their own


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, to see that everything runs")
    parser.add_argument("--output", help="result file (default: benchmarks/results/<device>/<date>-<commit>-attention.json)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    env = environment("bench_attention", arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = run((256,) if options.quick else LENGTHS, rounds=1 if options.quick else 3)
    finally:
        torch.set_num_threads(threads)
    env["seconds"] = round(time.perf_counter() - started)
    path = Path(options.output) if options.output else result_path("bench_attention", env)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({"environment": env}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    print(table(rows))
    print(f"\n{len(rows)} rows, {sum(not row['correct'] for row in rows)} of them not correct; {env['seconds']} s; {path.name}")


def inputs(kind: str, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 1, length, HEAD_SIZE, generator=generator).unbind()
    if kind == "sharp":
        return query * 3, key * 3, value
    if kind == "local":
        waves = torch.arange(length).view(-1, 1) / 8 * torch.linspace(0.05, 1, HEAD_SIZE // 2)
        place = torch.cat([waves.cos(), waves.sin()], 1).view(1, 1, length, HEAD_SIZE) * 4
        return place + query / 10, place + key / 10, value
    return query, key, value


def contestants(alpha: float, causal: bool) -> dict[str, Attention]:
    def unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT / math.sqrt(HEAD_SIZE)
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        return diffmax.diffmax_bisect(scores, alpha) @ value

    def fused(backend: str) -> Attention:
        return lambda q, k, v: diffmax.attention(q, k, v, is_causal=causal, alpha=alpha, backend=backend)

    return {
        "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal),
        "unfused": unfused,
        **{name: fused(name) for name in ("cpu", "numba") if name in {record.backend for record in diffmax.backends()}},
    }


def run(lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    results = []
    cells = list(itertools.product(lengths, KINDS, ALPHAS, (False, True), ("forward", "both")))
    for length, kind, alpha, causal, operation in tqdm(cells, unit="cell"):
        case = {"length": length, "kind": kind, "alpha": alpha, "causal": causal, "operation": operation, "threads": 1}
        results += run_case(case, contestants(alpha, causal), rounds)
    return results


def run_case(case: dict[str, Any], field: dict[str, Attention], rounds: int) -> list[dict[str, Any]]:
    """One row per contestant; who fails its check, or raises, is not timed and keeps the reason."""
    tensors = inputs(case["kind"], case["length"])
    options = {"is_causal": case["causal"], "alpha": case["alpha"]}
    empty = diffmax.attention(*tensors, **options, return_stats=True)[1].tile_sparsity.item()
    rows, calls = {}, {}
    for name, function in field.items():
        rows[name] = {"contestant": name, **case, "empty_tiles": round(empty, 3), "correct": False, "reason": None}
        try:
            rows[name]["reason"] = reason = fault(name, function, case)
            rows[name]["correct"] = reason is None
            if reason is None:
                calls[name] = step(function, tensors, case["operation"])
                rows[name]["peak_bytes"] = peak_bytes(calls[name])
        except FAILURES as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            rows[name]["reason"] = without_paths(f"{type(error).__name__}: {first_line}")
    for name, samples in interleave(calls, rounds, "cpu").items():
        rows[name] |= {key: float(f"{value:.4g}") for key, value in summarize(samples).items()}
    for row in rows.values():
        if "median_s" in row and "median_s" in rows["sdpa"]:
            row["ratio_sdpa"] = float(f"{row['median_s'] / rows['sdpa']['median_s']:.4g}")
    return list(rows.values())


def step(function: Attention, tensors: tuple[Tensor, Tensor, Tensor], operation: str) -> Callable[[], object]:
    if operation == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return forward
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    grad = torch.ones_like(leaves[2])
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def fault(name: str, function: Attention, case: dict[str, Any]) -> str | None:
    """What is wrong with a contestant's output and gradients, None if nothing is."""
    tensors = inputs(case["kind"], min(case["length"], CHECKED), seed=1)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name == "sdpa":
            return scaled_dot_product_attention(query, key, value, is_causal=case["causal"])
        options = {"is_causal": case["causal"], "alpha": case["alpha"], "backend": "reference"}
        return diffmax.attention(query, key, value, **options)

    results = []
    for attend, dtype in ((function, torch.float32), (exact, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = attend(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for what, got, truth in zip(("output", "query", "key", "value"), *results, strict=True):
        # a gradient whose entries cancel is judged by the size of what is summed
        error = ((got - truth).abs().mean() / truth.abs().max().clamp_min(1.0)).item() / torch.finfo(torch.float32).eps
        if not error <= ULP:
            return f"{'the output' if what == 'output' else f'the gradient for {what}'} errs by {error:.0f} ulp, allowed {ULP}"
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """Per cell: torch's time, and everybody's as a multiple of it, with the peak of memory beyond inputs."""
    lines = ["one head of size 64, float32, one thread; times sdpa's time (peak memory in MB)"]
    for cell, group in itertools.groupby(rows, lambda r: (r["length"], r["kind"], r["alpha"], r["causal"], r["operation"])):
        length, kind, alpha, causal, operation = cell
        shown, empty = [], 0.0
        for row in group:
            empty = row["empty_tiles"]
            if not row["correct"]:
                shown.append(f"{row['contestant']} RED: {row['reason']}")
                continue
            figure = f"{row['median_s'] * 1e3:.1f} ms" if row["contestant"] == "sdpa" else f"{row['ratio_sdpa']:.2f}"
            shown.append(f"{row['contestant']} {figure} ({row['peak_bytes'] / 1e6:.0f})")
        where = f"{length} {kind} alpha={alpha} {'causal' if causal else 'full'} {operation}, {empty:.0%} of the tiles empty"
        lines.append(f"{where}:  " + "  ".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
