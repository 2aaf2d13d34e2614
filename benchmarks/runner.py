"""The row operator's benchmarks: what is timed, and which cells and contestants a command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.check import check
from benchmarks.contestants import Contestant, contestants
from benchmarks.environment import cpu_kernels
from benchmarks.harness import Row
from benchmarks.report import table, targets, targets_block
from benchmarks.shapes import Case, cases, takes_part

ROUNDS = {"default": 7, "full": 7, "quick": 3}


def main(bench: str, operations: tuple[str, ...], description: str, arguments: list[str]) -> None:
    options = _parse(bench, description, arguments)
    grid = "full" if options.full else "quick" if options.quick else "default"
    field = [c for c in contestants() if options.only is None or c.name in options.only]
    threads = options.threads or ([1] if options.quick else [1, 2])

    def run(case: Case) -> list[Row]:
        return run_case(case, [c for c in field if takes_part(c.name, case, grid)], ROUNDS[grid])

    def found() -> Row:
        rows = harness.rows_of(cases(operations, grid, tuple(threads)), run)
        return {"targets": [] if options.quick else targets(rows, cpu_kernels()), "rows": rows}

    def show(result: Row) -> str:
        return f"{table(result['rows'])}\n{targets_block(result['targets'])}"

    harness.publish(bench, arguments, options.output, found, show)


def run_case(case: Case, field: list[Contestant], rounds: int) -> list[Row]:
    """One row per contestant. Who fails the check, or raises, is not timed and keeps the reason."""
    x, grad = case.scores()
    by_name = {contestant.name: contestant for contestant in field}
    rows = {name: {"contestant": name, **vars(case)} for name in by_name}

    def prepare(name: str) -> tuple[Row, harness.Call]:
        call, p, grad_x = _prepare(case, by_name[name], x, grad)
        verdict = check(x, grad, p, grad_x, by_name[name].exact_e(case), by_name[name].ours)
        return {"reason": verdict.reason, "error_ulp": verdict.error, "zeros": verdict.zeros}, call

    with harness.threads(case.threads):
        return harness.measure(rows, prepare, rounds, ("softmax", "diffmax"), clock="cpu" if case.threads == 1 else "wall")


def _prepare(case: Case, contestant: Contestant, x: Tensor, grad: Tensor) -> tuple[Callable[[], object], Tensor, Tensor | None]:
    """What is timed, and the weights and gradient that it computes."""
    function = contestant.build(case)
    if case.operation == "forward":
        forward = torch.no_grad()(lambda: function(x))
        return forward, forward(), None

    leaf = x.clone().requires_grad_()
    p = function(leaf)

    def backward() -> Tensor:
        return torch.autograd.grad(p, leaf, grad, retain_graph=True)[0]

    def both() -> Tensor:
        return torch.autograd.grad(function(leaf), leaf, grad)[0]

    call = {"backward": backward, "both": both}[case.operation]
    return call, p.detach(), call()


def _parse(bench: str, description: str, arguments: list[str]) -> argparse.Namespace:
    full = "the whole product of sizes, alphas, sigmas, dtypes and contestants"
    parser = harness.command_line(bench, description, full)
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default: 1 2; quick: 1)")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in contestants()], help="contestants (default: all)")
    return parser.parse_args(arguments)
