"""A fingerprint of the sources that compiled kernels are made from: while it is the same, so is what was counted of them.

The sources of an operator are its Triton kernels and their launch code, what these import of `FOLLOWED`, and the modules that
compile and count. Comments, docstrings and the place of a line do not count.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "diffmax-core" / "src"
KERNELS = "diffmax.kernels.triton"
OPERATORS = ("rows", "attention", "decoding", "power", "threshold")
# Of what kernels and launch code import, what decides on a binary; the rest names types.
FOLLOWED = (
    KERNELS,
    "diffmax.kernels.tools",
    "diffmax.operators.common.numerics",
    "diffmax.operators.power",
    "diffmax.reference",
)
# of which the numbers alone decide, such as TILE; the rest of it names types
NUMBERS = CORE / "diffmax" / "plugin.py"
MAKERS = (
    ROOT / "benchmarks" / "compile_kernels.py",
    ROOT / "benchmarks" / "machine_code.py",
    CORE / "diffmax" / "testing" / "ahead_of_time.py",
    *(ROOT / f"diffmax-{vendor}" / "src" / f"diffmax_{vendor}" / "configs.py" for vendor in ("cuda", "rocm")),
    *(ROOT / f"diffmax-{vendor}" / "src" / f"diffmax_{vendor}" / "tables.json" for vendor in ("cuda", "rocm")),
)


def text(path: Path) -> str:
    """A file's text."""
    return path.read_text(encoding="utf-8")


def fingerprint(operator: str, *makers: Path, read: Callable[[Path], str] = text) -> str:
    """Sixteen hexadecimal digits of an operator's sources and of what compiles and counts them.

    Args:
        operator: A folder of `diffmax.kernels.triton`.
        makers: Further files that decide on what is counted.
        read: A file's text.
    """
    folder = CORE.joinpath(*KERNELS.split("."), operator)
    found: dict[str, str] = {}
    waiting = [*sorted(folder.glob("*.py")), NUMBERS, *MAKERS, *makers]
    if not folder.is_dir():
        raise ValueError(f"no kernels of {operator!r}: {folder} is not a folder")
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        if path.suffix != ".py":
            found[name] = read(path)
        elif name not in found:
            tree = ast.parse(read(path))
            if path == NUMBERS:
                tree.body = [
                    node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
                ]
            found[name] = ast.unparse(_bare(tree))  # ast.dump differs by Python's version
            if path.is_relative_to(CORE / "diffmax" / "kernels") or path.is_relative_to(
                CORE / "diffmax" / "operators" / "power"
            ):
                waiting += [file for module in _imported(tree) if (file := _file(module))]
    whole = "\n".join(f"{name} {found[name]}" for name in sorted(found))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings. Other strings stay: some are inline assembly."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


def _imported(tree: ast.Module) -> set[str]:
    """Modules of `FOLLOWED` that a module imports, or imports from."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith(FOLLOWED)}


def _file(module: str) -> Path | None:
    """None for a name that is no module."""
    path = CORE.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)
