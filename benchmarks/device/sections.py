"""The report's text: Markdown tables of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.device import goals, tables
from benchmarks.device.lines import Line
from benchmarks.device.results import Results, time_of

PASSES = ("forward", "backward", "both")
MOST_FAILURES = 60


def whole(results: Results, judged: list[dict[str, Any]]) -> str:
    """Every section that has something to say."""
    parts = [
        ("Run", run(results)),
        ("Goals", goals_table(judged)),
        ("Ceilings", ceilings(results)),
        ("Rows", rows(results)),
        ("Attention", attention(results)),
        ("Options of attention, times the plain call", options(results)),
        ("Decoding", decoding(results)),
        ("First calls, seconds", first_calls(results)),
        ("Tuning", tuning(results)),
        ("What is not right, or did not run", failures(results)),
    ]
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts if text)


def measured(results: Results, judged: list[dict[str, Any]]) -> str:
    """What goes into the page about performance."""
    parts = [
        run(results), goals_table(judged), "Rows.\n\n" + rows(results), "Attention.\n\n" + attention(results),
        "Decoding.\n\n" + decoding(results), "First calls, seconds.\n\n" + first_calls(results),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if not part.endswith(".\n\n"))


def table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """Markdown; nothing for no rows."""
    if not body:
        return ""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (head, ["---"] * len(head), *body)]
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def run(results: Results) -> str:
    """On what, and what came of it."""
    device, counts = results.device, {}
    for line in results.cells.values():
        by = counts.setdefault(line["stage"], {})
        by[line["status"]] = by.get(line["status"], 0) + 1
    packages = ", ".join(f"{name} {version}" for name, version in device.get("packages", {}).items() if version)
    lines = [f"{device.get('device', 'unknown device')}; {packages}; runs: {len(results.runs)}"]
    lines += [f"commit {', '.join(sorted({run['commit'] for run in results.runs}))}"] if results.runs else []
    if results.rehearsed:
        lines.append("**A rehearsal: none of these figures is a measurement.**")
    statuses = ("ok", "wrong", "error", "timeout", "skipped", "part")
    body = [[stage, *(by.get(status, "") for status in statuses)] for stage, by in counts.items()]
    return "; ".join(lines) + "\n\n" + table(["stage", *statuses], body)


def goals_table(judged: list[dict[str, Any]]) -> str:
    body = [[g["what"], f"{g['sign']} {g['goal']:g}", number(g["value"]), goals.verdict(g)] for g in judged]
    return table(["goal", "asked", "measured", ""], body)


def ceilings(results: Results) -> str:
    keys = ("tb_per_s", "tflop_per_s", "torch_us", "triton_us", "rows_us", "of_1_us", "each_us", "version")
    body = []
    for line in results.cells.values():
        if line["stage"] == "ceilings" and line["cell"] != "device":
            found = ", ".join(
                f"{key} {number(line[key]) if isinstance(line[key], float) else line[key]}" for key in keys if key in line
            )
            body.append([line["cell"], line["status"], found or line.get("reason", "")])
    return table(["", "", ""], body)


def rows(results: Results) -> str:
    body = []
    for line in _timed(results, "rows "):
        names = [name for name in line["contestants"] if name not in ("diffmax", "copy")]
        for passed in PASSES:
            own = time_of(line, "diffmax", passed)
            if own is None:
                continue
            copy = time_of(line, "copy", "forward") if passed == "forward" else None
            ratios = [f"{name} {own / t:.2f}" for name in names if (t := time_of(line, name, passed)) is not None]
            share = "" if copy is None else f"{copy / own:.0%}"
            zeros = line["contestants"]["diffmax"].get("zeros")
            body.append([line["cell"], passed, number(own), share, ", ".join(ratios), "" if zeros is None else f"{zeros:.1%}"])
    return table(["cell", "pass", "ms", "of copy bandwidth", "times the time of", "zeros"], body)


def attention(results: Results) -> str:
    body = []
    for line in _timed(results, "attention "):
        for passed in PASSES:
            own = time_of(line, "diffmax", passed)
            if own is None:
                continue
            names = [name for name in line["contestants"] if name != "diffmax"]
            ratios = [f"{name} {own / t:.2f}" for name in names if (t := time_of(line, name, passed)) is not None]
            empty = line.get("empty_tiles")
            peak = line["contestants"]["diffmax"][passed].get("peak_bytes")
            memory = "" if peak is None else f"{peak / 2**20:.0f}"
            body.append([line["cell"], passed, "" if empty is None else f"{empty:.0%}", number(own), ", ".join(ratios), memory])
    return table(["cell", "pass", "empty tiles", "ms", "times the time of", "MiB"], body)


def options(results: Results) -> str:
    body = []
    for line in _timed(results, "option "):
        found = []
        for passed in PASSES:
            own, plain = (time_of(line, name, passed) for name in ("diffmax", "plain"))
            found.append(f"{own / plain:.2f}" if own and plain else number(own))
        body.append([line["cell"].removeprefix("option "), *found])
    return table(["option", *PASSES], body)


def decoding(results: Results) -> str:
    body = []
    for line in _timed(results, "decode "):
        theirs = time_of(line, "sdpa", "step", graph=True)
        for name, found in line["contestants"].items():
            graph, eager = (time_of(line, name, "step", graph=g) for g in (True, False))
            if eager is None:
                continue
            host = found["step"].get("host_us")
            ratio = "" if not theirs or not graph else f"{graph / theirs:.2f}"
            in_graph = number(graph * 1e3) if graph and "graph" in found["step"] else ""
            body.append([line["cell"], name, in_graph, number(eager * 1e3), number(host), ratio, found.get("pages_read", "")])
    return table(["cell", "who", "graph, us", "eager, us", "host, us", "times sdpa", "pages read"], body)


def first_calls(results: Results) -> str:
    body = []
    for line in results.starting("first call "):
        times = [number(line.get(kind, {}).get("first_call_s")) for kind in ("cold", "cached", "after_warmup")]
        warmup = number(line.get("after_warmup", {}).get("warmup_s"))
        body.append([line["cell"].removeprefix("first call "), *times, warmup])
    return table(["operator", "nothing compiled", "compiled on disk", "after warmup", "warmup itself"], body)


def tuning(results: Results) -> str:
    body = []
    for choice in sorted(tables.choices(results), key=lambda choice: choice.ratio):
        settings = ", ".join(f"{key} {value}" for key, value in choice.settings.items())
        body.append([choice.kernel, choice.dtype, choice.size or "", settings, f"{choice.ratio:.2f}"])
    return table(["kernel", "dtype", "size", "fastest", "times what is shipped"], body)


def failures(results: Results) -> str:
    """Each with its reason and the seed of its inputs, rivals among them."""
    found = [_failure(line["cell"], line) for line in results.failed()]
    for line in results.cells.values():
        for name, one in line.get("contestants", {}).items():
            if name != "diffmax" and one.get("status") in ("wrong", "error", "timeout"):
                found.append(_failure(f"{line['cell']}, {name}", {"seed": line.get("seed"), **one}))
    more = [[f"and {len(found) - MOST_FAILURES} more", "", "", ""]] if len(found) > MOST_FAILURES else []
    return table(["cell", "", "reason", "seed"], [*found[:MOST_FAILURES], *more])


def _failure(cell: str, line: Line) -> list[object]:
    reason = " ".join(str(line.get("reason", "")).split()).replace("|", "\\|")[:240]
    return [cell, line["status"], reason, line.get("seed", "")]


def _timed(results: Results, prefix: str) -> list[Line]:
    return [line for line in results.starting(prefix) if line.get("contestants")]
