"""One decode step against torch's attention with one query: pages left unread, and scores that allow nothing.

    python -m benchmarks.bench_decode              # 4k, 128k and 1M tokens, on one thread; about 3 minutes
    python -m benchmarks.bench_decode --quick

Kinds: "needles" has a few keys that the query looks for, in a cache of small ones: bounds leave nearly all pages unread.
"flat" has scores of unit variance and alpha 0.9: nearly every key has a weight. "spread" has them with alpha 0.5: few weights,
and bounds that cannot tell where, but keys in 4 bits can. Outputs are checked against the float64 reference first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax
from benchmarks import harness
from benchmarks.harness import Call, Row
from diffmax.testing import gates

HEAD_SIZE = 64
KINDS = {"needles": 0.5, "flat": 0.9, "spread": 0.5}  # and their alpha
GROUPS = (1, 8)
LENGTHS = (4096, 131072, 1048576)
CHECKED = 4096
READ = ("pages_read", "pages_read_by_4_bits")


def main(arguments: list[str]) -> None:
    def run(case: Row, rounds: int) -> list[Row]:
        return run_case(case, contestants(case["kind"]), rounds)

    harness.run("bench_decode", __doc__, arguments, cells, run, 7, table)


def cells(quick: bool) -> list[Row]:
    return harness.grid(length=(CHECKED,) if quick else LENGTHS, kind=KINDS, group=GROUPS, threads=(1,))


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

    def ours(backend: str, bounded: bool, rounded: bool = False) -> Callable[..., Tensor]:
        def call(q: Tensor, k_cache: Tensor, v_cache: Tensor, bounds: diffmax.PageBounds) -> Tensor:
            given = bounds if rounded else bounds._replace(codes=None) if bounded else None
            out: Tensor = diffmax.attention_with_kvcache(
                q, k_cache, v_cache, alpha=KINDS[kind], page_bounds=given, backend=backend
            )
            return out

        return call

    installed = {record.backend for record in diffmax.backends()}
    field = {"sdpa": dense}
    for backend in (name for name in ("cpu", "numba") if name in installed):
        field |= {backend: ours(backend, False), f"{backend}, bounds": ours(backend, True)}
        field[f"{backend}, 4 bits"] = ours(backend, True, True)
    return field


def run_case(case: Row, field: dict[str, Callable[..., Tensor]], rounds: int) -> list[Row]:
    """One row per contestant; who fails its check, or raises, is not timed and keeps the reason."""
    tensors = inputs(case["kind"], case["length"], case["group"])
    bounds = diffmax.page_bounds(tensors[1], case["length"], bits=4)
    read = {}
    for what, given in zip(READ, (bounds._replace(codes=None), bounds), strict=True):
        _, stats = diffmax.attention_with_kvcache(*tensors, alpha=KINDS[case["kind"]], page_bounds=given, return_stats=True)
        read[what] = int(stats.pages_read.max())
    found = {
        "alpha": KINDS[case["kind"]],
        "pages": bounds.low.shape[1],
        **read,
        "support": int(stats.support_size.max()),
    }

    def prepare(name: str) -> tuple[Row, Call]:
        return {"reason": fault(name, field[name], case)}, torch.no_grad()(lambda: field[name](*tensors, bounds))

    return harness.measure({name: {"contestant": name, **case, **found} for name in field}, prepare, rounds, ("sdpa",))


def fault(name: str, function: Callable[..., Tensor], case: Row) -> str | None:
    """What is wrong with a contestant's output at a shorter length, None if nothing is."""
    tensors = inputs(case["kind"], min(case["length"], CHECKED), case["group"], seed=1)
    bounds = diffmax.page_bounds(tensors[1], tensors[1].shape[1], bits=4)

    def reference(*given: Tensor) -> Tensor:
        if name == "sdpa":
            return contestants(case["kind"])["sdpa"](*given, bounds)
        return diffmax.attention_with_kvcache(*given, alpha=KINDS[case["kind"]], backend="reference")

    ((exact, allowed),) = gates(reference, *tensors)
    error = float((function(*tensors, bounds).double() - exact).abs().max())
    return None if error <= allowed else f"the output errs by {error:.3g}, allowed {allowed:.3g}"


def table(rows: list[Row]) -> str:
    title = "one key head of size 64, float32, one thread; times sdpa's time"
    return harness.table(title, rows, "sdpa", lines=("length", "kind", "group", "pages", *READ, "support"))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
