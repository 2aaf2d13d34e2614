"""Sphinx: `make docs` builds the pages of this folder, and the API from docstrings, to docs/_build."""

from importlib_metadata import version as _version

project = "diffmax"
author = "The diffmax authors"
project_copyright = author
version = release = _version("diffmax-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
root_doc = "README"
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"
napoleon_custom_sections = [("Numerics", "notes_style"), ("Source", "notes_style")]

html_theme = "furo"
html_title = f"diffmax {release}"
