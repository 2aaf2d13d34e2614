"""`python -m benchmarks.bench_attention_options`: what each option of attention costs on the CPU, relative to the plain call.

One head on one thread, in processor time, forward alone and forward with backward; scores as in `bench_attention`. Before the
clock each option's output and gradients are compared with `reference` in float64. Who fails gets no number.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

import diffmax
from benchmarks import harness
from benchmarks.attention_options import ALPHA, OPTIONS, learned
from benchmarks.bench_attention import CHECKED, HEAD_SIZE, KINDS, Attention, difference, inputs, outcome, step
from benchmarks.harness import Call, Row
from diffmax.operators.attention import call as building

Options = Callable[[int], Row]

LENGTH = 2048
BACKENDS = ("numba", "cpu")


def main(arguments: list[str]) -> None:
    harness.run("bench_attention_options", __doc__, arguments, cells, run_case, 5, table)


def cells(quick: bool) -> list[Row]:
    return harness.grid(
        backend=BACKENDS,
        kind=KINDS,
        operation=("forward", "both"),
        length=(256 if quick else LENGTH,),
        alpha=(ALPHA,),
        threads=(1,),
    )


def run_case(case: Row, rounds: int, options: dict[str, Options] = OPTIONS) -> list[Row]:
    """One row per option."""

    def prepare(name: str) -> tuple[Row, Call]:
        given = options[name](case["length"])
        function = attend(case["backend"], given)
        call = step(function, inputs(case["kind"], case["length"]), case["operation"], learned(given))
        return {"reason": fault(case["backend"], case["kind"], options[name])}, call

    rows = {name: {"option": name, **case} for name in options}
    return harness.measure(rows, prepare, rounds, ("plain",), memory=lambda call: {})


def attend(backend: str, given: Row) -> Attention:
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = diffmax.attention(query, key, value, **{"alpha": ALPHA, "backend": backend, **given})
        return out[0] if given.get("return_stats") else out

    return function


def fault(backend: str, kind: str, make: Options) -> str | None:
    """What is wrong with an option's output and gradients, None if nothing is."""
    seed = torch.tensor([1, 2])

    def found(name: str, dtype: torch.dtype) -> list[Tensor]:
        given = make(CHECKED)
        with mock.patch.object(building, "draw_seed", lambda p, _device: seed if p > 0 else None):
            return outcome(attend(name, given), inputs(kind, CHECKED, seed=1), dtype, learned(given))

    return difference(found(backend, torch.float32), found("reference", torch.float64))


def table(rows: list[Row]) -> str:
    title = f"one head of size {HEAD_SIZE}, float32, alpha {ALPHA}, one thread; times the plain call's time"
    tables = ("backend", "operation", "length")
    return harness.table(title, rows, "plain", tables=tables, lines=("option",), columns="kind", who="option")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
