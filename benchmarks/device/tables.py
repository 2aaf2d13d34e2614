"""The fastest settings that tuning found, put into a vendor's tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device.crew import ROOT
from benchmarks.device.results import Results, time_of
from benchmarks.device.tuning_names import SHIPPED

FILES = {
    "cuda": ROOT / "diffmax-cuda" / "src" / "diffmax_cuda" / "tables.json",
    "rocm": ROOT / "diffmax-rocm" / "src" / "diffmax_rocm" / "tables.json",
}
WORTH = 0.97  # of the shipped time: what is less of a gain is noise


@dataclass(frozen=True)
class Choice:
    """The best candidate of a kernel in a case, and its time over that of what is shipped."""

    kernel: str
    dtype: str
    size: int
    architecture: str
    settings: Mapping[str, Any]
    ratio: float


def choices(results: Results) -> list[Choice]:
    """One for each case that was tuned, in all its parts."""
    best: dict[tuple[str, str, int], Choice] = {}
    for line in results.starting("tune "):
        for name, settings in line.get("settings", {}).items():
            ratio = _ratio(line, name)
            if ratio is None:
                continue
            choice = Choice(line["kernel"], line["dtype"], line["size"], line["architecture"], settings, ratio)
            key = (choice.kernel, choice.dtype, choice.size)
            if key not in best or ratio < best[key].ratio:
                best[key] = choice
    return list(best.values())


def _ratio(line: dict[str, Any], name: str) -> float | None:
    """The geometric mean over the inputs that were timed."""
    shipped = line.get("contestants", {}).get(SHIPPED, {})
    logs = []
    for passed, times in shipped.items():
        if isinstance(times, dict) and "median_ms" in times:
            own, theirs = (time_of(line, who, passed, graph=True) for who in (name, SHIPPED))
            if own is None or theirs is None:
                return None
            logs.append(math.log(own / theirs))
    return math.exp(sum(logs) / len(logs)) if logs else None


def write(results: Results, files: Mapping[str, Path] = FILES) -> list[Choice]:
    """Put what is worth it into the tables of the results' backend; returns that."""
    from dataclasses import replace

    import torch

    from diffmax.kernels.triton.common.tuning import KERNELS, predicted_table, read_tables, write_tables

    backend = results.device.get("backend")
    gains = [choice for choice in choices(results) if choice.ratio < WORTH]
    if backend not in files or not gains:
        return []
    path, packages = files[backend], results.device["packages"]
    device = results.device["device"]
    origin = f"measured on {device}, torch {packages['torch']}, triton {packages['triton']}"
    tables = read_tables(path)
    for choice in gains:
        lanes = int(results.device.get("lanes") or 32)
        table = tables.get(choice.architecture) or _nearest(tables, choice.architecture)
        if table is None:
            table = replace(predicted_table(lanes=lanes, most_warps=1024 // lanes), origin="predicted")
        launch = KERNELS[choice.kernel](**choice.settings)
        dtype = getattr(torch, choice.dtype)
        tables[choice.architecture] = table.with_entry(choice.kernel, dtype, choice.size, launch, origin)
    write_tables(path, tables)
    return gains


def _nearest(tables: Mapping[str, Any], architecture: str) -> Any:
    """Of the newest architecture that is not newer, without its entries; None where names are no numbers."""
    from dataclasses import replace

    def number(name: str) -> float | None:
        try:
            return float(name)
        except ValueError:
            return None

    own = number(architecture)
    older = [name for name in tables if own is not None and (known := number(name)) is not None and known <= own]
    return replace(tables[max(older, key=float)], entries={}) if older else None
