"""What the device can do at most: copying, multiplying, launching; what it is; and who is there to compete."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.device import clock, rivals
from benchmarks.device.context import Context

PACKAGES = ("torch", "triton", "torch-npu", "triton-ascend", "entmax", "adasplash")
COPIES, REPLAYED = 40.0, 100


@triton.jit
def nothing_kernel(x_ptr, WIDTH: tl.constexpr):
    """One program that writes one vector."""
    lanes = tl.arange(0, WIDTH)
    tl.store(x_ptr + lanes, lanes.to(tl.float32))


def device(context: Context) -> dict[str, Any]:
    """The device, its driver, the versions of what runs on it, and where calls go that name no backend."""
    import diffmax

    place = context.place
    versions = {name: _version(name) for name in PACKAGES}
    versions |= {"diffmax": diffmax.__version__, "triton": triton.__version__}
    found: dict[str, Any] = {"device": "cpu", "packages": versions}
    if place.device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"device": properties.name, "processors": properties.multi_processor_count}
        found |= {"memory_bytes": properties.total_memory, "l2_bytes": getattr(properties, "L2_cache_size", None)}
        found |= {"capability": f"{properties.major}.{properties.minor}", "runtime": torch.version.hip or torch.version.cuda}
        found |= {"architecture": getattr(properties, "gcnArchName", None), "lanes": getattr(properties, "warp_size", 32)}
        found |= {"driver": _driver()}
    elif place.device == "npu":
        found |= {"device": torch.npu.get_device_name(), "cann": _cann()}  # type: ignore[attr-defined]
    chosen = diffmax.explain("diffmax_bisect", torch.zeros(2, 2, device=place.device)).chosen
    found |= {"cached_kernels": _cached(), "triton_key": _triton_key()}
    return found | {"backend": place.backend, "chosen": chosen}


def copy(context: Context, bytes: int) -> dict[str, Any]:  # noqa: A002  (the case's name for it)
    """Bytes read and written in a second."""
    source = torch.randn(bytes // 4, device=context.place.device)
    target = torch.empty_like(source)
    times = clock.summary(clock.samples(context.place, lambda: target.copy_(source), COPIES))
    return {**times, "tb_per_s": 2 * bytes / times["median_ms"] / 1e9}


def matmul(context: Context, dtype: str, n: int) -> dict[str, Any]:
    """Floating-point operations in a second, of a product of square matrices."""
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a, b = (torch.randn(n, n, device=context.place.device, dtype=kind) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        times = clock.summary(clock.samples(context.place, lambda: a @ b, 100))
    finally:
        torch.set_float32_matmul_precision(before)
    return {**times, "tflop_per_s": 2 * n**3 / times["median_ms"] / 1e9}


def launch(context: Context) -> dict[str, Any]:
    """Microseconds of the host for one launch: of an operator of torch, of a Triton kernel, of our operator on one row."""
    import diffmax

    place = context.place
    x, row = torch.zeros(64, device=place.device), torch.zeros(1, 64, device=place.device)
    found = {"torch_us": clock.host_us(place, lambda: x.add_(1))}
    if place.device != "npu":
        found["triton_us"] = clock.host_us(place, lambda: nothing_kernel[(1,)](x, WIDTH=64))
    found["rows_us"] = clock.host_us(place, lambda: diffmax.diffmax_bisect(row, 0.5, backend=place.backend))
    return found


def graph(context: Context) -> dict[str, Any]:
    """Microseconds of a launch in a graph: of one alone, and of each among many."""
    if not context.place.graphs:
        return {"status": "skipped", "reason": "there are no graphs here"}
    x = torch.zeros(64, device="cuda")
    found = {}
    for count in (1, REPLAYED):
        x.add_(1)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(count):
                x.add_(1)
        times = clock.summary(clock.samples(context.place, captured.replay, 20))
        found[f"of_{count}_us"] = times["median_ms"] * 1e3
    return {**found, "each_us": (found[f"of_{REPLAYED}_us"] - found["of_1_us"]) / (REPLAYED - 1)}


def rival(context: Context, name: str) -> dict[str, Any]:
    """Whether a rival can be had: imported, and for torch's own run once."""
    place = context.place
    if name in ("adasplash", "entmax"):
        return {"version": getattr(rivals.module(name), "__version__", _version(name))}
    if not place.real:
        return {"status": "skipped", "reason": "its kernels need a device"}
    if name == "compiled":
        x = torch.randn(4, 64, device=place.device)
        rivals.compiled_softmax(x, lambda function: function(x))
        return {}
    q = torch.randn(1, 1, 256, 64, device=place.device, dtype=torch.bfloat16)
    if name == "flex":
        rivals.flex(256, place.device, causal=True)(q, q, q)
    elif name == "npu_fusion_attention":
        rivals.fused_npu(1, 256, 64)(q, q, q)
    else:
        rivals.sdpa(name)(q, q, q, is_causal=True)
    place.wait()
    return {}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cann() -> str | None:
    try:
        from diffmax_npu.probe import cann_version
    except ImportError:
        return None
    return cann_version() or None


def _triton_key() -> str:
    """What Triton's cache knows this installation by: two machines that share it can share compiled kernels."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        return "unknown"
    return hashlib.sha256(triton_key().encode()).hexdigest()[:16]


def _cached() -> int:
    """Kernels that Triton's cache held already."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", ""))
    return sum(1 for _ in folder.glob("*/*.cubin")) if folder.is_dir() else 0
