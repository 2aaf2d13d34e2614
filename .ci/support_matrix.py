"""The table of docs/attention.md: feature by backend, from what the backends declare. Run it after a declaration changes.

`tests/test_attention_docs.py` fails while the page says something else.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from diffmax import plugin
from diffmax.machine import builtin
from diffmax.machine.dispatch import import_function
from diffmax.operators.common.spec import SPECS
from diffmax.plugin import FEATURES, Backend, CallSpec

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "attention.md"
BEGIN, END = "<!-- .ci/support_matrix.py writes what follows -->\n", "<!-- .ci/support_matrix.py wrote what precedes -->\n"

# How a backend's attention is tested, in the words of the table. A new backend has to say it here.
TESTED = {
    "numba": "kit, CPU",
    "cpu": "kit, CPU",
    "reference": "kit and oracles, CPU",
    "cuda": "interpreter, compiler",
    "rocm": "interpreter, compiler",
    "npu": "stand-in device",
}
OPERATORS = tuple(SPECS["attention"].kernels)


def backends() -> list[Backend]:
    """Those of this repository that provide attention, core's first."""
    found = list(builtin.plugin.diffmax_backends())
    for folder in sorted(ROOT.glob("diffmax-*/src/diffmax_*")):
        sys.path.insert(0, str(folder.parent))
        try:
            found += importlib.import_module(f"{folder.name}._plugin").plugin.diffmax_backends()
        finally:
            sys.path.remove(str(folder.parent))
    return [backend for backend in found if any(name.startswith("attention") for name in backend.kernels)]


def cell(backend: Backend, feature: str) -> str:
    """Which of the operators the backend runs with this feature."""
    having = [operator for operator in OPERATORS if feature in plugin.OPERATOR_FEATURES[operator]]
    operators = having or list(SPECS["decoding"].kernels)
    able = [operator for operator in operators if runs(backend, operator, frozenset({feature}))]
    if len(able) == len(operators):
        return "✓"
    return {"attention": "forward only", "attention_backward": "backward only"}[able[0]] if able else ""


def runs(backend: Backend, operator: str, features: frozenset[str], dtype: torch.dtype | None = None) -> bool:
    """Whether the declaration has nothing against a call of common sizes."""
    if operator not in backend.provided:
        return False
    device = "cpu" if "*" in backend.device_types else backend.device_types[0]
    value_dim = 32 if "value_dim" in features else 64
    dtypes = backend.provided[operator].dtypes
    dtype = dtype or (torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0])
    spec = CallSpec(operator, device, backend.runtime or device, dtype, features, 64, value_dim)
    return not backend.reasons_against(spec) and not (backend.unsupported and import_function(backend.unsupported)(spec))


def table() -> str:
    """The table, with a line end."""
    columns = backends()
    rows = [["feature", *(f"`{backend.name}`" for backend in columns)], ["---"] * (len(columns) + 1)]
    rows.append(["forward, backward", *(cell_of_all(backend) for backend in columns)])
    here = set().union(*(plugin.OPERATOR_FEATURES[operator] for operator in (*OPERATORS, *SPECS["decoding"].kernels)))
    for feature in (feature for feature in FEATURES if feature in here):
        rows.append([f"`{feature}`", *(cell(backend, feature) for backend in columns)])
    rows.append(["dtypes", *(dtypes_of(backend) for backend in columns)])
    rows.append(["tested by", *(TESTED[backend.name] for backend in columns)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def dtypes_of(backend: Backend) -> str:
    """Those in which it runs the forward."""
    able = (dtype for dtype in backend.provided["attention"].dtypes if runs(backend, "attention", frozenset(), dtype))
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in able)


def cell_of_all(backend: Backend) -> str:
    """Which of the operators it has at all."""
    return ", ".join("✓" if operator in backend.kernels else "no" for operator in OPERATORS)


def main() -> None:
    """Write it into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
