"""`make bench-npu`: the kit on the device, then rows beside torch.softmax, attention beside npu_fusion_attention, to one JSON.

Times are of the wall clock, from the first launch of a group of calls until the device is done: what a user waits for, launches
included. No number is measured if the kit fails, and none without a device; `--device cpu` measures core's CPU kernels instead,
to try this script out. Each case is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffmax
from benchmarks.bench_gpu import write

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torch-npu", "triton-ascend", "diffmax-core", "diffmax-npu")
BUDGET_SECONDS, CONFORMANCE_SECONDS, CASE_SECONDS = 600, 300, 0.3

KIT = """
from diffmax.testing.conformance import BackendConformance
from diffmax.testing.attention_conformance import AttentionConformance
class TestRows(BackendConformance):
    backend = device = "npu"
class TestAttention(AttentionConformance):
    backend = device = "npu"
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_npu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="npu", choices=("npu", "cpu"))
    parser.add_argument("--elements", type=int, default=1 << 25, help="of a matrix of rows, and of a score matrix")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="the time for everything")
    parser.add_argument("--output", type=Path, help="where the JSON goes; else benchmarks/results/<device>/")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    if options.device == "npu":
        chosen = diffmax.explain("diffmax_bisect", torch.zeros(2, 2, device="npu")).chosen if has_device() else None
        if chosen != "npu":
            why = f"calls go to {chosen}" if chosen else "torch sees no NPU here"
            print(f"bench_npu: {why}; run `python -m diffmax`; nothing was measured, nothing written", file=sys.stderr)
            return 1
    path = options.output or result_path(options.device)
    result: dict[str, Any] = {"environment": environment(options.device), "rows": []}
    result["conformance"] = conformance(options.device)
    write(path, result)
    if not result["conformance"]["passed"]:
        print(result["conformance"]["output"], file=sys.stderr)
        print("bench_npu: the kit failed on this device: no times were measured", file=sys.stderr)
        return 1
    for case in cases(options.elements):
        if time.monotonic() > deadline:
            print("bench_npu: the time is up, some cases were not measured", file=sys.stderr)
            break
        for name, call in contestants(case, options.device).items():
            result["rows"].append({"contestant": name, **case, **attempt(call, options.device)})
        write(path, result)
    print(table(result["rows"]))
    print(f"{path.name}: {len(result['rows'])} rows")
    return 0 if all("reason" not in row for row in result["rows"] if row["contestant"] == "diffmax") else 1


def has_device() -> bool:
    device = getattr(torch, "npu", None)
    return device is not None and bool(device.is_available())


