"""Plots of a device's results: rows by length, attention by sparsity and length, decoding by length."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.device.results import Results, time_of


def draw(results: Results, folder: Path, stem: str) -> list[Path]:
    """One file for each of the three that has points."""
    drawn = []
    for name, plot in (("rows", _rows), ("attention", _attention), ("decode", _decode)):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        if plot(results, axes):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=8, frameon=False)
            figure.supxlabel(f"{results.device.get('device', '')}", fontsize=7, color="gray")
            drawn.append(folder / f"{stem}-{name}.png")
            figure.savefig(drawn[-1], dpi=110)
        plt.close(figure)
    return drawn


def _lines(axes: Axes, series: dict[str, list[tuple[float, float]]]) -> bool:
    for label, points in sorted(series.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1.4, label=label)
    return bool(series)


def _rows(results: Results, axes: Axes) -> bool:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in results.starting("rows "):
        ratio = results.ratio(line["cell"], "softmax", "forward")
        if ratio is not None and line.get("sigma") == 1:
            series.setdefault(f"{line['dtype']}, alpha {line['alpha']}", []).append((line["n"], ratio))
    axes.set(xscale="log", yscale="log", xlabel="entries of a row", ylabel="times softmax", title="rows, forward")
    axes.axhline(1, color="gray", linewidth=1)
    return _lines(axes, series)


def _attention(results: Results, axes: Axes) -> bool:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in results.starting("attention "):
        for passed in ("forward", "both"):
            ratio = results.ratio(line["cell"], ("sdpa_flash", "sdpa_cudnn", "sdpa"), passed)
            if ratio is not None and line.get("empty_tiles") is not None:
                kind = f"{line['scores']}, alpha {line['alpha']}, {passed}"
                series.setdefault(kind, []).append((line["empty_tiles"], ratio))
    axes.set(yscale="log", xlabel="share of empty tiles", ylabel="times FlashAttention", title="attention")
    axes.axhline(1, color="gray", linewidth=1)
    return _lines(axes, series)


def _decode(results: Results, axes: Axes) -> bool:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in results.starting("decode "):
        for name in line.get("contestants", {}):
            took = time_of(line, name, "step", graph=True)
            if took is not None and line.get("batch") == 1:
                series.setdefault(f"{name}, {line['content']}", []).append((line["length"], took * 1e3))
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="us", title="a decoding step, batch 1")
    return _lines(axes, series)
