"""`make bench-gpu`: conformance on the device, then the row operator's benchmarks there, within ten minutes, to one JSON.

Each case is written as soon as it is measured; a run that was cut off goes on where it stopped (`--resume FILE`). No number is
measured if the conformance tests fail, and none without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import json
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
from benchmarks import gpu_attention, gpu_decode, gpu_options

ROOT = Path(__file__).resolve().parents[1]
ELEMENTS = 1 << 26
BUDGET_SECONDS = 600
CONFORMANCE_SECONDS = 240
SIZES = (64, 256, 1024, 4096, 16384, 32768, 131072, 1 << 20)
ALPHAS = (0.1, 0.5, 0.85, 0.95)
SIGMAS = (1.0, 3.0, 10.0)
DTYPES = ("float32", "bfloat16")
OPERATIONS = ("forward", "backward", "both")
PACKAGES = ("torch", "triton", "diffmax-core", "diffmax-cuda", "diffmax-rocm", "entmax", "adasplash")

KIT = """
from diffmax.testing.conformance import BackendConformance
class TestDevice(BackendConformance):
    backend = "{backend}"
    device = "cuda"
"""
ATTENTION_KIT = """
from diffmax.testing.attention_conformance import AttentionConformance
class TestDevice(AttentionConformance):
    backend = "{backend}"
    device = "cuda"
"""
DECODE_KIT = """
from diffmax.testing.kvcache_conformance import KVCacheConformance
class TestDevice(KVCacheConformance):
    backend = "{backend}"
    device = "cuda"
"""
ATTENTION_TESTS = "bfloat16 and (forward or gradients or packed or masked)"  # each case compiles its kernels
# what is measured -> its kit: the name in the result, and which tests of it
KITS = {
    "rows": ("conformance", KIT, "test"),
    "attention": ("attention_conformance", ATTENTION_KIT, ATTENTION_TESTS),
    "options": ("attention_conformance", ATTENTION_KIT, ATTENTION_TESTS),
    "decode": ("decode_conformance", DECODE_KIT, "test"),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--resume", type=Path, help="a result file of this script to go on with")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="the time for everything")
    parser.add_argument("--only", choices=tuple(KITS), help="measure one of the operators")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        message = (
            f"bench_gpu: torch sees no GPU here (torch {torch.__version__}); nothing was measured, and nothing was written"
        )
        print(message, file=sys.stderr)
        return 1
    deadline = time.monotonic() + options.seconds
    backend = "rocm" if torch.version.hip else "cuda"
    chosen = diffmax.explain("diffmax_bisect", torch.zeros(2, 2, device="cuda")).chosen
    if chosen != backend:
        print(
            f"bench_gpu: calls go to {chosen}, not to {backend}; run `python -m diffmax`; nothing was measured", file=sys.stderr
        )
        return 1
    path = options.resume or result_path()
    result = json.loads(path.read_text()) if options.resume else {"environment": environment(backend), "rows": []}
    sections = [options.only] if options.only else list(KITS)
    for name, *kit in (KITS[section] for section in sections):
        if result.get(name, {}).get("passed"):
            continue
        result[name] = conformance(backend, *kit)
        write(path, result)
        if not result[name]["passed"]:
            print(result[name]["output"], file=sys.stderr)
            print(f"bench_gpu: the tests of {name} failed on this device: no times were measured", file=sys.stderr)
            return 1
    if "rows" in sections:
        measure(result, path, deadline)
        print(table(result["rows"]))
    if "attention" in sections:
        attention_rows = result.setdefault("attention", [])
        gpu_attention.measure(attention_rows, lambda: write(path, result), deadline, timed)
        print(gpu_attention.table(attention_rows))
    if "options" in sections:
        option_rows = result.setdefault("options", [])
        gpu_options.measure(option_rows, lambda: write(path, result), deadline, timed)
        print(gpu_options.table(option_rows))
    if "decode" in sections:
        result["decode"] = gpu_decode.measure(timed, backend, deadline)
        write(path, result)
    print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}: {len(result['rows'])} rows")
    return 0 if all(row["correct"] for row in result["rows"] if row["contestant"] == "diffmax") else 1


def conformance(backend: str, kit: str, which: str) -> dict[str, Any]:
    """The kit on the device, in a process of its own."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_device.py").write_text(kit.format(backend=backend))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", which, "test_device.py"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=CONFORMANCE_SECONDS)
            passed, output = done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        except subprocess.TimeoutExpired:
            passed, output = False, f"not done after {CONFORMANCE_SECONDS} s"
    return {"passed": passed, "seconds": round(time.monotonic() - started), "output": output.strip()}


