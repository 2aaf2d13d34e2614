"""What each of attention's options costs on a GPU, beside the plain call: a part of `python -m benchmarks.bench_gpu`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import diffmax
from benchmarks.bench_attention_options import ALPHA, OPTIONS, learned
from benchmarks.gpu_attention import HEAD_DIM, HEADS, PASSES, measured, tensors

LENGTH = 8192
SCORES = {"randn": 0.0, "band": 0.58}


def given(name: str, length: int, heads: int, device: str) -> dict[str, Any]:
    """The option's arguments on the device, one number per head where it takes one."""
    arguments: dict[str, Any] = {}
    for key, value in OPTIONS[name](length).items():
        if isinstance(value, Tensor):
            moved = value.detach().to(device)
            moved = moved.expand(heads).contiguous() if moved.shape == (1,) else moved
            value = moved.requires_grad_(value.requires_grad)
        arguments[key] = value
    return arguments


def measure(
    rows: list[dict[str, Any]],
    write: Callable[[], None],
    deadline: float,
    timed: Callable[[Callable[[], object]], dict[str, Any]],
    device: str = "cuda",
    length: int = LENGTH,
) -> None:
    """Append a row per option and kind of scores to `rows` until all are there or the time is up."""
    seen = {(row["scores"], row["option"]) for row in rows}
    for scores, sparsity in SCORES.items():
        case = {"length": length, "alpha": ALPHA, "scores": scores, "sparsity": sparsity}
        case |= {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
        query, key, value = tensors(case, device)
        for name in OPTIONS:
            if (scores, name) in seen:
                continue
            if time.monotonic() > deadline:
                print("bench_gpu: the time is up before all options were measured; go on with --resume")
                return
            row = {"contestant": "diffmax", "option": name, **case}
            try:
                arguments = given(name, length, HEADS, device)

                def attend(query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any] = arguments) -> Tensor:
                    out: Any = diffmax.attention(query, key, value, **{"alpha": ALPHA, **arguments})
                    return out[0] if arguments.get("return_stats") else out

                row |= measured(attend, query, key, value, timed, learned(arguments))
            except (RuntimeError, ValueError, TypeError, torch.OutOfMemoryError) as error:
                row["reason"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            rows.append(row)
            write()


def table(rows: list[dict[str, Any]]) -> str:
    """Every option's times over the plain call's."""
    plain = {row["scores"]: row for row in rows if row["option"] == "plain"}
    lines = [f"{'scores':6} {'option':26} " + " ".join(f"{name:>9}" for name in PASSES) + "  times plain"]
    for row in rows:
        base = plain.get(row["scores"], {})
        ratios = [
            row[f"{name}_median_ms"] / base[f"{name}_median_ms"] if f"{name}_median_ms" in row and base else float("nan")
            for name in PASSES
        ]
        lines.append(f"{row['scores']:6} {row['option']:26} " + " ".join(f"{ratio:9.2f}" for ratio in ratios))
    return "\n".join(lines)
