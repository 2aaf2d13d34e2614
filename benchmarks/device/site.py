"""Where workers find modules: wheels of the bundle, unpacked where the machine lacks them, and the sources.

A wheel of pure Python is a zip file that unpacks into what an installation of it is: no pip is needed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import zipfile
import zlib
from pathlib import Path

from benchmarks.device.crew import ROOT

SOURCES = ("diffmax-core", "diffmax-cuda", "diffmax-rocm", "diffmax-npu")


def paths(bundle: Path, work: Path) -> tuple[list[Path], str]:
    """The folders to put before all others, and how they came to be."""
    sources = [ROOT / name / "src" for name in SOURCES]
    wheels = sorted((bundle / "wheels").glob("*.whl"))
    if not wheels:
        return sources, "sources; no wheels were carried"
    fresh = note(bundle).get("tree") == tree()
    folder = work / "site"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unpacked, failed = [], []
    for wheel in wheels:
        own = wheel.name.startswith("diffmax_")
        if own and not fresh:
            continue
        try:
            with zipfile.ZipFile(wheel) as file:
                if own or _missing(file):
                    file.extractall(folder)
                    unpacked.append(wheel.name.split("-")[0])
        except (OSError, zipfile.BadZipFile) as error:
            failed.append(f"{wheel.name.split('-')[0]}: {error}")
    how = f"unpacked {', '.join(unpacked) or 'nothing'}" + (
        "" if fresh else "; our wheels are of other sources, which were used"
    )
    return [folder, *sources], how + (f"; failed {'; '.join(failed)}" if failed else "")


def _missing(wheel: zipfile.ZipFile) -> bool:
    """Whether a module of the wheel cannot be found here."""
    names = {name.split("/")[0] for name in wheel.namelist() if "/" in name or name.endswith(".py")}
    modules = {name.removesuffix(".py") for name in names if not name.endswith((".dist-info", ".data"))}
    return any(importlib.util.find_spec(module) is None for module in modules if module.isidentifier())


def note(bundle: Path) -> dict[str, str]:
    """What the bundle says of itself."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, str] = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
        return found
    return {}


def tree() -> str:
    """A checksum of the sources, which tells one state of them from another where there is no history."""
    crc = 0
    for path in sorted(ROOT.glob("diffmax-*/src/**/*")):
        if path.suffix in (".py", ".json"):
            crc = zlib.crc32(path.read_bytes(), crc)
    return f"tree-{crc:08x}"


def commit(bundle: Path | None = None) -> str:
    """Of the repository; without its history, the bundle's if it was made of these sources, else their checksum."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    known = note(bundle) if bundle is not None else {}
    return known["commit"] if known.get("tree") == tree() else tree()
