"""docs/quickstart.ipynb runs from top to bottom, on this checkout, and shows what it is committed with."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

# what they import takes seconds: not while tests are collected
for package in ("nbformat", "nbclient"):
    if not importlib.util.find_spec(package):
        pytest.skip(f"needs {package}: pip install 'diffmax-core[dev]'", allow_module_level=True)

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def outputs(path):
    """What each cell of code shows as text, what it prints or its value, and what kinds of things it shows."""
    import nbformat

    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    shown = [[(out.output_type, *out.get("data", {})) for out in cell.outputs] for cell in cells]
    texts = ["".join(out.get("text") or out["data"].get("text/plain", "") for out in cell.outputs) for cell in cells]
    return texts, shown


def words_and_numbers(text):
    number = r"-?\d+\.?\d*"
    return re.sub(number, "#", text), [float(found) for found in re.findall(number, text)]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    path = tmp_path_factory.mktemp("notebook") / "quickstart.ipynb"
    subprocess.run([sys.executable, str(ROOT / ".ci" / "notebook.py"), str(path)], check=True)
    return outputs(path)


@pytest.mark.slow
def test_the_quickstart_runs(fresh):
    text = "\n".join(fresh[0])
    assert "tensor([0.8307, 0.1693, 0.0000, 0.0000])" in text
    start, end = map(float, re.search(r"alpha moved from ([\d.]+) to ([\d.]+)", text).groups())
    assert start == 0.9
    assert abs(end - 0.6) < 0.03
    assert any("image/png" in kinds for cell in fresh[1] for kinds in cell)


@pytest.mark.slow
def test_the_quickstart_is_committed_with_the_outputs_that_it_has(fresh):
    """`make notebook` renews them. Last digits, and what was drawn, may differ between processors."""
    texts, shown = outputs(NOTEBOOK)
    assert shown == fresh[1]
    for committed, new in zip(texts, fresh[0], strict=True):
        (words, numbers), (new_words, new_numbers) = map(words_and_numbers, (committed, new))
        assert words == new_words
        assert numbers == pytest.approx(new_numbers, rel=0.02, abs=0.02)


def test_the_quickstart_installs_the_published_package_and_ci_does_not():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    install = [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in install] == ["%pip install --quiet diffmax-core matplotlib"]
    assert not install[0].outputs
