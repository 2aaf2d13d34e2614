"""docs/attention.md says what the backends declare."""

import importlib.util
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("support_matrix", ROOT / ".ci" / "support_matrix.py")
support_matrix = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(support_matrix)


def test_the_table_is_what_the_backends_declare():
    page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    assert support_matrix.table() in page, "run: python .ci/support_matrix.py"


def test_a_cell_tells_what_is_not_there():
    whole = next(backend for backend in support_matrix.backends() if backend.name == "cpu")
    kernels = {name: replace(kernel, features=kernel.features - {"sink"}) for name, kernel in whole.provided.items()}
    without = replace(whole, kernels=kernels)
    forward = replace(whole, kernels={"attention": whole.kernels["attention"]})
    assert support_matrix.cell(whole, "sink") == "✓"
    assert support_matrix.cell(without, "sink") == ""
    assert support_matrix.cell(forward, "sink") == "forward only"
    assert support_matrix.cell(forward, "alpha_gradient") == ""
    assert support_matrix.cell(forward, "attention_stats") == "✓"
