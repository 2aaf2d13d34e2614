"""The Python blocks of README and docs run, and print what their comments say."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("diffmax-*/*.md"), *ROOT.glob("docs/**/*.md")])


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_readme_is_among_the_pages_and_has_blocks():
    assert len(python_blocks("README.md")) >= 4


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run_and_print_what_they_say(page):
    namespace: dict[str, object] = {}
    for block in python_blocks(page):
        output = StringIO()
        with redirect_stdout(output):
            exec(compile(block, page, "exec"), namespace)
        promised = re.findall(r"^print\(.*\)\s*# (.*)$", block, re.MULTILINE)
        assert output.getvalue().splitlines()[: len(promised)] == promised
