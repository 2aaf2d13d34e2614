"""Metadata of installed packages: importlib-metadata, or if it is missing the standard library's module with the same API."""

from __future__ import annotations

import functools
from email.parser import HeaderParser
from typing import Any, NamedTuple

try:
    from importlib_metadata import (
        EntryPoint,
        PackageNotFoundError,
        distribution,
        distributions,
        packages_distributions,
    )
except ImportError:  # a source tree without installed requirements
    from importlib.metadata import (  # type: ignore[assignment]
        EntryPoint,
        PackageNotFoundError,
        distribution,
        distributions,
        packages_distributions,
    )

__all__ = [
    "EntryPoint",
    "Facts",
    "PackageNotFoundError",
    "core_version",
    "entry_points_of",
    "facts",
    "packages_distributions",
    "version",
]

UNKNOWN = "0+unknown"


class Facts(NamedTuple):
    """A distribution's name and version, and its requirements as they are written."""

    name: str
    version: str
    requires: tuple[str, ...]


def facts(found: Any) -> Facts:
    """Read the headers of a distribution, a `Distribution`, whose `metadata` reads the same but imports email.policy first."""
    text = found.read_text("METADATA")
    if text is None:  # another layout, for example egg-info
        return Facts(found.name, found.version, tuple(found.requires or ()))
    return _read(text.partition("\n\n")[0])


@functools.cache
def _read(headers: str) -> Facts:
    read = HeaderParser().parsestr(headers)
    return Facts(read["Name"], read["Version"], tuple(read.get_all("Requires-Dist", ())))


def entry_points_of(group: str) -> list[EntryPoint]:
    """As importlib-metadata's `entry_points(group=group)`, but parses only files that name the group."""
    points: list[EntryPoint] = []
    for found in distributions():
        text = found.read_text("entry_points.txt")
        if text is not None and f"[{group}]" in text and _is_first(found, text):
            points += found.entry_points.select(group=group)
    return points


def _is_first(found: Any, text: str) -> bool:
    """Whether no other copy of the distribution, with other entry points, comes earlier on the path and hides it."""
    try:
        return bool(distribution(facts(found).name).read_text("entry_points.txt") == text)
    except Exception:  # noqa: BLE001  (an interrupted uninstall leaves a distribution without metadata, and without a name)
        return True


def version(name: str) -> str:
    """The version of an installed distribution.

    Raises:
        PackageNotFoundError: It is not installed.
    """
    return facts(distribution(name)).version


def core_version() -> str:
    """The version of diffmax-core; `UNKNOWN` if it is imported from a source path without installation."""
    try:
        return version("diffmax-core")
    except PackageNotFoundError:
        return UNKNOWN
