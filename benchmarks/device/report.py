"""`python -m benchmarks.device report FOLDER...`: tables and plots of what some runs found, and the goals met and missed.

Of a real device's runs it writes a result into benchmarks/results, tuned settings into the vendor's tables, and figures into
docs/performance.md, in the place of predictions. A rehearsal changes nothing of these.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.device import goals, sections, tables
from benchmarks.device.crew import ROOT
from benchmarks.device.results import Results

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- device:begin -->", "<!-- device:end -->"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what --out of one or more runs holds")
    parser.add_argument("--to", type=Path, help="write report, result and plots here, and nothing else")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the predictions")
    options = parser.parse_args(arguments)
    missing = [str(folder) for folder in options.folders if not folder.is_dir()]
    if missing:
        parser.error(f"no such folder: {', '.join(missing)}")
    results = Results(options.folders)
    judged = [goal.judge(results) for goal in goals.GOALS]
    text = sections.whole(results, judged)
    print(text)
    if options.to is not None:
        options.to.mkdir(parents=True, exist_ok=True)
        (options.to / "report.md").write_text(text + "\n", encoding="utf-8")
        write_result(options.to / "device.json", results, judged)
        draw(results, options.to, "device")
        return 0
    if results.rehearsed:
        print("\nreport: a rehearsal, or no run at all: nothing is written; --to FOLDER writes it there")
        return 0
    path = result_path(results, options.results)
    write_result(path, results, judged)
    draw(results, path.parent, path.stem)
    gains = tables.write(results)
    replace(options.page, f"{sections.measured(results, judged)}\n\nFrom `{path.relative_to(options.results.parent.parent)}`.")
    print(f"\nreport: wrote {path.name}, {len(gains)} tuned settings, and the figures of {options.page.name}")
    return 0


def result_path(results: Results, folder: Path) -> Path:
    """results/<device>/<date>-<commit>-device.json."""
    device = re.sub(r"[^a-z0-9]+", "-", str(results.device.get("device", "unknown")).lower()).strip("-")
    last = results.runs[-1]
    return folder / device / f"{last['date']}-{last['commit']}-device.json"


def write_result(path: Path, results: Results, judged: list[dict[str, Any]]) -> None:
    """In the form of the other results: environment, targets, and a row per cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = ("stage", "cell", "status", "seconds", "seed", "attempt", "at")
    run_facts = {key: value for key, value in (results.runs[-1] if results.runs else {}).items() if key not in (*own, "only")}
    device = {key: value for key, value in results.device.items() if key not in own}
    environment = {**run_facts, **device, "runs": len(results.runs), "command": "python -m benchmarks.device"}
    environment["commits"] = sorted({run["commit"] for run in results.runs})
    head = json.dumps({"environment": environment, "targets": judged}, indent=1)
    rows = ",\n".join(f"  {json.dumps(line)}" for line in results.cells.values())
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def replace(page: Path, text: str) -> bool:
    """Put `text` between the page's two markers; False if it has none."""
    whole = page.read_text(encoding="utf-8")
    before, found, rest = whole.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        print(f"report: {page.name} lacks the markers {BEGIN} and {END}")
        return False
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return True


def draw(results: Results, folder: Path, stem: str) -> list[Path]:
    """Plots, where matplotlib is installed."""
    try:
        from benchmarks.device import drawings
    except ImportError as error:
        print(f"report: no plots: {error}")
        return []
    return drawings.draw(results, folder, stem)
