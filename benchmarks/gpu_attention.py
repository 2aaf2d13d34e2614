"""Attention's part of `python -m benchmarks.bench_gpu`: a sweep over block sparsity and lengths, and scores as they come.

Sparse cases are causal, with keys that lose score linearly with their distance, so that a band of tiles is live; the share of
empty tiles that a row reports is measured, not asked for. Contestants get the same tensors in the same run.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax
from benchmarks import captured

SPARSITIES = ((4096, 0.51), (8192, 0.58), (16384, 0.64), (32768, 0.70), (65536, 0.75), (131072, 0.85))
EVERY_SPARSITY = (0.0, 0.25, 0.51, 0.58, 0.64, 0.70, 0.75, 0.85)
LENGTHS = (4096, 16384, 32768, 65536, 131072)
HEADS, HEAD_DIM = 16, 64
PASSES = ("forward", "backward", "both")
KEYS = ("length", "alpha", "scores", "sparsity", "heads", "head_dim", "dtype")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases() -> Iterator[dict[str, Any]]:
    """The cells of AdaSplash-2's figure first, then randn and what an encoder computes, then the sweep at 16k and 32k."""
    common = {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    for length, sparsity in SPARSITIES:
        yield {"length": length, "alpha": 0.5, "scores": "band", "sparsity": sparsity, **common}
    for length in LENGTHS:
        for alpha in (0.5, 0.9):
            yield {"length": length, "alpha": alpha, "scores": "randn", "sparsity": 0.0, **common}
    for length in (4096, 16384):
        for alpha in (0.5, 0.9):
            sizes = {"heads": captured.HEADS, "head_dim": captured.HEAD_DIM}
            yield {"length": length, "alpha": alpha, "scores": "captured", "sparsity": 0.0, **common, **sizes}
    for length in (16384, 32768):
        for sparsity in EVERY_SPARSITY:
            if (length, sparsity) not in SPARSITIES:
                yield {"length": length, "alpha": 0.5, "scores": "band", "sparsity": sparsity, **common}


def tensors(case: dict[str, Any], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (1, H, L, D)."""
    if case["scores"] == "captured":
        query, key, value = (t.clone().to(device, getattr(torch, case["dtype"])) for t in captured.captured(case["length"]))
        return query, key, value
    generator = torch.Generator(device).manual_seed(case["length"])
    shape = (1, case["heads"], case["length"], case["head_dim"])
    query, key, value = (torch.randn(shape, device=device, generator=generator) for _ in range(3))
    if case["scores"] == "band":
        e = 1 - case["alpha"]
        keys = (1 - math.sqrt(case["sparsity"])) * case["length"]  # of the causal triangle, 1 - (1 - keys / length)^2 is live
        # scores that fall by `slope` per key have a band of that many: the sum of (e slope j)^(1/e) over it is 1
        slope = (keys ** (-1 / e - 1) * (1 / e + 1)) ** e / e
        query = query * (slope * keys / 20)  # noise that widens the band by little
        query[..., 0] = math.sqrt(case["head_dim"])
        key[..., 0] = torch.arange(case["length"], device=device) * slope
    dtype = getattr(torch, case["dtype"])
    return query.to(dtype), key.to(dtype), value.to(dtype)


def contestants(case: dict[str, Any]) -> dict[str, Attend]:
    """By name; who is not installed, or cannot run, says so in its row."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    field: dict[str, Attend] = {
        "diffmax": functools.partial(diffmax.attention, is_causal=True, alpha=case["alpha"]),
        "sdpa_flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "flex": _flex,
    }
    try:
        from adasplash import adasplash_v1, adasplash_v2
    except ImportError:
        return field
    field["adasplash_1"] = lambda q, k, v: adasplash_v1(q, k, v, alpha=2 - case["alpha"], is_causal=True)
    if case["alpha"] == 0.5:
        field["adasplash_2"] = lambda q, k, v: adasplash_v2(q, k, v)
    return field


@functools.lru_cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    length = query.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=query.device.type)
    out: Tensor = _compiled_flex()(query, key, value, block_mask=mask)
    return out


def measure(
    rows: list[dict[str, Any]],
    write: Callable[[], None],
    deadline: float,
    timed: Callable[[Callable[[], object]], dict[str, Any]],
) -> None:
    """Append a row per contestant and case to `rows` until all are there or the time is up."""
    seen = {tuple(row[key] for key in KEYS) for row in rows}
    for case in cases():
        if tuple(case[key] for key in KEYS) in seen:
            continue
        if time.monotonic() > deadline:
            print("bench_gpu: the time is up before all of attention was measured; go on with --resume")
            return
        try:
            query, key, value = tensors(case, "cuda")
        except ImportError as error:
            print(f"bench_gpu: {case['scores']} scores are left out: {error}")
            continue
        _, stats = diffmax.attention(query, key, value, is_causal=True, alpha=case["alpha"], return_stats=True)
        empty = float(stats.tile_sparsity.float().mean())
        for name, attend in contestants(case).items():
            row = {"contestant": name, **case, "empty_tiles": empty}
            try:
                row |= measured(attend, query, key, value, timed)
            except (RuntimeError, ValueError, TypeError, AssertionError, ImportError) as error:
                row["reason"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            rows.append(row)
        write()


def measured(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    timed: Callable[[Callable[[], object]], dict[str, Any]],
    learned: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """First call in seconds, then milliseconds and peak memory of each pass, with gradients for `learned` too."""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    wanted = [*leaves, *learned]
    started = time.monotonic()
    out = attend(*leaves)
    grad = torch.randn_like(out)
    torch.autograd.grad(out, wanted, grad, retain_graph=True)[0].sum().item()
    result: dict[str, Any] = {"first_call_s": round(time.monotonic() - started, 3)}
    calls: dict[str, Callable[[], object]] = {
        "forward": torch.no_grad()(lambda: attend(query, key, value)),
        "backward": lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True),
        "both": lambda: torch.autograd.grad(attend(*leaves), wanted, grad),
    }
    for name in PASSES:
        result |= {f"{name}_{key}": number for key, number in timed(calls[name]).items()}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """diffmax's times over those of flash attention in the same case."""
    by_case: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(tuple(row[key] for key in KEYS), {})[row["contestant"]] = row
    lines = [f"{'length':>7} alpha {'scores':6} {'empty':>6} " + " ".join(f"{name:>9}" for name in PASSES) + "  times flash"]
    for (length, alpha, scores, *_), found in by_case.items():
        own, flash = found["diffmax"], found.get("sdpa_flash", {})
        ratios = (own.get(f"{p}_median_ms", math.nan) / flash.get(f"{p}_median_ms", math.nan) for p in PASSES)
        lines.append(f"{length:7} {alpha:5} {scores:6} {own['empty_tiles']:6.2f} " + " ".join(f"{r:9.2f}" for r in ratios))
    return "\n".join(lines)
