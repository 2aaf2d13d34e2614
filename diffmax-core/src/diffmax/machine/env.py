"""The DIFFMAX_* environment variables and their meaning. They are parsed strictly: a typo is an error."""

from __future__ import annotations

import os
from typing import NamedTuple

MEANINGS = {
    "DIFFMAX_BACKEND": "names, separated by commas: only these backends may be used, the first that can is",
    "DIFFMAX_BLOCK": "names, separated by commas: these plugins are not loaded",
    "DIFFMAX_PLUGINS": "0: no plugin is loaded",
    "DIFFMAX_STRICT": "1: running plain PyTorch on an accelerator is an error, not a warning",
}


class Settings(NamedTuple):
    """The parsed environment variables."""

    backend: tuple[str, ...] = ()
    block: tuple[str, ...] = ()
    plugins: bool = True
    strict: bool = False


def read() -> Settings:
    """Parse the environment.

    Raises:
        ValueError: A DIFFMAX_* variable is unknown, or its value is invalid.
    """
    unknown = sorted(name for name in os.environ if name.startswith("DIFFMAX_") and name not in MEANINGS)
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], MEANINGS, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"diffmax: unknown environment variable {unknown[0]}{hint}\n  known: {', '.join(MEANINGS)}")
    return Settings(
        backend=_names("DIFFMAX_BACKEND"),
        block=_names("DIFFMAX_BLOCK"),
        plugins=_switch("DIFFMAX_PLUGINS", default=True),
        strict=_switch("DIFFMAX_STRICT", default=False),
    )


def seen() -> dict[str, str]:
    """The variables that are set, with their raw values."""
    return {name: os.environ[name] for name in MEANINGS if name in os.environ}


def _names(variable: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in os.environ.get(variable, "").split(",") if name.strip())


def _switch(variable: str, *, default: bool) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"diffmax: {variable} must be 0 or 1, got {value!r}")
    return default if value == "" else value == "1"
