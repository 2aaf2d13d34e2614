"""`python -m benchmarks.plots RESULT.json ...`: plots drawn from results, and from nothing else.

Per operation that a result holds, float32 on one thread: time relative to softmax, speed-up over entmax_bisect, peak memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.shapes import SIZES

Row = dict[str, Any]
RIVAL_STYLE = {
    "softmax_compiled": ("tab:gray", "softmax, compiled"),
    "entmax_bisect": ("black", "entmax_bisect"),
    "entmax15": ("tab:red", r"entmax15 ($\alpha$ = 0.5)"),
    "sparsemax": ("tab:purple", r"sparsemax ($\alpha$ → 0)"),
}
PASSES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON of bench_forward or bench_backward")
    parser.add_argument("--output", type=Path, help="folder for the plots (default: beside each JSON)")
    options = parser.parse_args(arguments)
    for path in options.results:
        for drawn in draw(json.loads(path.read_text()), options.output or path.parent, path.stem):
            print(drawn.name)


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [r for r in result["rows"] if r["correct"] and r["dtype"] == "float32" and r["threads"] == 1]
    drawn = []
    for operation in sorted({row["operation"] for row in rows}):
        of_operation = [row for row in rows if row["operation"] == operation]
        for name, figure in (
            ("time", _time(of_operation)),
            ("speedup", _speed_up(of_operation)),
            ("memory", _memory(of_operation)),
        ):
            env = result["environment"]
            figure.suptitle(f"{PASSES[operation]}: {figure.get_suptitle()}", fontsize=11)
            note = f"float32, one thread, {env['device']}, torch {env['packages']['torch']}, commit {env['commit']}"
            figure.supxlabel(note, fontsize=7, color="gray")
            # where a benchmark has one operation, its name is in the stem already
            middle = "" if stem.endswith(operation) else f"-{operation}"
            drawn.append(folder / f"{stem}{middle}-{name}.png")
            figure.savefig(drawn[-1], dpi=110)
            plt.close(figure)
    return drawn


def _time(rows: list[Row]) -> Figure:
    sigmas = sorted({row["sigma"] for row in rows})
    figure, panels = _panels("time relative to torch.softmax", len(sigmas))
    for axes, sigma in zip(panels, sigmas, strict=True):
        here = [row for row in rows if row["sigma"] == sigma]
        for alpha, color in _colors(rows).items():
            own = [row for row in here if row["contestant"] == "diffmax" and row["alpha"] == alpha]
            _line(axes, own, "ratio_softmax", color, rf"diffmax, $\alpha$ = {alpha}", marker="o")
        for rival, (color, label) in RIVAL_STYLE.items():
            # a rival's time hardly depends on alpha: one line, of the alpha nearest to our default
            theirs = [row for row in here if row["contestant"] == rival]
            alpha = max((row["alpha"] for row in theirs if row["alpha"] <= 0.85), default=None)
            _line(axes, [r for r in theirs if r["alpha"] == alpha], "ratio_softmax", color, label, marker="x", linestyle="--")
        axes.axhline(1, color="tab:gray", linewidth=1)
        axes.set_title(f"scores N(0, {sigma:g})", fontsize=9)
    panels[0].set_ylabel("times the time of softmax")
    _legend(figure, panels[0])
    return figure


def _speed_up(rows: list[Row]) -> Figure:
    figure, (axes,) = _panels("speed-up over entmax_bisect, scores N(0, 1)", 1)
    times = {_cell(row): row["median_s"] for row in rows if row["contestant"] == "entmax_bisect"}
    for alpha, color in _colors(rows).items():
        own = [row for row in rows if row["contestant"] == "diffmax" and row["alpha"] == alpha and row["sigma"] == 1]
        points = [{**row, "speed_up": times[_cell(row)] / row["median_s"]} for row in own if _cell(row) in times]
        _line(axes, points, "speed_up", color, rf"diffmax, $\alpha$ = {alpha}", marker="o")
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_ylabel("times faster")
    _legend(figure, axes)
    return figure


def _memory(rows: list[Row]) -> Figure:
    figure, (axes,) = _panels("peak memory beyond the inputs, scores N(0, 1)", 1)
    alpha = max((row["alpha"] for row in rows if row["alpha"] <= 0.85), default=None)
    styles = {"softmax": ("tab:gray", "softmax"), "diffmax": ("tab:blue", rf"diffmax, $\alpha$ = {alpha}"), **RIVAL_STYLE}
    styles.pop("softmax_compiled")  # the same line as softmax
    for name, (color, label) in styles.items():
        theirs = [row for row in rows if row["contestant"] == name and row["sigma"] == 1]
        fixed = {"entmax15": 0.5, "sparsemax": min((row["alpha"] for row in theirs), default=None)}.get(name, alpha)
        points = [{**r, "tensors": r["peak_bytes"] / (4 * r["rows"] * r["n"])} for r in theirs if r["alpha"] == fixed]
        ours = name in ("softmax", "diffmax")
        _line(axes, points, "tensors", color, label, marker="o" if ours else "x", linestyle="-" if ours else "--")
    axes.set_yscale("linear")
    axes.yaxis.set_major_locator(AutoLocator())
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tensors of the input's size, result included")
    _legend(figure, axes)
    return figure


def _panels(title: str, count: int) -> tuple[Figure, list[Axes]]:
    width = 3.1 * count + 2.2 if count > 1 else 7
    figure, panels = plt.subplots(1, count, figsize=(width, 4), sharey=True, squeeze=False, layout="constrained")
    figure.suptitle(title)
    for axes in panels[0]:
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [_short(n) for n in SIZES], fontsize=8)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("n, entries per row")
        axes.grid(alpha=0.3, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels[0])


def _short(n: int) -> str:
    return f"{n >> 10}k" if n >= 1024 else str(n)


def _colors(rows: list[Row]) -> dict[float, Any]:
    alphas = sorted({row["alpha"] for row in rows})
    shades = plt.get_cmap("viridis")
    return {alpha: shades(0.9 - 0.85 * index / max(1, len(alphas) - 1)) for index, alpha in enumerate(alphas)}


def _cell(row: Row) -> tuple[Any, ...]:
    return row["n"], row["alpha"], row["sigma"]


def _line(axes: Axes, rows: list[Row], value: str, color: Any, label: str, **style: Any) -> None:
    points = sorted((row["n"], row[value]) for row in rows if row.get(value) is not None)
    if points:
        axes.plot(*zip(*points, strict=True), color=color, label=label, markersize=4, linewidth=1.4, **style)


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)


if __name__ == "__main__":
    main(sys.argv[1:])
