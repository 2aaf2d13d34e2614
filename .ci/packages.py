"""Build every distribution of the workspace, look inside, and install it the ways the README shows.

check-wheel-contents, twine, pip's report of an install and pip check judge what they can; here is what they do not.
Needs the pinned environment. `make packages` runs it; dist/ holds the result.
"""

from __future__ import annotations

import base64
import csv
import email
import hashlib
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
from pathlib import Path
from typing import Any

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
    "diffmax-npu": {"diffmax-core", "importlib-metadata"},
}

WORKERS = 3


class PackagingError(Exception):
    """A check failed; the message says which."""


def main() -> int:
    """Run every step; 1 if one failed."""
    try:
        distributions = build_all()
        lines = install_lines((ROOT / "README.md").read_text(encoding="utf-8"))
        if not lines:
            raise PackagingError("README.md shows no install line in a bash or sh block")
        plain = {f"pip install {name}" for name in distributions}
        lines += sorted(plain - {shlex.join(shlex.split(line, comments=True)) for line in lines})
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


def build_all() -> dict[str, Distribution]:
    """Every distribution of the workspace in dist/, and nothing else there; looked into, by name."""
    shutil.rmtree(DIST, ignore_errors=True)
    distributions = {d.name: d for d in map(build, members())}
    for distribution in distributions.values():
        check_contents(distribution)
    step("twine check --strict dist/*")
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, DIST.iterdir())])
    return distributions


@dataclass(frozen=True)
class Distribution:
    """A distribution of the workspace, with what was built from it."""

    folder: Path
    name: str
    version: str
    wheel: Path
    sdist: Path

    @property
    def dist_info(self) -> str:
        """The wheel's folder of metadata."""
        return f"{self.name.replace('-', '_')}-{self.version}.dist-info"

    def files(self) -> dict[str, bytes]:
        """The files of the wheel."""
        with zipfile.ZipFile(self.wheel) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}

    def requirements(self) -> list[str]:
        """What the wheel requires, those of its extras too."""
        return email.message_from_bytes(self.files()[f"{self.dist_info}/METADATA"]).get_all("Requires-Dist", [])


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
    """The repository's files in the sdist, the sdist's sources in the wheel, and what describes them."""
    step(f"look inside {distribution.wheel.name} and {distribution.sdist.name}")
    tracked = set(run(["git", "ls-files"], cwd=distribution.folder).splitlines())
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(distribution.sdist) as sdist:
            in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
            sdist.extractall(scratch, filter="data")
        expect_same(f"files in {distribution.sdist.name}", tracked, in_sdist - {"PKG-INFO", ".gitignore"})
        sources = Path(scratch) / distribution.sdist.name.removesuffix(".tar.gz") / "src"
        command = [sys.executable, "-m", "check_wheel_contents", "--no-config", "--src-dir", str(sources)]
        run([*command, str(distribution.wheel)])
    files = distribution.files()
    check_description(distribution, files)
    check_metadata(distribution, files[f"{distribution.dist_info}/METADATA"].decode())


def check_description(distribution: Distribution, files: dict[str, bytes]) -> None:
    """What a wheel has beside its sources: the licence, RECORD with every file's hash, a py.typed in each package."""
    wheel, info = distribution.wheel.name, distribution.dist_info
    sources = {name for name in files if not re.match(r"[^/]*\.(dist-info|data)/", name)}
    wanted = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    expect_same(f"metadata in {wheel}", wanted, files.keys() - sources - {f"{info}/entry_points.txt"})
    typed = {f"{name.split('/')[0]}/py.typed" for name in sources}
    expect_same(f"marks of types in {wheel}", typed, typed & sources)
    if files[f"{info}/licenses/LICENSE"] != (ROOT / "LICENSE").read_bytes():
        raise PackagingError(f"the licence in {wheel} differs from the repository's LICENSE")
    recorded = {path: digest for path, digest, _ in csv.reader(files[f"{info}/RECORD"].decode().splitlines())}
    expect_same(f"files in RECORD of {wheel}", set(files), set(recorded))
    for path, digest in recorded.items():
        actual = base64.urlsafe_b64encode(hashlib.sha256(files[path]).digest()).rstrip(b"=").decode()
        if digest != f"sha256={actual}" and path != f"{info}/RECORD":
            raise PackagingError(f"{wheel}: RECORD has another hash for {path}")


def check_metadata(distribution: Distribution, text: str) -> None:
    """Name, version, licence, README, and what a plain install asks for."""
    metadata = email.message_from_string(text)
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
        requirements = map(Requirement, distribution.requirements())
        direct = {canonicalize_name(r.name) for r in requirements if r.marker is None}
        expect_same(f"requirements of {distribution.name}", DIRECT_REQUIREMENTS[distribution.name], direct)


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
    report = folder / "report.json"
    run(["bash", "-c", line], cwd=folder, env=environment(folder) | {"PIP_REPORT": str(report)})
    came = check_report(json.loads(report.read_text(encoding="utf-8")), requested, distributions)
    check_installed(folder, distribution)
    done = f"{line}\n  {len(came)} came: {', '.join(came)}\n{smoke(folder, distribution)}"
    if not requested.extras:
        install = ["-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(distribution.sdist)]
        run([str(folder / "bin" / "python"), *install], cwd=folder, env=environment(folder))
        check_installed(folder, distribution)
        done += f"\n  again from {distribution.sdist.name}: the same files\n{smoke(folder, distribution)}"
    shutil.rmtree(folder)
    return done


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
        "PIP_NO_COMPILE": "1",  # each environment imports torch a few times: compiling all of it takes longer
        "UV_FIND_LINKS": str(DIST),
        "UV_CONSTRAINT": str(pins),
    }


def check_report(report: dict[str, Any], requested: Requirement, distributions: dict[str, Distribution]) -> list[str]:
    """The names of what pip says that it installed: the wheels that were built among it, with the extras asked for."""
    came = {canonicalize_name(entry["metadata"]["name"]): entry for entry in report["install"]}
    for name in came.keys() & distributions.keys():
        built, url = distributions[name].wheel.as_uri(), came[name]["download_info"]["url"]
        if url != built:
            raise PackagingError(f"{name} came from {url}, not from {built}: another release was installed")
    known = set(came[canonicalize_name(requested.name)]["metadata"].get("provides_extra", []))
    if not requested.extras <= known:
        raise PackagingError(f"{requested}: the extras are {', '.join(sorted(known))}")
    return sorted(came)


def check_installed(folder: Path, distribution: Distribution) -> None:
    """The very files that were built, and everything that is installed has what it asks for."""
    python = str(folder / "bin" / "python")
    site_packages = Path(run([python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    for name, content in distribution.files().items():
        file = site_packages / name
        if file.name != "RECORD" and (not file.is_file() or file.read_bytes() != content):
            raise PackagingError(f"{name} is not the one of {distribution.wheel.name}: another release was installed")
    run([sys.executable, "-m", "pip", "--python", python, "check"])


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
