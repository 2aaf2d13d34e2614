"""`python -m benchmarks.bench_loss`: a training step's loss and its gradient at the size of a language model's vocabulary.

A call is forward and backward: the mean loss of a batch of rows and its gradient for the scores. Contestants are cross-entropy
and entmax's losses, in processor time on one thread. Before the clock each must pass a check: the loss and the gradient against
`diffmax.reference` in float64, row by row (cross-entropy: against itself in float64). Who fails gets no number.
"""

from __future__ import annotations

from collections.abc import Callable

import entmax
import torch
from torch import Tensor

import diffmax
from benchmarks import harness
from benchmarks.harness import Call, Row
from benchmarks.memory import peak_bytes
from diffmax import reference

Loss = Callable[[Tensor, Tensor], Tensor]

CLASSES = (32768, 131072)
ALPHAS = (0.5, 0.85)
SIGMAS = (1.0, 5.0)
DTYPES = ("float32", "bfloat16")
SMALL, LARGE = 8, 64  # rows; a small batch is one block of `diffmax.operators.loss.terms`, a large one is several
SAMPLE_ROWS = 4
OWN_ULP, RIVAL_ULP = 16, 256


def main(arguments: list[str]) -> None:
    def run(case: Row, rounds: int) -> list[Row]:
        return run_case(case, contestants(case["alpha"], case["dtype"], case["rows"]), rounds)

    harness.run("bench_loss", __doc__, arguments, cells, run, 3, table)


def cells(quick: bool) -> list[Row]:
    classes = (512,) if quick else CLASSES
    return harness.grid(n=classes, rows=(SMALL, LARGE), alpha=ALPHAS, sigma=SIGMAS, dtype=DTYPES, threads=(1,))


def contestants(alpha: float, dtype: str, rows: int) -> dict[str, Loss]:
    """Loss by name. entmax computes in its input's dtype, so bfloat16 is no fair test of it; entmax15 is alpha = 0.5 alone."""
    field: dict[str, Loss] = {
        "cross_entropy": torch.nn.functional.cross_entropy,
        "diffmax_loss": lambda x, y: diffmax.diffmax_loss(x, y, alpha),
    }
    if dtype == "float32" and rows == SMALL:
        field["entmax_bisect_loss"] = lambda x, y: entmax.entmax_bisect_loss(x, y, 2 - alpha).mean()
        if alpha == 0.5:
            field["entmax15_loss"] = lambda x, y: entmax.entmax15_loss(x, y).mean()
            field["entmax15_loss[k=100]"] = lambda x, y: entmax.entmax15_loss(x, y, 100).mean()
    return field


def run_case(case: Row, field: dict[str, Loss], rounds: int) -> list[Row]:
    """One row per contestant; who fails its check, or raises, is not timed and keeps the reason."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(case["rows"], case["n"], generator=generator) * case["sigma"]
    x = scores.to(getattr(torch, case["dtype"])).requires_grad_()
    y = torch.randint(case["n"], (case["rows"],), generator=generator)

    def prepare(name: str) -> tuple[Row, Call]:
        return {"reason": fault(name, field[name], x, y, case["alpha"])}, lambda: torch.autograd.grad(field[name](x, y), x)

    def memory(call: Call) -> Row:
        return {"peak_tensors": round(peak_bytes(call) / x.nbytes, 2)}

    rows = {name: {"contestant": name, **case} for name in field}
    return harness.measure(rows, prepare, rounds, ("cross_entropy",), memory)


def fault(name: str, loss: Loss, x: Tensor, y: Tensor, alpha: float) -> str | None:
    """What is wrong with a contestant's loss and gradient on a few rows, None if nothing is."""
    x, y = x[:SAMPLE_ROWS].detach().requires_grad_(), y[:SAMPLE_ROWS]
    value = loss(x, y)
    grad = torch.autograd.grad(value, x)[0]
    exact_value, exact_grad = exact(x.detach().double(), y, None if name == "cross_entropy" else alpha)
    eps, allowed = torch.finfo(x.dtype).eps, OWN_ULP if name == "diffmax_loss" else RIVAL_ULP
    errors = {
        "loss": abs(value.item() - exact_value) / max(1.0, abs(exact_value)) / eps,
        "gradient": ((grad.double() - exact_grad).abs().max() / exact_grad.abs().max()).item() / eps,
    }
    return next((f"the {what} errs by {e:.1f} ulp, allowed {allowed}" for what, e in errors.items() if not e <= allowed), None)


def exact(x: Tensor, y: Tensor, alpha: float | None) -> tuple[float, Tensor]:
    """The mean loss and its gradient in float64, from their definitions."""
    onehot = torch.nn.functional.one_hot(y, x.shape[1])
    if alpha is None:
        return torch.nn.functional.cross_entropy(x, y).item(), (x.softmax(1) - onehot) / len(x)
    e = 1 - alpha
    p = reference.bisect(x, e, 1, 200, True)[0]
    losses = (1 - (p ** (1 + e)).sum(1)) / (e * (1 + e)) + ((p - onehot) * x).sum(1)
    return losses.mean().item(), (p - onehot) / len(x)


def table(rows: list[Row]) -> str:
    title = "forward and backward, one thread; times cross-entropy's time (peak memory beyond the scores, in tensors like them)"
    lines = ("n", "rows", "alpha", "sigma", "dtype")
    return harness.table(title, rows, "cross_entropy", lines=lines, note=lambda row: f" ({row['peak_tensors']:.2f})")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
