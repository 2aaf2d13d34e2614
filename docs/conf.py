"""Sphinx: `make docs` builds the pages of this folder, and the API from docstrings, to docs/_build. It needs no network."""

import re
import zlib
from pathlib import Path
from typing import Any

from docutils import nodes
from importlib_metadata import version as _version
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

project = "diffmax"
author = "The diffmax authors"
project_copyright = author
version = release = _version("diffmax-core")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.intersphinx", "sphinx.ext.napoleon"]
templates_path = ["_templates"]
exclude_patterns = [
    "_build",
    "jupyter_execute",
    "README.md",
    "examples",
]  # README.md is the index on GitHub; examples are projects
smartquotes = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is committed with its outputs: make notebook

# Where the types in signatures are described, by the names that signatures give them. Whole inventories would need a network.
TORCH = {
    "DeviceMesh": "distributed.html#torch.distributed.device_mesh.DeviceMesh",
    "Tensor": "tensors.html#torch.Tensor",
    "nn.Module": "generated/torch.nn.Module.html#torch.nn.Module",
    "torch.Tensor": "tensors.html#torch.Tensor",
    "torch.device": "tensor_attributes.html#torch.device",
    "torch.dtype": "tensor_attributes.html#torch.dtype",
    "torch.nn.modules.activation.MultiheadAttention": "generated/torch.nn.MultiheadAttention.html#torch.nn.MultiheadAttention",
    "torch.nn.modules.module.Module": "generated/torch.nn.Module.html#torch.nn.Module",
    "torch.nn.parameter.Parameter": "generated/torch.nn.parameter.Parameter.html#torch.nn.parameter.Parameter",
}
ABSTRACT = ("Callable", "Collection", "Iterable", "Iterator", "Mapping", "Sequence")
PYTHON = {f"collections.abc.{name}": f"library/collections.abc.html#collections.abc.{name}" for name in ABSTRACT}
PYTHON["pathlib.Path"] = "library/pathlib.html#pathlib.Path"


def _inventory(project: str, links: dict[str, str]) -> str:
    """The file that intersphinx reads, of these links."""
    path = Path(__file__).parent / "_build" / "inventories" / f"{project}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n# The rest is compressed with zlib.\n"
    lines = "".join(f"{name} py:class 1 {link} -\n" for name, link in links.items())
    path.write_bytes(head.encode() + zlib.compress(lines.encode()))
    return str(path)


intersphinx_mapping = {
    "python": ("https://docs.python.org/3", _inventory("python", PYTHON)),
    "torch": ("https://docs.pytorch.org/docs/stable", _inventory("torch", TORCH)),
}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"
napoleon_custom_sections = [("Numerics", "notes_style"), ("Source", "notes_style")]

html_theme = "furo"
html_title = f"diffmax {release}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_favicon = "_static/icon.svg"
html_baseurl = "https://diffmax.github.io/diffmax/"
html_theme_options = {  # "view" and "edit" of each page, and the repository
    "source_repository": "https://github.com/diffmax/diffmax/",
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [
        {"name": "GitHub", "url": "https://github.com/diffmax/diffmax", "html": "Repository", "class": ""},
    ],
}


def _mathml(latex: str, display: str) -> str:
    """MathML, which browsers show without a script; a number that is given as a tag stands beside it."""
    number = re.search(r"\\tag\{(.*?)\}", latex)
    plain = re.sub(r"\\tag\{.*?\}", "", latex).replace(r"\arg", r"\operatorname{arg}")
    formula = convert(plain, display=display)
    if unknown := re.findall(r"\\[a-zA-Z]+", formula):
        raise ExtensionError(f"conf.py: latex2mathml does not know {unknown[0]}, in {latex!r}")
    return f'<span class="eqno">({number[1]})</span>{formula}' if number else formula


def _visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _visit_math_block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math-wrapper"><div class="math">{_mathml(node.astext(), "block")}</div></div>')
    raise nodes.SkipNode


def _open_one_line_sections(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings write "Source: text" on one line; napoleon reads a section only if its heading stands alone."""
    for index in reversed(range(len(lines))):
        if section := re.fullmatch(r"(Numerics|Source): (.*)", lines[index]):
            lines[index : index + 1] = ["", f"{section[1]}:", f"    {section[2]}"]


def _skip_fields(_app: Sphinx, _what: str, _name: str, member: Any, _skip: bool, _options: Any) -> bool | None:
    """Fields of a named tuple have a docstring that says nothing; its class describes them."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def _out_of_the_sidebar(_app: Sphinx, page: str, source: list[str]) -> None:
    """Decisions are linked from their list; a hundred of them would stand beside every page."""
    if page.startswith("decisions/"):
        source[0] = f"---\norphan: true\n---\n\n{source[0]}"


def _without_source(_app: Sphinx, page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Pages of the API are made from docstrings: the repository has no file of theirs to view or edit."""
    if page.startswith("api/"):
        context["page_source_suffix"] = None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("html-page-context", _without_source)
    app.connect("source-read", _out_of_the_sidebar)
    app.connect("autodoc-process-docstring", _open_one_line_sections, priority=100)  # before napoleon's 500
    app.connect("autodoc-skip-member", _skip_fields)
    app.add_html_math_renderer("mathml", inline_renderers=(_visit_math, None), block_renderers=(_visit_math_block, None))
