"""Runs docs/quickstart.ipynb from top to bottom, and writes it with its outputs, by which the pages show it: `make notebook`.

The cell tagged "install" is not run: it would replace this checkout by the published package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "quickstart.ipynb"


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in a folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = notebook.cells
    notebook.cells = [cell for cell in cells if "install" not in cell.metadata.get("tags", [])]
    client = NotebookClient(notebook, timeout=120, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute()
    notebook.cells = cells
    notebook.metadata["language_info"] = {"name": "python"}  # not the version of the Python that ran it
    for cell in cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # that it compiles
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    return notebook


def main() -> None:
    """Write to the file given, or over the notebook."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK
    nbformat.write(executed(NOTEBOOK.parent), target)


if __name__ == "__main__":
    main()
