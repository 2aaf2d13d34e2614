"""Metadata of installed packages: importlib-metadata, or if it is missing the standard library's module with the same API."""

from __future__ import annotations

from email.parser import HeaderParser
from typing import Any, NamedTuple

try:
    from importlib_metadata import (
        EntryPoint,
        PackageNotFoundError,
        distribution,
        entry_points,
        packages_distributions,
    )
except ImportError:  # a source tree without installed requirements
    from importlib.metadata import (  # type: ignore[assignment]
        EntryPoint,
        PackageNotFoundError,
        distribution,
        entry_points,
        packages_distributions,
    )

__all__ = [
    "EntryPoint",
    "Facts",
    "PackageNotFoundError",
    "core_version",
    "entry_points",
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
    headers = HeaderParser().parsestr(text)
    return Facts(headers["Name"], headers["Version"], tuple(headers.get_all("Requires-Dist", ())))


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
