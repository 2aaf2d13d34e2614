"""Build every distribution of the workspace, look inside, and install it the ways the README shows.

Needs the pinned environment, for build and hatchling. `make packages` runs it; dist/ holds the result.
"""

from __future__ import annotations

import base64
import csv
import email
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from functools import cached_property
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
SMOKE = ROOT / ".ci" / "smoke.py"

# What a plain install may ask for, beside what those ask for themselves. A new entry needs a decision record.
DIRECT_REQUIREMENTS = {
    "diffmax-core": {"torch", "pluggy", "importlib-metadata", "packaging"},
    "diffmax-cuda": {"diffmax-core"},
    "diffmax-rocm": {"diffmax-core"},
    "diffmax-npu": {"diffmax-core"},
}
COMES_WITH_VENV = {"pip", "setuptools"}

WORKERS = 3


class PackagingError(Exception):
    """A check failed; the message says which."""


def main() -> int:
    """Run every step; 1 if one failed."""
    try:
        shutil.rmtree(DIST, ignore_errors=True)
        distributions = {d.name: d for d in map(build, members())}
        for distribution in distributions.values():
            check_contents(distribution)
        lines = install_lines((ROOT / "README.md").read_text(encoding="utf-8"))
        if not lines:
            raise PackagingError("README.md shows no install line in a bash or sh block")
        plain = {f"pip install {name}" for name in distributions}
        lines += sorted(plain - set(lines))
        # most of the time goes into waiting for the package index, so lines run side by side; they are reported in order
        with tempfile.TemporaryDirectory(prefix="diffmax-packages-") as scratch, ThreadPoolExecutor(WORKERS) as pool:
            folders = [Path(scratch) / f"venv{number}" for number in range(len(lines))]
            for report in pool.map(lambda line, folder: run_install_line(line, folder, distributions), lines, folders):
                step(report)
    except PackagingError as error:
        print(f"\npackages: {error}", file=sys.stderr, flush=True)
        return 1
    print("\nall packages are good")
    return 0


# --- building ---


@dataclass(frozen=True)
class Distribution:
    """A distribution of the workspace, with what was built from it."""

    folder: Path
    name: str
    version: str
    wheel: Path
    sdist: Path

    @cached_property
    def metadata(self) -> Message:
        """METADATA of the wheel."""
        return email.message_from_string(self.read(f"{self.dist_info}/METADATA").decode())

    @property
    def dist_info(self) -> str:
        """The wheel's folder of metadata."""
        return f"{self.name.replace('-', '_')}-{self.version}.dist-info"

    def read(self, member: str) -> bytes:
        """A file of the wheel."""
        with zipfile.ZipFile(self.wheel) as wheel:
            return wheel.read(member)

    def hashes(self) -> dict[str, str]:
        """Hash of each file of the wheel, as its RECORD has it."""
        rows = csv.reader(io.StringIO(self.read(f"{self.dist_info}/RECORD").decode()))
        return {path: digest for path, digest, _ in rows if digest}


def members() -> Iterator[Path]:
    """The folders of the workspace's distributions."""
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["workspace"]
    for pattern in workspace["members"]:
        yield from sorted(ROOT.glob(pattern))


