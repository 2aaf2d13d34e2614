"""`python -m benchmarks.bench_attention`: fused attention on the CPU, against torch's softmax attention and unfused diffmax.

One head on one thread, in processor time, forward alone and forward with backward. Scores are of three kinds: "randn" is
what an untrained model has, where nothing is sparse; "sharp" is randn, three times as wide on both sides, where rows are
sparse but tiles are not; "local" has queries that look at keys near their own place, where most tiles are empty. The measured
share of empty tiles is in every row. Before the clock the output and gradients of each contestant are compared with
`diffmax.reference.attention` in float64 (torch's own: with itself in float64). Who fails gets no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import diffmax
from benchmarks import harness
from benchmarks.harness import Call, Row

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

LENGTHS = (1024, 4096)
ALPHAS = (0.5, 0.85)
KINDS = ("randn", "sharp", "local")
HEAD_SIZE = 64
CHECKED = 512  # the length at which outputs are compared: float64 in full
ULP = 256  # of the largest entry; scores of a hundred have an error of their own


def main(arguments: list[str]) -> None:
    def run(case: Row, rounds: int) -> list[Row]:
        return run_case(case, contestants(case["alpha"], case["causal"]), rounds)

    harness.run("bench_attention", __doc__, arguments, cells, run, 3, table)


def cells(quick: bool) -> list[Row]:
    lengths, operations = (256,) if quick else LENGTHS, ("forward", "both")
    return harness.grid(length=lengths, kind=KINDS, alpha=ALPHAS, causal=(False, True), operation=operations, threads=(1,))


def inputs(kind: str, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 1, length, HEAD_SIZE, generator=generator).unbind()
    if kind == "sharp":
        return query * 3, key * 3, value
    if kind == "local":
        waves = torch.arange(length).view(-1, 1) / 8 * torch.linspace(0.05, 1, HEAD_SIZE // 2)
        place = torch.cat([waves.cos(), waves.sin()], 1).view(1, 1, length, HEAD_SIZE) * 4
        return place + query / 10, place + key / 10, value
    return query, key, value


def contestants(alpha: float, causal: bool) -> dict[str, Attention]:
    def unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT / math.sqrt(HEAD_SIZE)
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        return diffmax.diffmax_bisect(scores, alpha) @ value

    def fused(backend: str) -> Attention:
        return lambda q, k, v: diffmax.attention(q, k, v, is_causal=causal, alpha=alpha, backend=backend)

    return {
        "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal),
        "unfused": unfused,
        **{name: fused(name) for name in ("cpu", "numba") if name in {record.backend for record in diffmax.backends()}},
    }


def run_case(case: Row, field: dict[str, Attention], rounds: int) -> list[Row]:
    """One row per contestant; who fails its check, or raises, is not timed and keeps the reason."""
    tensors = inputs(case["kind"], case["length"])
    options = {"is_causal": case["causal"], "alpha": case["alpha"]}
    empty = diffmax.attention(*tensors, **options, return_stats=True)[1].tile_sparsity.item()
    rows = {name: {"contestant": name, **case, "empty_tiles": round(empty, 3)} for name in field}

    def prepare(name: str) -> tuple[Row, Call]:
        return {"reason": fault(name, field[name], case)}, step(field[name], tensors, case["operation"])

    return harness.measure(rows, prepare, rounds, ("sdpa",))


def step(function: Attention, tensors: Sequence[Tensor], operation: str, learned: Sequence[Tensor] = ()) -> Call:
    """What is timed: the forward pass, or "both" with the gradients for the tensors and for what else is learned."""
    if operation == "forward":
        return torch.no_grad()(lambda: function(*tensors))
    leaves = [t.clone().requires_grad_() for t in tensors]
    grad = torch.ones_like(leaves[2])
    return lambda: torch.autograd.grad(function(*leaves), (*leaves, *learned), grad)


def fault(name: str, function: Attention, case: Row) -> str | None:
    """What is wrong with a contestant's output and gradients, None if nothing is."""
    tensors = inputs(case["kind"], min(case["length"], CHECKED), seed=1)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if name == "sdpa":
            return scaled_dot_product_attention(query, key, value, is_causal=case["causal"])
        options = {"is_causal": case["causal"], "alpha": case["alpha"], "backend": "reference"}
        return diffmax.attention(query, key, value, **options)

    return difference(outcome(function, tensors, torch.float32), outcome(exact, tensors, torch.float64))


def outcome(function: Attention, tensors: Sequence[Tensor], dtype: torch.dtype, learned: Sequence[Tensor] = ()) -> list[Tensor]:
    """The output and the gradients for the tensors and for what else is learned."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, (*leaves, *learned), torch.ones_like(out))]


def difference(results: list[Tensor], exact: list[Tensor]) -> str | None:
    """Which of some outcome's results errs, None if none does."""
    inputs_and_options = ("query", "key", "value", *["an option"] * (len(results) - 4))
    names = ("the output", *(f"the gradient for {what}" for what in inputs_and_options))
    for what, got, truth in zip(names, results, exact, strict=True):
        # a gradient whose entries cancel is judged by the size of what is summed
        error = ((got - truth).abs().mean() / truth.abs().max().clamp_min(1.0)).item() / torch.finfo(torch.float32).eps
        if not error <= ULP:
            return f"{what} errs by {error:.0f} ulp, allowed {ULP}"
    return None


def table(rows: list[Row]) -> str:
    title = "one head of size 64, float32, one thread; times sdpa's time (peak memory in MB)"
    lines = ("length", "kind", "alpha", "causal", "operation", "empty_tiles")
    return harness.table(title, rows, "sdpa", lines=lines, note=lambda row: f" ({row['peak_bytes'] / 1e6:.0f})")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
