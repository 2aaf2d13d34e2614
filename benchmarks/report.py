"""The table of a result, and its numbers held against the project's goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row

PURE_KERNEL = "diffmax.kernels.cpu.rows:bisect"
MAX_TENSORS = 8  # far below one tensor per Newton step, of which there are up to 30


def table(rows: list[Row]) -> str:
    """Per cell: softmax's time, everybody's as a multiple of it, and diffmax's zeros and peak memory."""
    title = "times softmax's time (of diffmax: share of zeros, peak memory in tensors like the input)"
    return harness.table(
        title, rows, "softmax", tables=("operation", "dtype", "threads"), lines=("n", "alpha", "sigma"), note=_note
    )


def _note(row: Row) -> str:
    return f" ({row['zeros']:.1%}, {_tensors(row):.1f})" if row["contestant"] == "diffmax" else ""


def targets(rows: list[Row], kernels: dict[str, str]) -> list[dict[str, Any]]:
    """The goals that these rows can speak about. `kernels`: what runs behind which contestant; "diffmax" is what users get."""
    pure = next((name for name, kernel in kernels.items() if kernel == PURE_KERNEL), "diffmax")
    at_1024 = {"operation": "forward", "n": 1024, "alpha": 0.85, "dtype": "float32", "threads": 1}
    small = [r for n in (16, 64, 336) for alpha in (0.1, 0.3) for r in _rows(rows, **{**at_1024, "n": n, "alpha": alpha})]
    two_threads = _rows(rows, **{**at_1024, "threads": 2}, sigma=1)
    backward = {**at_1024, "operation": "backward"}
    one = "n=1024, alpha=0.85, float32, one thread"
    plain, first = "pure-PyTorch kernel", "the kernel that users get" if pure != "diffmax" else "goal of the compiled kernel"
    found = [
        target(
            plain, f"speed-up over entmax_bisect, N(0,1), {one}", ">=", 12, _speed_up(_rows(rows, **at_1024, sigma=1), pure)
        ),
        *(
            target(
                plain, f"largest peak of {what}, float32, in tensors like the input", "<=", MAX_TENSORS, _peak(rows, what, pure)
            )
            for what in ("forward", "both")
        ),
        target(first, f"times softmax, N(0,1), {one}", "<=", 3, _worst(_rows(rows, **at_1024, sigma=1))),
        target(first, f"speed-up over entmax_bisect, N(0,1), {one}", ">=", 100, _speed_up(_rows(rows, **at_1024, sigma=1))),
        target(first, f"times softmax, N(0,10), {one}", "<=", 1, _worst(_rows(rows, **at_1024, sigma=10))),
        target(first, "times softmax, n=16 to 336, alpha=0.1 to 0.3, worst of any sigma, one thread", "<=", 4, _worst(small)),
        target(first, "times softmax, N(0,1), n=1024, alpha=0.85, float32, two threads", "<=", 3, _worst(two_threads)),
        *(
            target(first, f"backward, times softmax's, {what}, {one}", "<=", 2, _worst(_rows(rows, **backward, sigma=sigma)))
            for what, sigma in (("N(0,1)", 1), ("N(0,10)", 10))
        ),
    ]
    return [goal for goal in found if goal is not None]


def targets_block(found: list[dict[str, Any]]) -> str:
    lines = [f"  {t['kernel']}: {t['what']} {t['sign']} {t['goal']:g}: {verdict(t)}" for t in found]
    return "\n".join(["\ntargets:", *(lines or ["  none judged: their cells were not measured at full size"])])


def verdict(target: dict[str, Any]) -> str:
    return f"{'met' if target['met'] else 'missed'} ({target['value']:.3g})"


def target(kernel: str, what: str, sign: str, goal: float, value: float | None) -> dict[str, Any] | None:
    if value is None:
        return None
    met = value >= goal if sign == ">=" else value <= goal
    return {"kernel": kernel, "what": what, "sign": sign, "goal": goal, "value": float(f"{value:.4g}"), "met": met}


def _rows(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if row["correct"] and all(row[key] == value for key, value in wanted.items())]


def _speed_up(rows: list[Row], name: str = "diffmax") -> float | None:
    times = {row["contestant"]: row["median_s"] for row in rows}
    return times["entmax_bisect"] / times[name] if {"entmax_bisect", name} <= times.keys() else None


def _worst(rows: list[Row]) -> float | None:
    return _largest(rows, lambda row: row["ratio_softmax"] if row["contestant"] == "diffmax" else None)


def _peak(rows: list[Row], operation: str, name: str) -> float | None:
    return _largest(_rows(rows, operation=operation, dtype="float32", contestant=name), _tensors)


def _largest(rows: Iterable[Row], value: Callable[[Row], float | None]) -> float | None:
    return max((v for row in rows if (v := value(row)) is not None), default=None)


def _tensors(row: Row) -> float:
    return row["peak_bytes"] / (row["rows"] * row["n"] * {"float32": 4, "bfloat16": 2}[row["dtype"]])
