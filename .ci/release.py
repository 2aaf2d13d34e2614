"""Everything of a release but the upload: wheels and sdists, each wheel alone, bills of materials, sums, and the tag if asked.

Needs the pinned environment, no network and no credentials: what a wheel requires comes from this environment, by links to
exactly those packages. `make packages` installs from the index. `make release` runs this without a tag; dist/ holds what an
index takes, build/release/ that and what lies beside it. CONTRIBUTING.md has the steps.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import packages
import tomllib
import version
from packages import DIST, ROOT, Distribution, PackagingError, run, step
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BESIDE = ROOT / "build" / "release"
SUMS = "SHA256SUMS"


def main() -> int:
    """Run every step; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", action="store_true", help="tag this commit at the end; the changelog must be written")
    parser.add_argument("--for-tag", metavar="NAME", help="refuse any other tag than this, which exists")
    parser.add_argument("--from-repository", metavar="URL", help="refuse any other repository than that of the metadata")
    options = parser.parse_args()
    try:
        release(options)
    except (PackagingError, version.VersionError) as error:
        print(f"\nrelease: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def release(options: argparse.Namespace) -> None:
    """The steps, cheap refusals first."""
    number = version.agreed()
    tag = f"v{number}"
    step(f"version {number}, the same everywhere")
    check_address(options.from_repository)
    if options.for_tag not in (None, tag):
        raise PackagingError(f"the tag must be {tag}, got {options.for_tag}: python .ci/version.py writes a version everywhere")
    if options.tag or options.for_tag:
        check_changelog(ROOT, number)
    if options.tag:
        check_tree(ROOT, tag)
    distributions = packages.build_all()
    check_repeatable(distributions)
    shutil.rmtree(BESIDE, ignore_errors=True)
    BESIDE.mkdir(parents=True)
    for distribution in distributions.values():
        step(alone(distribution, distributions))
    for file in DIST.iterdir():
        shutil.copy2(file, BESIDE)
    step(f"sums of {write_sums(BESIDE)} files in {BESIDE.relative_to(ROOT) / SUMS}")
    if options.tag:
        run(["git", "tag", "--annotate", tag, "--message", f"diffmax {number}"])
        print(f"\ntagged {tag}; to publish: git push origin {tag}")
    else:
        print(f"\n{tag} can be released; nothing was tagged or uploaded")


# --- what must be true before ---


def check_address(repository: str | None) -> None:
    """Every distribution names one repository; it is this one."""
    named = {}
    for folder in packages.members():
        urls = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
        named[folder.name] = urls.get("Repository")
    if len(set(named.values())) != 1 or None in named.values():
        raise PackagingError(f"[project.urls] must name one Repository in every distribution, got {named}")
    stated = next(iter(named.values()))
    if repository is not None and repository.rstrip("/") != stated:
        raise PackagingError(
            f"the metadata names the repository {stated}, this is {repository}\n"
            "publish from there, or correct [project.urls], CITATION.cff and the links of the READMEs"
        )


def check_changelog(root: Path, number: str) -> None:
    """CHANGELOG.md has a section for this version, and no fragment is left over."""
    headings = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    left = sorted(file.name for file in (root / "changelog.d").glob("*.*.md"))
    if number not in headings or left:
        raise PackagingError(
            f"CHANGELOG.md must have a section {number} and changelog.d no fragment, got {headings} and fragments {left}\n"
            f"run: make changelog VERSION={number}, and commit"
        )


def check_tree(root: Path, tag: str) -> None:
    """Nothing uncommitted, and the tag is new."""
    if changed := run(["git", "status", "--porcelain"], cwd=root):
        raise PackagingError(f"a tag needs a tree without changes, got\n{changed}commit or stash them")
    if run(["git", "tag", "--list", tag], cwd=root).strip():
        raise PackagingError(f"the tag {tag} exists; write the next version: python .ci/version.py VERSION")


# --- what is made ---


def check_repeatable(distributions: dict[str, Distribution]) -> None:
    """A second build gives the same bytes, so that anyone can compare a release with its sources."""
    step("build once more: the same bytes")
    with tempfile.TemporaryDirectory() as scratch:
        for distribution in distributions.values():
            run([sys.executable, "-m", "build", "--no-isolation", "--outdir", scratch, str(distribution.folder)])
            for first in (distribution.wheel, distribution.sdist):
                if digest(first) != digest(Path(scratch) / first.name):
                    raise PackagingError(f"two builds of {first.name} differ")


def alone(distribution: Distribution, distributions: dict[str, Distribution]) -> str:
    """Install one wheel with nothing but what it requires, run .ci/smoke.py, write its bill of materials; say what was done."""
    ours, theirs = needed(distribution, distributions)
    with tempfile.TemporaryDirectory(prefix="diffmax-release-") as scratch:
        folder = Path(scratch) / "venv"
        venv.create(folder)
        python = str(folder / "bin" / "python")
        site_packages = Path(run([python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
        link(theirs, site_packages)
        # by name: a wheel given as a path would leave that path in what is installed, and in the bill
        wheels = [f"{one.name}=={one.version}" for one in ours]
        install = ["install", "--quiet", "--no-index", "--no-deps", "--find-links", str(DIST), *wheels]
        run([sys.executable, "-m", "pip", "--python", python, *install])
        packages.check_installed(folder, distribution)
        done = packages.smoke(folder, distribution)
        bill = BESIDE / f"{distribution.name}-{distribution.version}.cdx.json"
        command = ["environment", "--pyproject", str(distribution.folder / "pyproject.toml"), "--mc-type", "library"]
        run([sys.executable, "-m", "cyclonedx_py", *command, "--output-reproducible", "--output-file", str(bill), python])
        check_bill(bill, distribution)
    names = ", ".join(sorted([*(one.name for one in ours if one is not distribution), *theirs]))
    return f"{distribution.wheel.name} alone, with {names}\n{done}\n  {bill.relative_to(ROOT)}"


def check_bill(bill: Path, distribution: Distribution) -> None:
    """It is about this distribution, knows every requirement, and tells nothing of this machine."""
    text = bill.read_text(encoding="utf-8")
    content = json.loads(text)
    subject = content["metadata"]["component"]
    if (subject["name"], subject["version"]) != (distribution.name, distribution.version):
        raise PackagingError(f"{bill.name} is about {subject['name']} {subject['version']}")
    known = {canonicalize_name(component["name"]) for component in content["components"]}
    if missing := packages.DIRECT_REQUIREMENTS[distribution.name] - known:
        raise PackagingError(f"{bill.name} does not list {', '.join(sorted(missing))}")
    if "file://" in text or str(ROOT) in text:
        raise PackagingError(f"{bill.name} has a path of this machine")


def needed(
    distribution: Distribution, distributions: dict[str, Distribution]
) -> tuple[list[Distribution], dict[str, importlib.metadata.Distribution]]:
    """What one wheel and its requirements' requirements ask for, itself among it: of ours, and of others by name."""
    ours: dict[str, Distribution] = {}
    theirs: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(distribution.name)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in ours or name in theirs:
            continue
        if name in distributions:
            ours[name] = distributions[name]
            asks: list[str] = ours[name].requirements()
        else:
            try:
                theirs[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                raise PackagingError(f"{distribution.name} requires {requirement}, which is not in this environment") from None
            asks = theirs[name].requires or []
        extras = ("", *requirement.extras)
        for asked in map(Requirement, asks):
            if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(asked)
    return list(ours.values()), theirs


def link(distributions: dict[str, importlib.metadata.Distribution], site_packages: Path) -> None:
    """Make what these distributions installed importable from there, and nothing else."""
    for name, distribution in distributions.items():
        for top in tops(name, distribution):
            place, target = site_packages / top, Path(str(distribution.locate_file(top)))
            if not place.is_symlink():
                place.symlink_to(target)
            elif place.readlink() != target:
                raise PackagingError(f"{top} of {name} lies in {target} and in {place.readlink()}: one environment is needed")


def tops(name: str, distribution: importlib.metadata.Distribution) -> Iterator[str]:
    """The folders and files of a distribution that lie directly in site-packages."""
    if distribution.files is None:
        raise PackagingError(f"{name} does not say which files it installed: install it with pip")
    yield from sorted({file.parts[0] for file in distribution.files} - {"..", "__pycache__"})


def write_sums(folder: Path) -> int:
    """The sha256 of every file of a folder, beside them, as sha256sum reads them; how many there are."""
    files = sorted(folder.iterdir())
    (folder / SUMS).write_text("".join(f"{digest(file)}  {file.name}\n" for file in files), encoding="utf-8")
    return len(files)


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
