"""What the benchmarks share: the command line, the rows of a cell, the result file and the table.

A benchmark says what its cells are, who takes part and how each is checked; `run` does the rest.

It is an own harness because pytest-benchmark, pyperf and torch.utils.benchmark time one function after the other. Here the
contestants of a cell take turns (`timing.py` says why), and who fails its check keeps the reason and gets no number.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.environment import environment, result_path, without_paths
from benchmarks.memory import peak_bytes
from benchmarks.timing import interleave, summarize

Row = dict[str, Any]
Call = Callable[[], object]
Cell = TypeVar("Cell")

# What a contestant can fail with and still leave the others measurable: no C++ compiler, too little memory, a wrong argument.
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, OSError, ArithmeticError, NotImplementedError, AssertionError)
NOISY = 1.5
MOST_REASONS = 20  # printed below a table


def command_line(bench: str, description: str, full: str | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark has; `full` says what --full does where there is one. Shown is the first line."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{bench}", description=description.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small inputs and few repeats, to see that everything runs")
    if full is not None:
        size.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--output", help="result file (default: benchmarks/results/<device>/<date>-<commit>-<bench>.json)")
    return parser


def run(
    bench: str,
    description: str | None,
    arguments: list[str],
    cells: Callable[[bool], Iterable[Row]],
    run_case: Callable[[Row, int], list[Row]],
    rounds: int,
    show: Callable[[list[Row]], str],
) -> None:
    """A whole benchmark on one thread: `run_case` of a cell and a number of rounds, for the `cells` of a quick or full run."""
    options = command_line(bench, description or "").parse_args(arguments)

    def found() -> Row:
        with threads(1):
            return {"rows": rows_of(cells(options.quick), lambda cell: run_case(cell, 1 if options.quick else rounds))}

    publish(bench, arguments, options.output, found, lambda result: show(result["rows"]))


def publish(bench: str, arguments: list[str], output: str | None, found: Callable[[], Row], show: Callable[[Row], str]) -> None:
    """Measure, write the result beside its environment, and print it."""
    started = time.perf_counter()
    env = environment(bench, arguments)
    result = found()
    env["seconds"] = round(time.perf_counter() - started)
    path = Path(output) if output else result_path(bench, env)
    write(path, {"environment": env, **result})
    print(show(result))
    if "rows" in result:
        print(f"\n{len(result['rows'])} rows, {sum(not row['correct'] for row in result['rows'])} of them not correct")
    print(f"{env['seconds']} s; {path.name}")


def write(path: Path, result: Row) -> None:
    """Indented JSON, its "rows" last, one per line: a thousand stay readable, and a diff says which changed."""
    text = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    if "rows" in result:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
        text = f'{text[:-2]},\n "rows": [\n{lines}\n ]\n}}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def grid(**axes: Iterable[Any]) -> list[Row]:
    """The product of some axes; the last one varies fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def rows_of(cells: Iterable[Cell], run_case: Callable[[Cell], list[Row]]) -> list[Row]:
    """The rows of all cells, behind a progress bar."""
    from tqdm import tqdm  # what runs on a device's own Python does without

    return [row for cell in tqdm(list(cells), unit="cell") for row in run_case(cell)]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    rows: dict[str, Row],
    prepare: Callable[[str], tuple[Row, Call]],
    rounds: int,
    bases: Sequence[str],
    memory: Callable[[Call], Row] = lambda call: {"peak_bytes": peak_bytes(call)},
    clock: str = "cpu",
) -> list[Row]:
    """Check the contestants of a cell, then time those that are correct.

    Args:
        rows: What is known of each contestant, by its name.
        prepare: For a name, what its check found, with the "reason" why it is wrong or None, and the call to time.
        rounds: Turns of each contestant.
        bases: The contestants to whose time the ratios are.
        memory: What is noted of a correct call's memory.
        clock: "cpu" or "wall".

    Returns:
        A row per contestant, numbers in four significant digits. Who is wrong, or raises, has the reason and no times.
    """
    calls: dict[str, Call] = {}
    for name, row in rows.items():
        row |= {"correct": False, "reason": None}
        try:
            found, call = prepare(name)
            row |= found
            if row["reason"] is None:
                row |= {"correct": True, **memory(call)}
                calls[name] = call
        except FAILURES as error:
            first_line = (str(error).strip() or "no message").splitlines()[0]
            row |= {"correct": False, "reason": without_paths(f"{type(error).__name__}: {first_line}")}
    for name, samples in interleave(calls, rounds, clock).items():
        rows[name] |= {**summarize(samples), "clock": clock}
    for row in rows.values():
        row |= {f"ratio_{base}": _ratio(row, rows.get(base, {})) for base in bases}
    return [_rounded(row) for row in rows.values()]


