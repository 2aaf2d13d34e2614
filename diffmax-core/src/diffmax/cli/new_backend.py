"""`python -m diffmax new-backend NAME`: create a plugin from templates/backend."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from diffmax.machine.dispatch import registry
from diffmax.machine.runtimes import RUNTIMES

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

# Names of diffmax's own distributions.
RESERVED = ("core", *(runtime.package.removeprefix("diffmax-") for runtime in RUNTIMES))


def write(name: str, folder: str | Path | None = None) -> Path:
    """Write the files of a plugin.

    Args:
        name: The name of the backend. The distribution becomes diffmax-<name>, the package diffmax_<name>.
        folder: The folder to create; it must not exist. None: diffmax-<name> in the working directory.
    Returns:
        The folder.
    Raises:
        ValueError: The name is invalid or taken.
        FileExistsError: The folder exists.
    """
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_]*[A-Za-z0-9])?", name):
        raise ValueError(f"new-backend: name must be letters, digits and, inside it, '_', got {name!r}")
    owners = {backend.name.lower(): registry.owner(backend).distribution for backend in registry.backends()}
    if name.lower() in owners:
        raise ValueError(f"new-backend: the name {name!r} is taken by {owners[name.lower()]}\n  taken: {', '.join(owners)}")
    if name.lower() in RESERVED:
        raise ValueError(f"new-backend: the name {name!r} is kept for diffmax's own distributions: {', '.join(RESERVED)}")
    words = {
        "@name@": name,
        "@distribution@": "diffmax-" + name.lower().replace("_", "-"),
        "@package@": "diffmax_" + name.lower(),
        "@Name@": "".join(part[:1].upper() + part[1:] for part in name.split("_")),
    }
    target = Path(folder) if folder is not None else Path(words["@distribution@"])
    if target.exists():
        raise FileExistsError(f"new-backend: the folder must not exist yet, got {target}\nchoose another one with --to DIR")
    _copy(files("diffmax.cli") / "templates" / "backend", target, words)
    return target


def _copy(source: Traversable, target: Path, words: dict[str, str]) -> None:
    target.mkdir(parents=True)
    for entry in source.iterdir():
        path = target / _fill(entry.name.removesuffix(".in"), words)
        if entry.is_dir():
            _copy(entry, path, words)
        else:
            path.write_text(_fill(entry.read_text(encoding="utf-8"), words), encoding="utf-8")


def _fill(text: str, words: dict[str, str]) -> str:
    for placeholder, word in words.items():
        text = text.replace(placeholder, word)
    return text
