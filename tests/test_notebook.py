"""examples/quickstart.ipynb runs from top to bottom, on this checkout."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install 'diffmax-core[dev]'")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'diffmax-core[dev]'")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def printed(cell):
    """What a cell shows as text: what it prints, and its value."""
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)


def test_the_quickstart_runs(tmp_path):
    """All cells but the one tagged "install": it would replace the checkout under test by the published package."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    install = [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in install] == ["%pip install --quiet diffmax-core matplotlib"]
    notebook.cells = [cell for cell in notebook.cells if cell not in install]
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "\n".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "tensor([0.8307, 0.1693, 0.0000, 0.0000])" in text
    start, end = map(float, re.search(r"alpha moved from ([\d.]+) to ([\d.]+)", text).groups())
    assert start == 0.9
    assert abs(end - 0.6) < 0.03
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))


def test_the_quickstart_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
