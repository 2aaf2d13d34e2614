"""The Python blocks of README and docs run, and print what their comments say.

By hand, since neither sybil nor pytest-markdown-docs compares `print(...)  # ...` with what is printed: an evaluator of ours
would remain, which is most of this file, and a requirement would come.
"""

import importlib.util
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import diffmax

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("diffmax-*/*.md"), *ROOT.glob("docs/**/*.md")])


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_readme_is_among_the_pages_and_has_blocks():
    assert len(python_blocks("README.md")) >= 4


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run_and_print_what_they_say(page):
    said: dict[int, list[str]] = {}

    def recording_print(*values: object, **options: Any) -> None:
        text = StringIO()
        print(*values, **{**options, "file": text})
        said.setdefault(sys._getframe(1).f_lineno, []).append(text.getvalue().rstrip("\n"))

    namespace: dict[str, object] = {"print": recording_print}
    for block in python_blocks(page):
        said.clear()
        with redirect_stdout(StringIO()):
            exec(compile(block, page, "exec"), namespace)
        for number, line in enumerate(block.splitlines(), 1):
            promised = re.search(r"^\s*print\(.*\)\s*# (.*)$", line)
            if promised:  # in a loop: what it prints in all rounds, with commas
                assert ", ".join(said.get(number, [])) == promised[1], line


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in targets if target and not ((ROOT / page).parent / target).exists()]


def test_the_index_of_the_documentation_lists_every_decision():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "docs" / "decisions").glob("*.md") if f"(decisions/{path.name})" not in index]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "decisions").glob("*.md")), ids=lambda path: path.stem[:4])
def test_a_decision_says_when_it_was_made_and_whether_it_holds(path):
    title, blank, status = path.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith(f"# {path.stem[:4]}: ")
    assert not blank
    assert re.fullmatch(r"\*\d{4}-\d{2}-\d{2}, (in force|replaced by \[\d{4}\]\(\S+\))[^*]*\.\*", status)


def test_the_api_page_lists_every_public_name():
    page = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    tables = re.findall(r"^\.\. autosummary::\n(?:   :.*\n)*\n((?:   \S+\n)+)", page, re.MULTILINE)
    listed = [name for table in tables for name in table.split()]
    assert not set(diffmax.__all__) - {"__version__", "nn"} - set(listed)


def test_a_formula_that_cannot_be_shown_is_refused_and_its_number_stands_beside_it():
    pytest.importorskip("sphinx", reason="needs Sphinx: pip install sphinx")
    pytest.importorskip("latex2mathml", reason="needs latex2mathml: pip install latex2mathml")
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    formula = conf._mathml(r"\arg\max x_i \tag{7}", "block")
    assert formula.startswith('<span class="eqno">(7)</span><math ')
    assert formula.endswith("</math>")
    assert "\\" not in formula
    with pytest.raises(conf.ExtensionError, match=r"does not know \\nosuch"):
        conf._mathml(r"\nosuch x", "inline")


def test_the_table_of_versions_is_made_of_the_records_of_what_ran():
    spec = importlib.util.spec_from_file_location("ran", ROOT / ".ci" / "record" / "ran.py")
    ran = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ran)
    page = ran.PAGE.read_text(encoding="utf-8")
    assert ran.committed()
    assert ran.filled(page, ran.committed()) == page
    record = ran.record({"tests": ["tests"], "marks": ""}, {"passed": 2, "failed": 1, "skipped": 0})
    assert record["packages"]["torch"] == torch.__version__.partition("+")[0]
    rows = ran.table([record, record]).splitlines()
    assert len(rows) == 3
    assert rows[2].endswith("| 4 | 2 | 0 |")


@pytest.mark.parametrize("readme", sorted(ROOT.glob("diffmax-*/README.md")), ids=lambda path: path.parent.name)
def test_the_page_of_a_distribution_on_the_index_has_no_relative_link(readme):
    links = re.findall(r"\]\(([^)\s]+)\)", readme.read_text(encoding="utf-8"))
    assert len(links) > 3
    assert not [link for link in links if not link.startswith("https://")]
