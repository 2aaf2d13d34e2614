"""`python -m benchmarks.bench_context_parallel`: attention over a sharded sequence, beside torch's ring attention.

Two and four processes of a gloo group, one thread each; 4,096 tokens of N(0, 1), 8 heads of 64. The base is the ring of torch
(`torch.distributed.tensor.experimental`, what `context_parallel` runs on a GPU) on torch's own CPU kernel. The context itself
refuses CPU tensors, so its ring is called here by its private name. Causal calls are in the zigzag layout, which is that of
torch's load balancer.

Of each call, forward alone and forward with backward: the wall clock of the slowest rank, as a multiple of the ring's time; the
bytes that a rank sends, as the loopback interface counts them, with everything around the payload; the peak of what torch
allocates on rank 0. Contestants take turns in lockstep on all ranks: `harness.measure`, which decides from its own clock how
often it calls, would part them. What a contestant returns, and its gradients, are compared with the whole sequence first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.memory import peak_bytes
from benchmarks.timing import summarize
from diffmax.distributed import attention_context_parallel

HEADS, HEAD_DIM = 8, 64
ALLOWED = 2e-5  # of the largest entry
BASE = "torch's ring"
METHODS = ("ulysses", "all_gather", "live_blocks")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(arguments: list[str]) -> None:
    options = harness.command_line("bench_context_parallel", __doc__ or "").parse_args(arguments)

    def found() -> Row:
        return {"rows": [row for ranks in (2, 4) for row in on_ranks(ranks, options.quick)]}

    harness.publish("bench_context_parallel", arguments, options.output, found, lambda result: table(result["rows"]))


def cells(quick: bool) -> list[Row]:
    return harness.grid(length=[256 if quick else 4096], causal=[True, False], alpha=[0.5], operation=["forward", "both"])


def on_ranks(ranks: int, quick: bool) -> list[Row]:
    """The rows of all cells, measured by the first of so many processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, folder, quick), nprocs=ranks)
        rows: list[Row] = json.loads(Path(folder, "rows").read_text())
    return rows


def _rank(rank: int, ranks: int, folder: str, quick: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=600))
    rows = [row for cell in cells(quick) for row in run_case({"ranks": ranks, **cell}, 2 if quick else 7)]
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps(rows))
    dist.destroy_process_group()


def run_case(case: Row, rounds: int) -> list[Row]:
    """The rows of a cell, the same on every rank of the default group."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 1, HEADS, case["length"], HEAD_DIM, generator=generator).unbind()
    own = [of_this_rank(t, case["causal"]) for t in whole]
    field = contestants(case)
    rows: dict[str, Row] = {name: {"contestant": name, **case} for name in field}
    calls = {}
    for name, (function, unsharded) in field.items():
        reason = fault(function, unsharded, whole, own, case["causal"])
        rows[name] |= {"correct": reason is None, "reason": reason}
        if reason is None:
            calls[name] = step(function, own, case["operation"])
            peak = peak_bytes(calls[name])
            dist.barrier()
            before = sent_bytes()
            calls[name]()
            dist.barrier()
            rows[name] |= {"peak_bytes": peak, "sent_bytes": (sent_bytes() - before) // case["ranks"]}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            samples[name].append(float(seconds))
    for name, times in samples.items():
        rows[name] |= {**summarize(times), "clock": "wall"}
    for row in rows.values():
        has_both = "median_s" in row and "median_s" in rows[BASE]
        row[f"ratio_{BASE}"] = round(row["median_s"] / rows[BASE]["median_s"], 3) if has_both else None
    return list(rows.values())


def contestants(case: Row) -> dict[str, tuple[Attention, Attention]]:
    """By name: attention of this rank's tokens, and the same of whole sequences."""
    options: dict[str, Any] = {"is_causal": case["causal"], "alpha": case["alpha"]}
    layout = "zigzag" if case["causal"] else "contiguous"

    def sharded(method: Any) -> Attention:
        return lambda q, k, v: attention_context_parallel(q, k, v, method=method, layout=layout, **options)

    def ring(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = Ring.apply(query, key, value, case["causal"])
        return result

    return {
        BASE: (ring, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=case["causal"])),
        **{name: (sharded(name), lambda q, k, v: diffmax.attention(q, k, v, **options)) for name in METHODS},
    }


class Ring(torch.autograd.Function):
    """torch's ring attention, with the CPU kernel of `scaled_dot_product_attention`: keys and values go round the ranks."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        ring = _ring(causal)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse, *_ = ring._templated_ring_attention(dist.group.WORLD, 2, kernel, query, key, value, causal)
        ctx.causal = causal
        ctx.save_for_backward(query, key, value, out, lse)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        ring = _ring(ctx.causal)

        def kernel(**given: Any) -> tuple[Tensor, ...]:
            results: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                given["grad_out"].contiguous(),
                *(given[name] for name in ("query", "key", "value", "out", "logsumexp")),
                dropout_p=0.0,
                is_causal=given["is_causal"],
            )
            return results

        found = ring._templated_ring_attention_backward(
            dist.group.WORLD, 2, kernel, grads[0], "grad_out", query, key, value, out, lse, ctx.causal
        )
        return *found[:3], None


def _ring(causal: bool) -> Any:
    """torch's module, told whether tokens lie in its load balancer's order."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _attention._cp_options.enable_load_balance = causal
    return _attention


def of_this_rank(whole: Tensor, zigzag: bool, dim: int = 2) -> Tensor:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if not zigzag:
        return whole.chunk(ranks, dim)[rank].contiguous()
    runs = whole.chunk(2 * ranks, dim)
    return torch.cat([runs[rank], runs[2 * ranks - 1 - rank]], dim)


def step(function: Attention, tensors: list[Tensor], operation: str) -> Callable[[], object]:
    if operation == "forward":
        return torch.no_grad()(lambda: function(*tensors))
    leaves = [t.clone().requires_grad_() for t in tensors]
    grad = torch.ones_like(leaves[2])
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def fault(function: Attention, unsharded: Attention, whole: tuple[Tensor, ...], own: list[Tensor], zigzag: bool) -> str | None:
    """What is wrong on some rank with the result and the gradients, None if nothing is."""
    leaves = [[t.clone().requires_grad_() for t in tensors] for tensors in (own, whole)]
    results = [f(*t) for f, t in zip((function, unsharded), leaves, strict=True)]
    gradients = [torch.autograd.grad(out.square().sum(), t) for out, t in zip(results, leaves, strict=True)]
    errors = []
    for got, exact in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        errors.append((got - of_this_rank(exact.detach(), zigzag)).abs().max() / exact.detach().abs().max())
    worst = torch.stack(errors).double().nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return None if worst.max() <= ALLOWED else f"errs by {worst.max():.2g} of the largest entry, allowed {ALLOWED}"


def sent_bytes() -> int:
    """What all processes of this machine have sent over the loopback interface."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise OSError("/proc/net/dev has no loopback interface: bytes are counted on Linux only")


def table(rows: list[Row]) -> str:
    title = "8 heads of 64, one thread a rank; times the ring's time (MB sent by a rank; MB at the peak of rank 0)"
    lines = ("ranks", "length", "causal", "alpha", "operation")
    return harness.table(
        title, rows, BASE, lines=lines, note=lambda row: f" ({row['sent_bytes'] / 1e6:.1f}; {row['peak_bytes'] / 1e6:.0f})"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
