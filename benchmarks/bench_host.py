"""`python -m benchmarks.bench_host`: the processor's time for a call of the Triton operators, on any machine.

Triton compiles for an H100 that is not there, and its launcher does nothing: what is left is the work of the host, without the
driver's own. "operator" is the vendor's launcher alone, "public" the public function down to it. Beside each is the ratio to a
call of `torch.add` on one number, torch's own price for an operator. Memory comes from torch's allocator for the CPU.
"""

from __future__ import annotations

import contextlib
import timeit
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton

import diffmax
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.report import target, targets_block
from benchmarks.timing import CLOCKS, summarize
from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax.kernels.triton.decoding.launch import Decoder
from diffmax.kernels.triton.rows.launch import RowOperator
from diffmax.plugin import FEATURES, AttentionCall, Backend, KVCacheCall, Wanted
from diffmax.testing.ahead_of_time import pretending
from diffmax_cuda import configs

BACKEND = "host-time"
GOALS = {"rows": 25, "attention": 60, "decoding": 60}  # microseconds of the operator
_TABLE = configs.table(9, 0)


class Operators(NamedTuple):
    """Those of a vendor."""

    rows: RowOperator
    attention: AttentionOperator
    decoder: Decoder


def operators() -> Operators:
    """For an H100."""
    return Operators(
        RowOperator(lambda device: _TABLE, lambda device: 132, ptx=True),
        AttentionOperator(lambda device: "sm90", lambda device: 132, ptx=True),
        Decoder(lambda device: 132, ptx=True),
    )


# where the backend finds its kernels
_of_backend = operators()
bisect, bisect_backward = _of_backend.rows.bisect, _of_backend.rows.bisect_backward
attention, attention_backward = _of_backend.attention.attention, _of_backend.attention.attention_backward
attention_kvcache = _of_backend.decoder.attention_kvcache


def main(arguments: list[str]) -> None:
    options = harness.command_line("bench_host", __doc__ or "").parse_args(arguments)
    harness.publish("bench_host", arguments, options.output, lambda: found(options.quick), shown)


def found(quick: bool) -> Row:
    batches, number = (3, 10) if quick else (25, 200)
    with harness.threads(1), torch.no_grad(), pretending("sm90"), _registered():
        one, own = torch.zeros(1), calls(operators())
        bodies = {"torch.add": lambda: torch.add(one, one), **own, **public_calls()}
        samples: dict[str, list[float]] = {name: [] for name in bodies}
        for body in bodies.values():
            body()  # compiles
        for _ in range(batches):
            for name, body in bodies.items():
                samples[name].append(timeit.timeit(body, timer=CLOCKS["cpu"], number=number) / number)
    timed: dict[str, Row] = {name: summarize(values) for name, values in samples.items()}
    for row in timed.values():
        row["ratio_add"] = round(row["median_s"] / timed["torch.add"]["median_s"], 2)
    targets = [
        target("host", f"{name}: operator, us per call", "<=", GOALS[name.split(",")[0]], 1e6 * timed[name]["median_s"])
        for name in own
    ]
    return {"triton": triton.__version__, "calls": timed, "targets": targets}


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    """A backend of these operators, for the public functions."""
    module = __spec__.name if __spec__ else __name__
    names = ("bisect", "bisect_backward", "attention", "attention_backward", "attention_kvcache")
    diffmax.register_backend(
        Backend(
            name=BACKEND,
            device_types=("cpu",),
            kernels={name: f"{module}:{name}" for name in names},
            dtypes=(torch.bfloat16, torch.float32),
            features=frozenset(FEATURES),
            automatic=False,
        )
    )
    try:
        yield
    finally:
        diffmax.unregister_backend(BACKEND)


def calls(of: Operators) -> dict[str, Callable[[], Any]]:
    """Calls of the operators by name."""
    rows, attention, decoder = of
    x, q = torch.zeros(64, 1024, dtype=torch.bfloat16), torch.zeros(1, 8, 128, 64, dtype=torch.bfloat16)
    weights, top = torch.zeros_like(x), torch.zeros(64, 1)
    causal = AttentionCall(scale=0.125, e=0.5, right=0)
    query, caches, given, low = _decoding()
    plain, bounded = KVCacheCall(**given), KVCacheCall(**given, low=low, high=low)
    kept = attention.attention(q, q, q, causal, True, False)
    return {
        "rows": lambda: rows.bisect(x, 0.15, 1, 50, True),
        "rows, backward": lambda: rows.bisect_backward(weights, weights, top, top, None, 0.15, 1, False),
        "attention": lambda: attention.attention(q, q, q, causal, False, False),
        "attention, training": lambda: attention.attention(q, q, q, causal, True, False),
        "attention, backward": lambda: attention.attention_backward(kept.out, q, q, q, kept.saved, causal, Wanted()),
        "decoding": lambda: decoder.attention_kvcache(query, *caches, plain, False),
        "decoding, bounds": lambda: decoder.attention_kvcache(query, *caches, bounded, False),
    }


def public_calls() -> dict[str, Callable[[], Any]]:
    """The same by the public functions."""
    x, q = torch.zeros(64, 1024, dtype=torch.bfloat16), torch.zeros(1, 8, 128, 64, dtype=torch.bfloat16)
    query, caches, given, _ = _decoding()
    lengths, k, v = given["cache_seqlens"], given["k"], given["v"]
    return {
        "public: rows": lambda: diffmax.diffmax_bisect(x, 0.85, backend=BACKEND),
        "public: attention": lambda: diffmax.attention(q, q, q, alpha=0.5, is_causal=True, backend=BACKEND),
        "public: decoding": lambda: diffmax.attention_with_kvcache(
            query, *caches, k, v, cache_seqlens=lengths, causal=True, alpha=0.5, backend=BACKEND
        ),
    }


def _decoding() -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], dict[str, Any], torch.Tensor]:
    """A query, the caches of 4096 tokens, a call with a new token, and bounds."""

    def zeros(*shape: int, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind)

    new = zeros(1, 1, 2, 128)
    given = {"scale": 0.1, "e": 0.5, "cache_seqlens": zeros(1, kind=torch.int32), "k": new, "v": new, "right": 0}
    return zeros(1, 1, 16, 128), (zeros(1, 4096, 2, 128), zeros(1, 4096, 2, 128)), given, zeros(1, 64, 2, 128)


def shown(result: Row) -> str:
    lines = [f"{'call':>22}  {'us':>7}  {'p20':>7}  {'p80':>7}  times torch.add"]
    for name, row in result["calls"].items():
        low, middle, high = (1e6 * row[key] for key in ("p20_s", "median_s", "p80_s"))
        lines.append(f"{name:>22}  {middle:7.1f}  {low:7.1f}  {high:7.1f}  {row['ratio_add']:.1f}")
    return "\n".join([*lines, targets_block(result["targets"])])


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
