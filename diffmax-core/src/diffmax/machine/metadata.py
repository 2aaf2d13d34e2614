"""What is installed: importlib-metadata, or where it is missing the standard library's module, which has the same interface."""

from __future__ import annotations

try:
    from importlib_metadata import EntryPoint, PackageNotFoundError, entry_points, packages_distributions, version
except ImportError:  # a source tree on a bare machine
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
    """diffmax-core's version; `UNKNOWN` where it is imported from a source path and was never installed."""
    try:
        return version("diffmax-core")
    except PackageNotFoundError:
        return UNKNOWN
