"""`python -m benchmarks.bench_attention_threads`: attention on all threads, as models call it, against torch's.

Wall-clock medians of calls that take turns, forward alone and forward with backward, as multiples of the time of
`scaled_dot_product_attention`. Scores are N(0, sigma), or those of a trained causal language model, if `--captured` names a
file that `python -m benchmarks.device.capture` wrote. "busy" cells run beside a process for each core that never rests; they
also note the worst of 20 calls. Before the clock diffmax's result and gradients are compared with the reference's in float64.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax
from benchmarks import harness
from benchmarks.bench_attention import step
from benchmarks.harness import Call, Row
from benchmarks.timing import interleave, summarize

CAPTURED = "causal LM"
CHECKED = 192  # queries and keys that are compared with the reference
ALLOWED = {"float32": 2e-5, "bfloat16": 3e-2}  # of the largest entry
BUSY_CALLS = 20


def main(arguments: list[str]) -> None:
    parser = harness.command_line("bench_attention_threads", __doc__ or "")
    parser.add_argument("--captured", type=Path, help="file of python -m benchmarks.device.capture")
    options = parser.parse_args(arguments)
    held = torch.load(options.captured) if options.captured else {}

    def found() -> Row:
        rounds = 3 if options.quick else 11
        rows = harness.rows_of(cells(options.quick, held), lambda cell: run_case(cell, held, rounds))
        return {"threads": torch.get_num_threads(), "rows": rows}

    harness.publish("bench_attention_threads", arguments, options.output, found, lambda result: table(result["rows"]))


def cells(quick: bool, held: dict[str, list[Tensor]]) -> list[Row]:
    long = 512 if quick else 4096
    shapes: list[Row] = [
        {"batch": 1, "heads": 8, "length": long, "sigma": 1.0, "alpha": 0.9},
        {"batch": 1, "heads": 8, "length": long, "sigma": 1.0, "alpha": 0.5},
        {"batch": 1, "heads": 8, "length": long, "sigma": 8.0, "alpha": 0.5},
        {"batch": 4, "heads": 12, "length": 512, "sigma": 1.0, "alpha": 0.9},
        {"batch": 4, "heads": 12, "length": 512, "sigma": 2.0, "alpha": 0.75},
        {"batch": 8, "heads": 12, "length": 128, "sigma": 1.0, "alpha": 0.9},
        {"batch": 8, "heads": 12, "length": 128, "sigma": 1.0, "alpha": 0.5},
    ]
    drawn = [{"scores": "drawn", "dtype": dtype, **shape} for dtype in ("float32", "bfloat16") for shape in shapes]
    lengths = (256,) if quick else (2048, 6144)
    model = [
        {"scores": CAPTURED, "dtype": dtype, "batch": 1, "heads": 9, "length": length, "sigma": None, "alpha": 0.75}
        for dtype in ("float32", "bfloat16")
        for length in lengths
        if CAPTURED in held
    ]
    plain = [{**cell, "operation": operation, "busy": False} for cell in drawn + model for operation in ("forward", "both")]
    loaded = [{**cell, "operation": operation, "busy": True} for cell in drawn[:3] for operation in ("forward", "both")]
    return plain + loaded


def inputs(case: Row, held: dict[str, list[Tensor]], length: int, seed: int = 0) -> tuple[list[Tensor], float]:
    """Query, key and value, and the scale of the scores."""
    dtype = getattr(torch, case["dtype"])
    if case["scores"] == CAPTURED:  # the scores that keep the model's quality at this alpha are half as large
        query, key, value = (t[:, :, :length].to(dtype) for t in held[CAPTURED])
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        return [query.contiguous(), key.contiguous(), value.contiguous()], 0.5 / math.sqrt(query.shape[3])
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, case["batch"], case["heads"], length, 64, generator=generator).unbind()
    return [t.to(dtype) for t in (query * case["sigma"], key, value)], 1 / 8


def run_case(case: Row, held: dict[str, list[Tensor]], rounds: int) -> list[Row]:
    tensors, scale = inputs(case, held, case["length"])
    causal = case["scores"] == CAPTURED
    options: dict[str, Any] = {"is_causal": causal, "scale": scale}
    field = {
        "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, **options),
        "diffmax": lambda q, k, v: diffmax.attention(q, k, v, alpha=case["alpha"], **options),
    }
    _, stats = diffmax.attention(*tensors, alpha=case["alpha"], return_stats=True, **options)
    seen = case["length"] * (case["length"] + 1) / 2 if causal else case["length"] ** 2
    zeros = 1 - float(stats.support_size.double().sum()) / (seen * case["batch"] * tensors[0].shape[1])
    known = {"zeros": round(zeros, 3), "empty_tiles": round(stats.tile_sparsity.mean().item(), 3)}
    rows = {name: {"contestant": name, **case, **known} for name in field}
    reason = fault(case, held)

    def prepare(name: str) -> tuple[Row, Call]:
        return {"reason": reason if name == "diffmax" else None}, step(field[name], tensors, case["operation"])

    if not case["busy"]:
        return harness.measure(rows, prepare, rounds, ("sdpa",), memory=lambda call: {}, clock="wall")
    calls = {name: prepare(name)[1] for name in field}
    with busy_processes(os.cpu_count() or 1):
        samples = {name: times[:BUSY_CALLS] for name, times in interleave(calls, 2 * BUSY_CALLS, "wall").items()}
    for name, row in rows.items():
        row |= {"correct": reason is None, "reason": reason, **summarize(samples[name]), "worst_s": max(samples[name])}
        row["ratio_sdpa"] = round(row["median_s"] / rows["sdpa"]["median_s"], 3) if "median_s" in rows["sdpa"] else None
        row["worst_ratio"] = round(max(samples[name]) / max(samples["sdpa"]), 3)
    return list(rows.values())


def fault(case: Row, held: dict[str, list[Tensor]]) -> str | None:
    """What is wrong with diffmax's result and gradients for the first queries and keys, None if nothing is."""
    tensors, scale = inputs(case, held, min(case["length"], CHECKED), seed=1)
    options: dict[str, Any] = {"is_causal": case["scores"] == CAPTURED, "scale": scale, "alpha": case["alpha"]}

    def outcome(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = diffmax.attention(*leaves, backend=backend, **options)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    for what, got, exact in zip(
        ("result", "gradient for query", "gradient for key", "gradient for value"),
        outcome(tensors[0].dtype, None),
        outcome(torch.float64, "reference"),
        strict=True,
    ):
        error = float((got - exact).abs().mean() / exact.abs().max().clamp_min(1.0))
        if not error <= ALLOWED[case["dtype"]]:
            return f"the {what} errs by {error:.2g}, allowed {ALLOWED[case['dtype']]}"
    return None


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def table(rows: list[Row]) -> str:
    title = "heads of size 64, all threads, wall clock; times sdpa's median (busy: worst call to worst call)"
    lines = ("scores", "dtype", "batch", "heads", "length", "sigma", "alpha", "zeros", "empty_tiles", "operation", "busy")
    return harness.table(title, rows, "sdpa", lines=lines, note=lambda row: f" ({row['worst_ratio']})" if row["busy"] else "")


if __name__ == "__main__":
    main(sys.argv[1:])
