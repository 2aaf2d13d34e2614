"""The command line: `python -m benchmarks.device --out FOLDER`, `... bundle`, `... report FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.device import orchestrate, stages
from benchmarks.device.crew import ROOT

BUILD = ROOT / "build"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["bundle"]:
        from benchmarks.device import bundle

        return bundle.main(arguments[1:])
    if arguments[:1] == ["report"]:
        from benchmarks.device import report

        return report.main(arguments[1:])
    return orchestrate.run(parse(arguments))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description="Everything that a device is asked, in stages; `bundle` builds what a bare machine needs, `report FOLDER` "
        "makes tables of what came back. See docs/device.md.",
    )
    parser.add_argument("--out", type=Path, required=True, help="where the lines go: at most eight files")
    parser.add_argument("--seconds", type=float, default=540.0, help="the time for everything")
    parser.add_argument("--only", nargs="+", choices=stages.NAMES, metavar="STAGE", help=f"of {', '.join(stages.NAMES)}")
    parser.add_argument("--also", nargs="+", type=Path, default=[], metavar="FOLDER", help="earlier runs, not to be repeated")
    parser.add_argument("--kind", choices=("gpu", "npu"), default="gpu")
    parser.add_argument("--interpret", action="store_true", help="rehearse: Triton's interpreter, tiny sizes")
    parser.add_argument("--inject", nargs="+", default=[], metavar="FAULT", help="faults on purpose, see faults.py")
    parser.add_argument("--seed", type=int, help="of all inputs; else a fresh one, which the lines say")
    parser.add_argument("--work", type=Path, default=BUILD / "device-work", help="caches and scratch")
    parser.add_argument("--bundle", type=Path, default=BUILD / "device-bundle", help="what was carried")
    options = parser.parse_args(arguments)
    for name in ("out", "work", "bundle"):
        setattr(options, name, getattr(options, name).resolve())
    options.also = [folder.resolve() for folder in options.also]
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