def cases() -> Iterator[dict[str, Any]]:
    """The whole grid, the cells that decide most first: forward, alpha 0.85, sigma 1."""
    order = itertools.product(OPERATIONS, DTYPES, (0.85, 0.5, 0.1, 0.95), SIGMAS, SIZES)
    for operation, dtype, alpha, sigma, n in order:
        yield {"operation": operation, "dtype": dtype, "alpha": alpha, "sigma": sigma, "n": n, "rows": max(1, ELEMENTS // n)}
    for operation, n in itertools.product(("forward", "both"), (131072, 1 << 20)):
        yield {"operation": operation, "dtype": "float32", "alpha": 0.85, "sigma": 1.0, "n": n, "rows": 1}


def contestants(case: dict[str, Any]) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name; the rivals that are slow only where sigma is 1 and rows are of 1024 or 16384 entries."""
    alpha = case["alpha"]
    field: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: torch.softmax(x, -1),
        "diffmax": lambda x: diffmax.diffmax_bisect(x, alpha),
    }
    if case["sigma"] == 1.0:
        field["softmax_compiled"] = torch.compile(lambda x: torch.softmax(x, -1), dynamic=False)
    if case["sigma"] == 1.0 and case["n"] in (1024, 16384):
        try:
            from entmax import entmax_bisect

            field["entmax_bisect"] = lambda x: entmax_bisect(x, 2 - alpha)
        except ImportError:
            pass
        try:
            from adasplash import triton_entmax

            field["adasplash"] = lambda x: triton_entmax(x, 2 - alpha)
        except ImportError:
            pass
    return field


def measure(result: dict[str, Any], path: Path, deadline: float) -> None:
    """Append a row per contestant and case until all are there or the time is up."""
    seen = {tuple(row[key] for key in ("operation", "dtype", "alpha", "sigma", "n", "rows")) for row in result["rows"]}
    for case in cases():
        if tuple(case.values()) in seen:
            continue
        if time.monotonic() > deadline:
            print("bench_gpu: the time is up; go on with --resume", file=sys.stderr)
            return
        x = (torch.randn(case["rows"], case["n"], device="cuda") * case["sigma"]).to(getattr(torch, case["dtype"]))
        grad = torch.randn_like(x)
        copy = torch.empty_like(x)
        result["rows"].append({"contestant": "copy", **case, "correct": True, **timed(functools.partial(copy.copy_, x))})
        for name, function in contestants(case).items():
            row: dict[str, Any] = {"contestant": name, **case, "correct": False}
            try:
                row |= checked(case, x, function, name)
                if row["correct"]:
                    row |= timed(prepared(case["operation"], x, grad, function))
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                row["reason"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            result["rows"].append(row)
        write(path, result)


def checked(case: dict[str, Any], x: Tensor, function: Callable[[Tensor], Tensor], name: str) -> dict[str, Any]:
    """Whether a contestant computes what it says, on a sample of the very rows that are timed (benchmarks/check.py)."""
    from benchmarks.check import check

    sample = x[:: max(1, x.shape[0] // 64)][:64]
    leaf = sample.clone().requires_grad_()
    grad = torch.randn_like(sample)
    p = function(leaf)
    grad_x = torch.autograd.grad(p, leaf, grad)[0] if case["operation"] != "forward" else None
    e = 0.0 if name.startswith("softmax") else 1 - case["alpha"]
    verdict = check(sample.cpu(), grad.cpu(), p.detach().cpu(), None if grad_x is None else grad_x.cpu(), e, name == "diffmax")
    return {"correct": verdict.correct, "reason": verdict.reason, "error_ulp": verdict.error, "zeros": verdict.zeros}


def prepared(operation: str, x: Tensor, grad: Tensor, function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    """What is timed."""
    if operation == "forward":
        return torch.no_grad()(lambda: function(x))
    leaf = x.clone().requires_grad_()
    if operation == "both":
        return lambda: torch.autograd.grad(function(leaf), leaf, grad)
    p = function(leaf)
    return lambda: torch.autograd.grad(p, leaf, grad, retain_graph=True)


def timed(call: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds by the device's clock, with a cold cache: median, 20th, 80th percentile; and peak memory beyond inputs."""
    from triton.testing import do_bench

    median, p20, p80 = do_bench(call, warmup=5, rep=25, quantiles=[0.5, 0.2, 0.8])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "peak_bytes": torch.cuda.max_memory_allocated() - before}


def environment(backend: str) -> dict[str, Any]:
    """The device, its software, the commit."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": properties.name,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "backend": backend,
        "runtime": torch.version.hip or torch.version.cuda,
        "packages": versions,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.bench_gpu",
    }


def result_path() -> Path:
    """benchmarks/results/<device>/<date>-<commit>-gpu.json."""
    env = environment("")
    folder = "-".join(env["device"].lower().split())
    return ROOT / "benchmarks" / "results" / folder / f"{env['date']}-{env['commit']}-gpu.json"


def write(path: Path, result: dict[str, Any]) -> None:
    """The whole result so far, one line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def table(rows: list[dict[str, Any]]) -> str:
    """diffmax's rows: time, share of the copy's bandwidth, and times softmax's."""
    by_case: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("operation", "dtype", "alpha", "sigma", "n", "rows"))
        by_case.setdefault(key, {})[row["contestant"]] = row.get("median_ms", float("nan"))
    lines = [f"{'operation':9} {'dtype':8} alpha sigma {'n':>8} {'rows':>8} {'ms':>8} copy/ms softmax"]
    for (operation, dtype, alpha, sigma, n, count), times in by_case.items():
        own = times.get("diffmax", float("nan"))
        ratios = f"{times['copy'] / own:7.2f} {own / times.get('softmax', float('nan')):7.2f}"
        lines.append(f"{operation:9} {dtype:8} {alpha:5} {sigma:5} {n:8} {count:8} {own:8.3f} {ratios}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
