"""Metadata of installed packages: importlib-metadata, or if it is missing the standard library's module with the same API."""

from __future__ import annotations

try:
    from importlib_metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions, version
except ImportError:  # a source tree without installed requirements
    from importlib.metadata import (  # type: ignore[assignment]
        EntryPoint,
        PackageNotFoundError,
        entry_points,
        packages_distributions,
        version,
    )

__all__ = ["EntryPoint", "PackageNotFoundError", "core_version", "entry_points", "packages_distributions", "version"]

UNKNOWN = "0+unknown"


def core_version() -> str:
    """The version of diffmax-core; `UNKNOWN` if it is imported from a source path without installation."""
    try:
        return version("diffmax-core")
    except PackageNotFoundError:
        return UNKNOWN