def build(folder: Path) -> Distribution:
    """Make the sdist, and from it the wheel, with the pinned build backend."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    step(f"build {name} {version}: sdist, and the wheel from it")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST), str(folder)])
    stem = f"{name.replace('-', '_')}-{version}"
    wheel, sdist = DIST / f"{stem}-py3-none-any.whl", DIST / f"{stem}.tar.gz"
    for file in (wheel, sdist):
        if not file.is_file():
            raise PackagingError(f"the build of {name} left no {file.name}, got {sorted(p.name for p in DIST.iterdir())}")
    return Distribution(folder, name, version, wheel, sdist)


# --- looking inside ---


def check_contents(distribution: Distribution) -> None:
    """Metadata, licence, py.typed, and exactly the files of the repository in wheel and sdist."""
    step(f"look inside {distribution.wheel.name} and {distribution.sdist.name}")
    check_metadata(distribution)
    inside = distribution.dist_info
    tracked = set(run(["git", "ls-files"], cwd=distribution.folder).splitlines())
    sources = {path.removeprefix("src/") for path in tracked if path.startswith("src/")}
    with zipfile.ZipFile(distribution.wheel) as wheel:
        in_wheel = set(wheel.namelist())
    info_files = {f"{inside}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "entry_points.txt")}
    expect_same(f"files in {distribution.wheel.name}", sources, in_wheel - info_files)
    with tarfile.open(distribution.sdist) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    expect_same(f"files in {distribution.sdist.name}", tracked, in_sdist - {"PKG-INFO", ".gitignore"})
    packages = {path.split("/")[0] for path in sources}
    for wanted in [f"{package}/py.typed" for package in packages] + [f"{inside}/licenses/LICENSE"]:
        if wanted not in in_wheel:
            raise PackagingError(f"{distribution.wheel.name} lacks {wanted}")
    if distribution.read(f"{inside}/licenses/LICENSE") != (ROOT / "LICENSE").read_bytes():
        raise PackagingError(f"the licence in {distribution.wheel.name} differs from the repository's LICENSE")
    for path, digest in distribution.hashes().items():
        actual = base64.urlsafe_b64encode(hashlib.sha256(distribution.read(path)).digest()).rstrip(b"=").decode()
        if digest != f"sha256={actual}":
            raise PackagingError(f"{distribution.wheel.name}: RECORD has another hash for {path}")
    print(f"  {len(sources)} files, each of them tracked; py.typed; licence; metadata; README")


def check_metadata(distribution: Distribution) -> None:
    """Name, version, licence, README, and what a plain install asks for."""
    metadata = distribution.metadata
    expected = {
        "Name": distribution.name,
        "Version": distribution.version,
        "License-Expression": "MIT",
        "License-File": "LICENSE",
        "Description-Content-Type": "text/markdown",
    }
    for key, value in expected.items():
        if metadata[key] != value:
            raise PackagingError(f"{distribution.wheel.name}: {key} must be {value!r}, got {metadata[key]!r}")
    readme = (distribution.folder / "README.md").read_text(encoding="utf-8")
    if metadata.get_payload().strip() != readme.strip():
        raise PackagingError(f"{distribution.wheel.name}: its description is not {distribution.folder.name}/README.md")
    if distribution.name in DIRECT_REQUIREMENTS:
        direct = {canonicalize_name(r.name) for r in requirements(distribution) if r.marker is None}
        expect_same(f"requirements of {distribution.name}", DIRECT_REQUIREMENTS[distribution.name], direct)


def requirements(distribution: Distribution) -> list[Requirement]:
    """All requirements of a distribution, those of its extras included."""
    return [Requirement(text) for text in distribution.metadata.get_all("Requires-Dist", [])]


# --- installing ---


def install_lines(readme: str) -> list[str]:
    """The `pip install` and `uv pip install` lines in the bash and sh blocks of a Markdown text, in order."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(uv )?pip install ", line)]


