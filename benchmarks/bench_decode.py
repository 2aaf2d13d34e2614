"""One decode step against torch's attention with one query: pages left unread, and scores that allow nothing.

    python -m benchmarks.bench_decode              # 4k, 128k and 1M tokens, on one thread; about 3 minutes
    python -m benchmarks.bench_decode --quick

Kinds: "needles" has a few keys that the query looks for, in a cache of small ones: bounds leave nearly all pages unread.
"flat" has scores of unit variance and alpha 0.9: nearly every key has a weight. "spread" has them with alpha 0.5: few weights,
and bounds that cannot tell where. Outputs are checked against the float64 reference first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

import diffmax
from benchmarks.environment import environment, result_path
from benchmarks.memory import peak_bytes
from benchmarks.timing import interleave, summarize
from diffmax.testing import gates

HEAD_SIZE = 64
KINDS = {"needles": 0.5, "flat": 0.9, "spread": 0.5}  # and their alpha
GROUPS = (1, 8)
LENGTHS = (4096, 131072, 1048576)
CHECKED = 4096


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_decode", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short cache, to see that everything runs")
    parser.add_argument("--output", help="result file (default: benchmarks/results/<device>/<date>-<commit>-decode.json)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    env = environment("bench_decode", arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = run((CHECKED,) if options.quick else LENGTHS, rounds=1 if options.quick else 7)
    finally:
        torch.set_num_threads(threads)
    env["seconds"] = round(time.perf_counter() - started)
    path = Path(options.output) if options.output else result_path("bench_decode", env)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({"environment": env}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    print(table(rows))
    print(f"\n{len(rows)} rows, {sum(not row['correct'] for row in rows)} of them not correct; {env['seconds']} s; {path.name}")


def inputs(kind: str, length: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, 1, group, D), k_cache and v_cache (1, length, 1, D)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 1, group, HEAD_SIZE, generator=generator)
    k_cache, v_cache = torch.randn(2, 1, length, 1, HEAD_SIZE, generator=generator).unbind()
    if kind == "needles":
        q = q[:, :, :1] + q / 8  # heads of a group look for much the same
        k_cache *= 0.2
        for place in (3, length // 3, length - 2):
            k_cache[:, place, 0] = 1.5 * q[:, 0, 0]
    return q, k_cache, v_cache


def contestants(kind: str) -> dict[str, Callable[..., Tensor]]:
    """By name, functions of q, k_cache, v_cache and the bounds."""

    def dense(q: Tensor, k_cache: Tensor, v_cache: Tensor, bounds: diffmax.PageBounds) -> Tensor:
        rows = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        return scaled_dot_product_attention(*rows, enable_gqa=True).transpose(1, 2)

    def ours(backend: str, bounded: bool) -> Callable[..., Tensor]:
        return lambda q, k_cache, v_cache, bounds: diffmax.attention_with_kvcache(
            q, k_cache, v_cache, alpha=KINDS[kind], page_bounds=bounds if bounded else None, backend=backend
        )

    installed = {record.backend for record in diffmax.backends()}
    field = {"sdpa": dense}
    for backend in (name for name in ("cpu", "numba") if name in installed):
        field |= {backend: ours(backend, False), f"{backend}, bounds": ours(backend, True)}
    return field


def run(lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    results = []
    for length, kind, group in tqdm(list(itertools.product(lengths, KINDS, GROUPS))):
        results += run_case({"length": length, "kind": kind, "group": group, "threads": 1}, contestants(kind), rounds)
    return results


def run_case(case: dict[str, Any], field: dict[str, Callable[..., Tensor]], rounds: int) -> list[dict[str, Any]]:
    """One row per contestant; who fails its check is not timed and keeps the reason."""
    tensors = inputs(case["kind"], case["length"], case["group"])
    bounds = diffmax.page_bounds(tensors[1], case["length"])
    _, stats = diffmax.attention_with_kvcache(*tensors, alpha=KINDS[case["kind"]], page_bounds=bounds, return_stats=True)
    found = {
        "alpha": KINDS[case["kind"]],
        "pages": bounds.low.shape[1],
        "pages_read": int(stats.pages_read.max()),
        "support": int(stats.support_size.max()),
    }
    rows, calls = {}, {}
    for name, function in field.items():
        reason = fault(name, function, case)
        rows[name] = {"contestant": name, **case, **found, "correct": reason is None, "reason": reason}
        if reason is None:
            calls[name] = lambda function=function: function(*tensors, bounds)
            rows[name]["peak_bytes"] = peak_bytes(calls[name])
    with torch.no_grad():
        timed = interleave(calls, rounds, "cpu")
    for name, samples in timed.items():
        rows[name] |= {key: float(f"{value:.4g}") for key, value in summarize(samples).items()}
    for row in rows.values():
        if "median_s" in row and "median_s" in rows["sdpa"]:
            row["ratio_sdpa"] = float(f"{row['median_s'] / rows['sdpa']['median_s']:.4g}")
    return list(rows.values())


def fault(name: str, function: Callable[..., Tensor], case: dict[str, Any]) -> str | None:
    """What is wrong with a contestant's output at a shorter length, None if nothing is."""
    tensors = inputs(case["kind"], min(case["length"], CHECKED), case["group"], seed=1)
    bounds = diffmax.page_bounds(tensors[1], tensors[1].shape[1])

    def reference(*given: Tensor) -> Tensor:
        if name == "sdpa":
            return contestants(case["kind"])["sdpa"](*given, bounds)
        return diffmax.attention_with_kvcache(*given, alpha=KINDS[case["kind"]], backend="reference")

    ((exact, allowed),) = gates(reference, *tensors)
    error = float((function(*tensors, bounds).double() - exact).abs().max())
    return None if error <= allowed else f"the output errs by {error:.3g}, allowed {allowed:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Per cell: torch's time, and everybody's as a multiple of it."""
    lines = ["one key head of size 64, float32, one thread; times sdpa's time"]
    for (length, kind, group), cell in itertools.groupby(rows, lambda r: (r["length"], r["kind"], r["group"])):
        shown, facts = [], ""
        for row in cell:
            facts = f"{row['pages_read']} of {row['pages']} pages, {row['support']} keys"
            if not row["correct"]:
                shown.append(f"{row['contestant']} RED: {row['reason']}")
            elif row["contestant"] == "sdpa":
                shown.append(f"sdpa {row['median_s'] * 1e3:.2f} ms")
            else:
                shown.append(f"{row['contestant']} {row['ratio_sdpa']:.2f}")
        lines.append(f"{length} {kind} group={group}, {facts}:  " + "  ".join(shown))
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