def _ratio(row: Row, base: Row) -> float | None:
    return row["median_s"] / base["median_s"] if "median_s" in row and "median_s" in base else None


def _rounded(row: Row) -> Row:
    """Four significant digits; JSON knows no infinity, a failed check may."""
    return {k: (float(f"{v:.4g}") if abs(v) < float("inf") else str(v)) if isinstance(v, float) else v for k, v in row.items()}


def table(
    title: str,
    rows: list[Row],
    base: str,
    *,
    tables: Sequence[str] = (),
    lines: Sequence[str],
    columns: str = "contestant",
    who: str = "contestant",
    note: Callable[[Row], str] = lambda row: "",
) -> str:
    """The time of `base`, and everybody's as a multiple of it; `note` adds to a figure.

    A "~" marks what should be measured again on a quieter machine: the slow and the fast fifth of its samples are more than
    `NOISY` apart. Below each table is why some have no time.

    Args:
        title: What the figures are.
        rows: From `measure`.
        base: The contestant of the ratios.
        tables: The keys of a row that say which table it is in.
        lines: Those that say in which line.
        columns: The one that says in which column.
        who: The one that says whose row it is.
        note: What else is shown of a row that has a time.
    """
    shown = [title]
    for where, group in _grouped(rows, tables):
        shown.append("\n" + _described(dict(zip(tables, where, strict=True))) if tables else "")
        names = list(dict.fromkeys(row[columns] for row in group))
        body = [[*lines, *names]]
        for place, cell in _grouped(group, lines):
            figures = {row[columns]: _figure(row, row[who] == base, base, note) for row in cell}
            body.append([*(_text(value) for value in place), *(figures.get(name, "") for name in names)])
        widths = [max(map(len, column)) for column in zip(*body, strict=True)]
        shown += ["  ".join(map(str.rjust, line, widths)) for line in body]
        shown += _reasons([row for row in group if not row["correct"]], who, [key for key in (*lines, columns) if key != who])
    return "\n".join(shown)


def _grouped(rows: list[Row], keys: Sequence[str]) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.items()


def _figure(row: Row, is_base: bool, base: str, note: Callable[[Row], str]) -> str:
    if not row["correct"]:
        return "RED"
    noisy = "~" * (row["p80_s"] > NOISY * row["p20_s"])
    ratio = None if is_base else row[f"ratio_{base}"]
    if ratio is None:
        return f"{noisy}{1e3 * row['median_s']:.4g} ms{note(row)}"
    return f"{noisy}{ratio:.{0 if ratio >= 100 else 1 if ratio >= 10 else 2}f}{note(row)}"


def _reasons(failed: list[Row], who: str, keys: Sequence[str]) -> list[str]:
    lines = [f"  {row[who]} RED: {row['reason']}; {_described({key: row[key] for key in keys})}" for row in failed]
    more = [f"  and {len(lines) - MOST_REASONS} more"] if len(lines) > MOST_REASONS else []
    return [*lines[:MOST_REASONS], *more]


def _described(values: Row) -> str:
    return ", ".join(value if isinstance(value, str) else f"{key}: {_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
