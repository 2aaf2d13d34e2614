"""The one version of the four distributions, which stands in several files: print it, or write another into all of them.

`python .ci/version.py` fails where the files differ. `python .ci/version.py 0.2.0` writes 0.2.0 everywhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]

# Where it stands: files, the pattern of one place, and which part of that is the version.
PLACES = (
    ("diffmax-*/pyproject.toml", r'^(version = ")(.+)(")$'),
    ("diffmax-*/pyproject.toml", r'("diffmax-(?:core|cuda|rocm|npu)==)([^"]+)(")'),
    ("CITATION.cff", r"^(version: )(.+)()$"),
)


class VersionError(Exception):
    """The places do not agree, or what should be written is no version."""


def agreed(root: Path = ROOT) -> str:
    """The version that stands everywhere."""
    found: dict[str, list[str]] = {}
    for pattern, place in PLACES:
        for file in sorted(root.glob(pattern)) or [root / pattern]:
            name = str(file.relative_to(root))
            stands = re.findall(place, text(file), re.MULTILINE) if file.is_file() else []
            if not stands:
                raise VersionError(f"version: {name} must have a place {place}, got none")
            for _, version, _ in stands:
                found.setdefault(version, []).append(name)
    if len(found) > 1:
        lines = [f"  {version}: {', '.join(sorted(set(files)))}" for version, files in sorted(found.items())]
        raise VersionError("\n".join(["version: all places must have one, got", *lines, "run: python .ci/version.py VERSION"]))
    return next(iter(found))


def write(version: str, root: Path = ROOT) -> None:
    """Put it into every place."""
    try:
        normal = str(Version(version))
    except InvalidVersion:
        raise VersionError(f"version: must be one of PEP 440, such as 0.2.0, got {version!r}") from None
    if normal != version:
        raise VersionError(f"version: must be in its normal form, got {version!r}; write {normal}")
    for pattern, place in PLACES:
        for file in sorted(root.glob(pattern)):
            file.write_text(re.sub(place, rf"\g<1>{version}\g<3>", text(file), flags=re.MULTILINE), encoding="utf-8")


def text(file: Path) -> str:
    """What stands in it."""
    return file.read_text(encoding="utf-8")


def main() -> int:
    """Print it, or write it first."""
    try:
        if len(sys.argv) > 1:
            write(sys.argv[1])
        print(agreed())
    except VersionError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
