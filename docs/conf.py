"""Sphinx: `make docs` builds the pages of this folder, and the API from docstrings, to docs/_build."""

import re
from typing import Any

from importlib_metadata import version as _version
from sphinx.application import Sphinx

project = "diffmax"
author = "The diffmax authors"
project_copyright = author
version = release = _version("diffmax-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "README.md", "examples"]  # index.md includes README.md; examples are projects, not pages
smartquotes = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"
napoleon_custom_sections = [("Numerics", "notes_style"), ("Source", "notes_style")]

html_theme = "furo"
html_title = f"diffmax {release}"


def _open_one_line_sections(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings write "Source: text" on one line; napoleon reads a section only if its heading stands alone."""
    for index in reversed(range(len(lines))):
        if section := re.fullmatch(r"(Numerics|Source): (.*)", lines[index]):
            lines[index : index + 1] = ["", f"{section[1]}:", f"    {section[2]}"]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _open_one_line_sections, priority=100)  # before napoleon's 500
