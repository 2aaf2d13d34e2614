"""`python -m diffmax new-backend NAME`: create a plugin from templates/backend, with the kernels of one operator."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffmax.machine.dispatch import registry
from diffmax.machine.runtimes import RUNTIMES

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

# Names of diffmax's own distributions.
RESERVED = ("core", *(runtime.package.removeprefix("diffmax-") for runtime in RUNTIMES))


class _Start(NamedTuple):
    """What a template is filled with besides names: of its kernels, what they can do, their kit, and what they are."""

    dtypes: tuple[str, ...]
    features: tuple[str, ...]
    alpha_gradient: bool
    kit: str
    kit_class: str
    words: str


STARTS = {
    "bisect": _Start(
        ("float16", "bfloat16", "float32", "float64"),
        ("deterministic", "tensor_alpha"),
        True,
        "conformance",
        "BackendConformance",
        "diffmax's plain-PyTorch reference",
    ),
    "attention": _Start(
        ("bfloat16", "float32"),
        ("causal", "deterministic", "gqa", "mask", "tensor_alpha", "value_dim", "window"),
        True,
        "attention_conformance",
        "AttentionConformance",
        "plain PyTorch that holds the matrix of scores",
    ),
    "power_attention": _Start(
        ("bfloat16", "float32"),
        ("deterministic", "gates", "gqa", "high_degree", "value_dim"),
        False,
        "power_conformance",
        "PowerConformance",
        "plain PyTorch that holds the matrix of weights",
    ),
}
"""The operators that there is a template for."""


def write(name: str, folder: str | Path | None = None, operator: str = "bisect") -> Path:
    """Write the files of a plugin.

    Args:
        name: The name of the backend. The distribution becomes diffmax-<name>, the package diffmax_<name>.
        folder: The folder to create; it must not exist. None: diffmax-<name> in the working directory.
        operator: What its kernels compute: "bisect", "attention" or "power_attention".
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
    start = STARTS[operator]
    words = {
        "@name@": name,
        "@distribution@": "diffmax-" + name.lower().replace("_", "-"),
        "@package@": "diffmax_" + name.lower(),
        "@Name@": "".join(part[:1].upper() + part[1:] for part in name.split("_")),
        "@operator@": operator,
        "@dtypes@": ", ".join(f"torch.{dtype}" for dtype in start.dtypes),
        "@features@": ", ".join(f'"{feature}"' for feature in start.features),
        "@gradients@": ' | {"alpha_gradient"}' if start.alpha_gradient else "",
        "@kit@": start.kit,
        "@Kit@": start.kit_class,
        "@start@": start.words,
    }
    target = Path(folder) if folder is not None else Path(words["@distribution@"])
    if target.exists():
        raise FileExistsError(f"new-backend: the folder must not exist yet, got {target}\nchoose another one with --to DIR")
    templates = files("diffmax.cli") / "templates"
    _copy(templates / "backend", target, words)
    kernels = (templates / "kernels" / f"{operator}.py.in").read_text(encoding="utf-8")
    (target / "src" / words["@package@"] / "kernels.py").write_text(_fill(kernels, words), encoding="utf-8")
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