def conformance(device: str) -> dict[str, Any]:
    """The kit on the device, in a process of its own. The CPU's kernels have had it: `make test`."""
    if device == "cpu":
        return {"passed": True, "seconds": 0, "output": "not run: this device is no NPU"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_device.py").write_text(KIT, encoding="utf-8")
        report = Path(folder, "kit.json")
        options = ["-q", "-p", "no:cacheprovider", "-p", "diffmax.testing.report", "--diffmax-report", str(report)]
        command = [sys.executable, "-m", "pytest", *options, "test_device.py"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=CONFORMANCE_SECONDS)
            passed, output = done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        except subprocess.TimeoutExpired:
            passed, output = False, f"not done after {CONFORMANCE_SECONDS} s"
    return {"passed": passed, "seconds": round(time.monotonic() - started), "output": output.strip()}


def cases(elements: int) -> Iterator[dict[str, Any]]:
    """Rows, then attention with about as many scores."""
    for direction, dtype, n in itertools.product(("forward", "both"), ("float32", "bfloat16"), (64, 1024, 16384)):
        rows = max(1, elements // n)
        yield {"operation": "rows", "direction": direction, "dtype": dtype, "alpha": 0.85, "n": n, "rows": rows}
    for direction, length in itertools.product(("forward", "both"), (512, 2048)):
        heads = max(1, elements // length**2)
        length = min(length, max(64, int(elements**0.5)))
        yield {
            **{"operation": "attention", "direction": direction, "dtype": "bfloat16", "alpha": 0.85, "sigma": 3.0},
            **{"heads": heads, "length": length, "head_dim": 64},
        }


def contestants(case: dict[str, Any], device: str) -> dict[str, Callable[[], object]]:
    """By name, what is timed."""
    dtype, alpha = getattr(torch, case["dtype"]), case["alpha"]
    if case["operation"] == "rows":
        inputs = [torch.randn(case["rows"], case["n"]).to(device, dtype)]
        field: dict[str, Callable[..., Tensor]] = {
            "softmax": lambda x: torch.softmax(x, -1),
            "diffmax": lambda x: diffmax.diffmax_bisect(x, alpha),
        }
    else:
        size = (1, case["heads"], case["length"], case["head_dim"])
        spread = case["sigma"] ** 0.5
        inputs = [(torch.randn(size) * scale).to(device, dtype) for scale in (spread, spread, 1.0)]
        field = {
            "sdpa": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
            "diffmax": lambda q, k, v: diffmax.attention(q, k, v, is_causal=True, alpha=alpha),
        }
        if device == "npu":
            field["npu_fusion_attention"] = fused(case)
    grad = torch.randn_like(field["diffmax"](*inputs))
    return {name: prepared(function, inputs, grad, case["direction"]) for name, function in field.items()}


def fused(case: dict[str, Any]) -> Callable[..., Tensor]:
    """torch_npu's softmax attention, causal as its documentation has it: the mask says what is hidden."""
    import torch_npu

    hidden = torch.ones(case["length"], case["length"], dtype=torch.bool, device="npu").triu(1)
    scale = case["head_dim"] ** -0.5
    return lambda q, k, v: torch_npu.npu_fusion_attention(q, k, v, case["heads"], "BNSD", atten_mask=hidden, scale=scale)[0]


def prepared(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, direction: str) -> Callable[[], object]:
    if direction == "forward":
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [t.clone().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def attempt(call: Callable[[], object], device: str) -> dict[str, Any]:
    try:
        return timed(call, device)
    except (RuntimeError, ValueError, TypeError) as error:
        return {"reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def timed(call: Callable[[], object], device: str) -> dict[str, Any]:
    """Milliseconds per call: median, 20th and 80th percentile of groups of calls; and the peak of memory beyond the inputs."""
    module = getattr(torch, device)
    call()
    module.synchronize()
    peak = None
    if device == "npu":
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        call()
        module.synchronize()
        peak = module.max_memory_allocated() - before
    samples: list[float] = []
    group, end = 1, time.perf_counter() + CASE_SECONDS
    while len(samples) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(group):
            call()
        module.synchronize()
        took = time.perf_counter() - start
        samples.append(took / group * 1e3)
        if took < CASE_SECONDS / 20:
            group *= 2
    ranks = statistics.quantiles(samples, n=10)
    return {"median_ms": statistics.median(samples), "p20_ms": ranks[1], "p80_ms": ranks[7], "peak_bytes": peak}


def environment(device: str) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": torch.npu.get_device_name() if device == "npu" else "cpu",  # type: ignore[attr-defined]
        "cann": cann_version(),
        "packages": versions,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.bench_npu",
    }


def cann_version() -> str | None:
    try:
        from diffmax_npu.probe import cann_version as installed
    except ImportError:
        return None
    return installed() or None


def result_path(device: str) -> Path:
    facts = environment(device)
    folder = "-".join(facts["device"].lower().split())
    return ROOT / "benchmarks" / "results" / folder / f"{facts['date']}-{facts['commit']}-npu.json"


def table(rows: list[dict[str, Any]]) -> str:
    """One line per measurement."""
    lines = [f"{'operation':10} {'direction':9} {'dtype':9} {'size':>16} {'contestant':20} {'ms':>9}"]
    for row in rows:
        size = f"{row['rows']}x{row['n']}" if row["operation"] == "rows" else f"{row['heads']}x{row['length']}"
        took = f"{row['median_ms']:9.3f}" if "median_ms" in row else row["reason"]
        lines.append(f"{row['operation']:10} {row['direction']:9} {row['dtype']:9} {size:>16} {row['contestant']:20} {took}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