def run_install_line(line: str, folder: Path, distributions: dict[str, Distribution]) -> str:
    """Run one line exactly as it stands in a fresh environment, and check what came; a uv line as a dry run.

    Returns what was done.
    """
    requested = Requirement(shlex.split(line, comments=True)[-1])
    distribution = distributions.get(canonicalize_name(requested.name))
    if distribution is None:
        raise PackagingError(f"{line}: the workspace has no {requested.name}, only {', '.join(distributions)}")
    venv.create(folder, with_pip=True)
    if line.startswith("uv "):
        output = run(["bash", "-c", f"{line} --dry-run"], cwd=folder, env=environment(folder))
        if f"{distribution.name}=={distribution.version}" not in output:
            raise PackagingError(f"{line}: uv would not install {distribution.name} {distribution.version}\n{output}")
        return f"{line} --dry-run\n  resolves, {distribution.name} {distribution.version} among it; nothing installed"
    run(["bash", "-c", line], cwd=folder, env=environment(folder))
    report = f"{line}\n{check_installed(folder, distribution, requested.extras)}\n{smoke(folder, distribution)}"
    if not requested.extras:
        install = ["-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(distribution.sdist)]
        run([str(folder / "bin" / "python"), *install], cwd=folder, env=environment(folder))
        check_installed(folder, distribution, requested.extras)
        report += f"\n  again from {distribution.sdist.name}: the same files\n{smoke(folder, distribution)}"
    shutil.rmtree(folder)
    return report


def environment(folder: Path) -> dict[str, str]:
    """An environment variable is what makes an unchanged line find dist/, the pins and the fresh environment."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "UV_"))}
    pins = ROOT / "requirements.txt"
    tools = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent)])
    return kept | {
        "VIRTUAL_ENV": str(folder),
        "PATH": f"{tools}{os.pathsep}{kept.get('PATH', '')}",
        "PIP_FIND_LINKS": f"{DIST.as_uri()} {kept.get('PIP_FIND_LINKS', '')}".strip(),
        "PIP_CONSTRAINT": pins.as_uri(),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "UV_FIND_LINKS": str(DIST),
        "UV_CONSTRAINT": str(pins),
    }


def check_installed(folder: Path, distribution: Distribution, extras: set[str]) -> str:
    """The very files that were built, everything that was asked for, and nothing else."""
    report = "import json, importlib.metadata as m; print(json.dumps({d.name: d.requires or [] for d in m.distributions()}))"
    python = str(folder / "bin" / "python")
    installed = {canonicalize_name(name): needs for name, needs in json.loads(run([python, "-I", "-c", report])).items()}
    site_packages = Path(run([python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    for path, digest in distribution.hashes().items():
        file = site_packages / path
        actual = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()) if file.is_file() else b""
        if digest != f"sha256={actual.rstrip(b'=').decode()}":
            raise PackagingError(f"{path} is not the one of {distribution.wheel.name}: another release was installed")

    wanted = wanted_by(Requirement(f"{distribution.name}[{','.join(extras)}]" if extras else distribution.name), installed)
    expect_same("installed distributions", wanted - COMES_WITH_VENV, set(installed) - COMES_WITH_VENV)
    others = sorted(wanted - {distribution.name})
    return f"  {distribution.name} {distribution.version}, the files of the wheel, and {len(others)} more: {', '.join(others)}"


def wanted_by(requirement: Requirement, installed: dict[str, list[str]]) -> set[str]:
    """The names that a requirement leads to, following the metadata of what is installed."""
    wanted: set[str] = set()
    queue = [(canonicalize_name(requirement.name), frozenset(requirement.extras))]
    seen = set(queue)
    while queue:
        name, extras = queue.pop()
        wanted.add(name)
        for needed in map(Requirement, installed.get(name, [])):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
                entry = (canonicalize_name(needed.name), frozenset(needed.extras))
                if entry not in seen:
                    seen.add(entry)
                    queue.append(entry)
    return wanted


def smoke(folder: Path, distribution: Distribution) -> str:
    """Run .ci/smoke.py in the environment, away from the repository."""
    output = run([str(folder / "bin" / "python"), "-I", str(SMOKE), distribution.version], cwd=folder)
    return f"  {output.strip()}"


# --- running ---

START = time.monotonic()


def step(what: str) -> None:
    """Say what comes now, or what was done."""
    print(f"\n[{time.monotonic() - START:4.0f} s] {what}", flush=True)


def run(command: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """What a command prints; what it printed is part of the error if it fails."""
    done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True)
    if done.returncode != 0:
        raise PackagingError(f"`{' '.join(command)}` failed with status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + (done.stderr if command[0] == "bash" else "")


def expect_same(what: str, expected: set[str], got: set[str]) -> None:
    """Two sets must be equal; the message names what is too much and what is missing."""
    if expected != got:
        extra, missing = sorted(got - expected), sorted(expected - got)
        raise PackagingError(f"{what}: unexpected {extra or 'none'}, missing {missing or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
