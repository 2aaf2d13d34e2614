"""The table of a result, and its numbers held against the project's goals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

PURE_KERNEL = "diffmax.kernels.cpu.rows:bisect"
MAX_TENSORS = 8  # far below one tensor per Newton step, of which there are up to 30
NOISY = 1.5
COLUMNS = ("softmax_compiled", "diffmax", "entmax_bisect", "entmax15", "sparsemax")

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """Per cell: softmax's time, everybody's as a multiple of it, and diffmax's peak memory in tensors like the input.

    A "~" marks what should be measured again on a quieter machine: the slow and the fast fifth of its samples, or of
    softmax's, are more than `NOISY` apart.
    """
    extra = sorted({row["contestant"] for row in rows} - {"softmax", *COLUMNS})
    names = [*COLUMNS[:2], *extra, *COLUMNS[2:]]
    header = ["n", "alpha", "sigma", "softmax", *names, "zeros", "peak"]
    lines = []
    for (threads, dtype, operation), group in itertools.groupby(sorted(rows, key=_group), _group):
        lines.append(f"\n{operation}, {dtype}, threads: {threads}. Times softmax's time; peak in tensors like the input")
        body = [_line(list(cell), names) for _, cell in itertools.groupby(group, lambda r: (r["n"], r["alpha"], r["sigma"]))]
        widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
        lines += ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in [header, *body]]
    failed = [f"  {r['contestant']}, {_where(r)}: {r['reason']}" for r in rows if not r["correct"]]
    if failed:
        lines += ["\nnot correct, so not timed:", *failed[:20], *([f"  and {len(failed) - 20} more"] * (len(failed) > 20))]
    return "\n".join(lines)


def _group(row: Row) -> tuple[int, str, str]:
    return row["threads"], row["dtype"], row["operation"]


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
        _target(
            plain, f"speed-up over entmax_bisect, N(0,1), {one}", ">=", 12, _speed_up(_rows(rows, **at_1024, sigma=1), pure)
        ),
        *(
            _target(
                plain, f"largest peak of {what}, float32, in tensors like the input", "<=", MAX_TENSORS, _peak(rows, what, pure)
            )
            for what in ("forward", "both")
        ),
        _target(first, f"times softmax, N(0,1), {one}", "<=", 3, _worst(_rows(rows, **at_1024, sigma=1))),
        _target(first, f"speed-up over entmax_bisect, N(0,1), {one}", ">=", 100, _speed_up(_rows(rows, **at_1024, sigma=1))),
        _target(first, f"times softmax, N(0,10), {one}", "<=", 1, _worst(_rows(rows, **at_1024, sigma=10))),
        _target(first, "times softmax, n=16 to 336, alpha=0.1 to 0.3, worst of any sigma, one thread", "<=", 4, _worst(small)),
        _target(first, "times softmax, N(0,1), n=1024, alpha=0.85, float32, two threads", "<=", 3, _worst(two_threads)),
        *(
            _target(first, f"backward, times softmax's, {what}, {one}", "<=", 2, _worst(_rows(rows, **backward, sigma=sigma)))
            for what, sigma in (("N(0,1)", 1), ("N(0,10)", 10))
        ),
    ]
    return [target for target in found if target is not None]


def targets_block(found: list[dict[str, Any]]) -> str:
    lines = [f"  {t['kernel']}: {t['what']} {t['sign']} {t['goal']:g}: {verdict(t)}" for t in found]
    return "\n".join(["\ntargets:", *(lines or ["  none judged: their cells were not measured at full size"])])


def verdict(target: dict[str, Any]) -> str:
    return f"{'met' if target['met'] else 'missed'} ({target['value']:.3g})"


def _target(kernel: str, what: str, sign: str, goal: float, value: float | None) -> dict[str, Any] | None:
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


def _line(cell: list[Row], names: list[str]) -> list[str]:
    by_name = {row["contestant"]: row for row in cell}
    own, base = by_name.get("diffmax", {}), by_name.get("softmax", {})
    time = f"{base['median_s'] * 1e6:.0f} us" if "median_s" in base else ""
    zeros = f"{own['zeros']:.1%}" if "zeros" in own else ""
    peak = f"{_tensors(own):.1f}" if "peak_bytes" in own else ""
    ratios = [_ratio(by_name.get(name), base) for name in names]
    return [str(cell[0]["n"]), str(cell[0]["alpha"]), f"{cell[0]['sigma']:g}", time, *ratios, zeros, peak]


def _ratio(row: Row | None, base: Row) -> str:
    if row is None:
        return ""
    if not row["correct"]:
        return "RED"
    noisy = "~" * any(r["p80_s"] > NOISY * r["p20_s"] for r in (row, base) if "p20_s" in r)
    if row["ratio_softmax"] is None:
        return f"{noisy}{row['median_s'] * 1e6:.0f} us"
    return f"{noisy}{row['ratio_softmax']:.{0 if row['ratio_softmax'] >= 100 else 1 if row['ratio_softmax'] >= 10 else 2}f}"


def _where(row: Row) -> str:
    values = (row[key] for key in ("operation", "n", "alpha", "sigma", "dtype", "threads"))
    return "{} n={} alpha={} sigma={:g} {} threads={}".format(*values)
