"""A fingerprint of the sources that compiled kernels are made from: while it is the same, so is what was counted of them.

The sources of an operator are its Triton kernels and their launch code, what these import of `FOLLOWED`, and the modules that
compile and count. Of a module that is not kernels itself only the names that are imported count, and what their definitions
use. Comments, docstrings and the place of a line do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Callable, Iterator
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
CONSTANTS = "diffmax.plugin"  # of which constants alone decide, such as TILE
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
    if not folder.is_dir():
        raise ValueError(f"no kernels of {operator!r}: {folder} is not a folder")

    @functools.cache
    def statements(path: Path) -> list[ast.stmt]:
        return _bare(ast.parse(read(path))).body

    found = {(path, read(path) if path.suffix != ".py" else _unparsed(statements(path))) for path in (*MAKERS, *makers)}
    waiting: list[tuple[Path, str | None]] = [(path, None) for path in folder.glob("*.py")]
    seen = set(waiting)
    while waiting:
        path, name = waiting.pop()
        part = [each for each in statements(path) if name is None or name in _defined(each)]
        found.add((path, _unparsed(part)))
        further = {use for each in part for use in _imported(each, name)}
        if name is not None:
            further |= {(path, node.id) for each in part for node in ast.walk(each) if isinstance(node, ast.Name)}
        waiting += further - seen
        seen |= further
    whole = "\n".join(sorted(f"{path.relative_to(ROOT).as_posix()} {part}" for path, part in found if part))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings. Other strings stay: some are inline assembly."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


def _unparsed(body: list[ast.stmt]) -> str:
    """As source: ast.dump differs by Python's version."""
    return ast.unparse(ast.Module(body, []))


def _defined(statement: ast.AST) -> set[str]:
    """Names that a statement of a module binds, or whose value it may change."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    parts: list[ast.AST] = [statement] if isinstance(statement, ast.Expr) else getattr(statement, "targets", [])
    parts += [target] if (target := getattr(statement, "target", None)) else []
    inner = (part for part in ast.iter_child_nodes(statement) if isinstance(part, ast.stmt | ast.ExceptHandler))
    return {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}.union(*map(_defined, inner))


def _imported(statement: ast.stmt, wanted: str | None) -> Iterator[tuple[Path, str | None]]:
    """Files of what a statement imports of `FOLLOWED` and `CONSTANTS`, each with the name there, None for the whole module.

    Args:
        statement: A statement of a module.
        wanted: Of a statement that imports, the name that is meant; None for all.
    """
    for node in ast.walk(statement):
        aliases = node.names if isinstance(node, ast.Import | ast.ImportFrom) else ()
        for alias in aliases:
            if node is statement and wanted not in {None, alias.asname or alias.name}:
                continue
            module = node.module if isinstance(node, ast.ImportFrom) else None
            below = _file(f"{module}.{alias.name}" if module else alias.name)
            if below is not None:
                yield below, None
            elif module and (file := _file(module)) and (module != CONSTANTS or alias.name.isupper()):
                yield file, None if module.startswith(KERNELS) else alias.name


def _file(module: str) -> Path | None:
    """None for a name that is no module, or not followed."""
    path = CORE.joinpath(*module.split("."))
    found = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)
    return found if module.startswith((*FOLLOWED, CONSTANTS)) else None
