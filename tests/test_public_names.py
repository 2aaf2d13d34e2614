"""Names of diffmax that documents mention and vendors import: each is there, and each is public."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import diffmax
from diffmax import plugin

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "diffmax-example-backend"
TEMPLATE = ROOT / "diffmax-core" / "src" / "diffmax" / "cli" / "templates"
DOCUMENTS = sorted(
    path
    for folder, pattern in (
        (ROOT, "*.md"),
        (ROOT, "diffmax-*/*.md"),
        (ROOT / "docs", "**/*.md"),
        (ROOT / "docs", "**/*.rst"),
        (ROOT / "examples", "*.ipynb"),
        (TEMPLATE, "**/*.in"),
        (EXAMPLE, "**/*.py"),
    )
    for path in folder.glob(pattern)
)
DOTTED = re.compile(r"(?<![\w./-])diffmax(?!\.json)(?:\.[A-Za-z]\w*)+")
FROM = re.compile(r"^[>\s\"]*from (diffmax[\w.]*) import ((?:\w+(?: as \w+)?(?:, )?)+)", re.MULTILINE)

# Said to users and vendors since 0.1. A file that moves leaves a re-export here.
STAY = {
    "diffmax.compat.adasplash": ("adasplash", "triton_entmax"),
    "diffmax.compat.entmax": ("entmax_bisect", "sparsemax"),
    "diffmax.compat.flash_attn": ("flash_attn_func", "flash_attn_with_kvcache"),
    "diffmax.compat.power_attention": ("attention", "power_full", "update_state"),
    "diffmax.compat.retention": ("power_retention", "power_retention_inference"),
    "diffmax.distributed": (
        "attention_context_parallel",
        "attention_varlen_context_parallel",
        "attention_with_kvcache_sharded",
        "diffmax_bisect_sharded",
        "diffmax_loss_sharded",
        "shard_heads",
    ),
    "diffmax.errors": ("BackendError", "NoBackendError"),
    "diffmax.functional": ("Alpha", "diffmax_bisect", "normalize"),
    "diffmax.integrations.diffusers": ("attention_maps", "register", "replace"),
    "diffmax.integrations.flop_counter": (),
    "diffmax.integrations.timm": ("attention_maps", "layer", "register", "replace"),
    "diffmax.integrations.transformers": (
        "adapt",
        "alpha_callback",
        "calibrate",
        "distil",
        "refit",
        "register",
        "replace",
        "suggest_alpha",
    ),
    "diffmax.kernels": (),
    "diffmax.kernels.capability": ("shared_kernels",),
    "diffmax.kernels.requirements": ("triton_problem",),
    "diffmax.losses": ("DiffmaxLoss", "diffmax_loss"),
    "diffmax.maps": ("HillMap",),
    "diffmax.monitor": ("Monitor",),
    "diffmax.nn": ("AffineScale", "AlphaSchedule", "DiffmaxAttention", "DiffmaxBisectModule", "Elastic", "HeadGate", "Sink"),
    "diffmax.plot": ("alpha_and_support", "alpha_curves", "attention_maps"),
    "diffmax.power": ("attention", "discumsum", "from_tiled", "query_state", "to_tiled", "update_state"),
    "diffmax.plugin": ("API_VERSION", "AttentionCall", "Backend", "CallSpec", "FEATURES", "Kernel", "KVCacheCall", "hookimpl"),
    "diffmax.reference": ("bisect", "bisect_backward"),
    "diffmax.reference_attention": ("attention", "attention_backward"),
    "diffmax.reference_dropout": ("kept", "philox", "threshold"),
    "diffmax.reference_kvcache": ("append", "attention_kvcache"),
    "diffmax.testing": ("gates", "solve_exactly"),
    "diffmax.testing.attention_conformance": ("AttentionConformance",),
    "diffmax.testing.conformance": ("BackendConformance",),
    "diffmax.testing.kvcache_conformance": ("KVCacheConformance",),
    "diffmax.testing.power_conformance": ("PowerConformance",),
    "diffmax.testing.report": (),
    "diffmax.testing.threshold_conformance": ("ThresholdConformance",),
}

VENDORS = {
    "diffmax-cuda": (ROOT / "diffmax-cuda" / "src", "*.py"),
    "diffmax-rocm": (ROOT / "diffmax-rocm" / "src", "*.py"),
    "diffmax-npu": (ROOT / "diffmax-npu" / "src", "*.py"),
    "template": (TEMPLATE, "*.in"),
    "example": (EXAMPLE, "*.py"),
}
NOT_FOR_VENDORS = ("diffmax.operators", "diffmax.machine")


def is_there(name):
    """Whether a dotted name is a module, or an attribute of one, or a field of a class."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # what it needs is missing, not it
                raise
            continue
        for attribute in parts[end:]:
            if attribute in getattr(found, "__annotations__", {}):
                return True
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def names_in(text):
    """Dotted names, and those that `from diffmax... import` lists."""
    names = {*DOTTED.findall(text)}
    for module, imported in FROM.findall(text):
        names |= {f"{module}.{name.split(' as ')[0]}" for name in imported.rstrip(", ").split(", ")}
    return names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_in_a_document_is_there(path):
    assert not [name for name in sorted(names_in(path.read_text(encoding="utf-8"))) if not is_there(name)]


def test_the_documents_name_much_and_what_is_not_there_is_noticed():
    assert len(set().union(*(names_in(path.read_text(encoding="utf-8")) for path in DOCUMENTS))) > 100
    text = "See `diffmax.atention` and diffmax.plugin.Backend.nmae.\n>>> from diffmax.nn import Sink as S, Snik\n"
    assert sorted(name for name in names_in(text) if not is_there(name)) == [
        "diffmax.atention",
        "diffmax.nn.Snik",
        "diffmax.plugin.Backend.nmae",
    ]


@pytest.mark.parametrize("module", STAY)
def test_a_documented_import_path_stays(module):
    found = importlib.import_module(module)
    assert not [name for name in STAY[module] if not hasattr(found, name)]


def test_what_the_top_module_exports_is_there():
    assert not [name for name in diffmax.__all__ if not hasattr(diffmax, name)]


def imports_of(source):
    """Every module and name of diffmax that a file imports, dotted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def private(name):
    """Whether a vendor should not import it."""
    top, *parts = name.split(".")
    hidden = any(part.startswith("_") for part in parts) or f"{name}.".startswith(tuple(f"{p}." for p in NOT_FOR_VENDORS))
    return top == "diffmax" and hidden


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_vendor_imports_public_names_of_core_alone(vendor):
    folder, pattern = VENDORS[vendor]
    paths = [path for path in folder.rglob(pattern) if ".py" in path.suffixes]
    sources = (re.sub("@(\\w+)@", "\\1", path.read_text(encoding="utf-8")) for path in paths)
    imported = [name for source in sources for name in imports_of(source)]
    assert any(name.startswith("diffmax.") for name in imported)
    assert not [name for name in imported if private(name)]


def test_a_private_import_is_noticed():
    source = (
        "import diffmax.machine.dispatch\nfrom diffmax.operators.common import numerics\nfrom diffmax.nn import _shapes, Sink\n"
        "from diffmax.machinery import x\nfrom ._own import y\nimport _thread\n"
    )
    assert [name for name in imports_of(source) if private(name)] == [
        "diffmax.machine.dispatch",
        "diffmax.operators.common.numerics",
        "diffmax.nn._shapes",
    ]


def test_the_plugin_interface_lists_what_documents_name_and_vendors_import():
    """And a star import gives it."""
    files = [*DOCUMENTS, *(path for folder, pattern in VENDORS.values() for path in folder.rglob(pattern))]
    named = set().union(*(names_in(path.read_text(encoding="utf-8")) for path in files))
    wanted = {name.split(".")[2] for name in named if name.startswith("diffmax.plugin.")}
    guide = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    own = {name for name, found in vars(plugin).items() if getattr(found, "__module__", "diffmax.plugin") == "diffmax.plugin"}
    wanted |= {word for word in re.findall(r"`(\w+)`", guide) if word in own and not inspect.ismodule(vars(plugin)[word])}
    assert {"Backend", "FEATURES", "Saved", "Wanted"} <= wanted
    assert wanted <= set(plugin.__all__)
    given = {}
    exec("from diffmax.plugin import *", given)
    assert set(plugin.__all__) <= set(given)


def overloaded():
    """The functions with overloads: the file, the name, the implementation and its overloads."""
    for path in sorted((ROOT / "diffmax-core" / "src").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text if "@overload" in text else "")
        for body in (tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))):
            functions = [node for node in body if isinstance(node, ast.FunctionDef)]
            marked = [node for node in functions if any(ast.unparse(mark) == "overload" for mark in node.decorator_list)]
            for name in dict.fromkeys(node.name for node in marked):
                (written,) = (node for node in functions if node.name == name and node not in marked)
                yield pytest.param(written, [node for node in marked if node.name == name], id=f"{path.stem}.{name}")


def parameters(function):
    """What each parameter of a function is annotated with, and its default, in order."""
    listed = function.args
    positional = [*listed.posonlyargs, *listed.args]
    defaults = [None] * (len(positional) - len(listed.defaults)) + listed.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(listed.kwonlyargs, listed.kw_defaults, strict=True)]
    return {a.arg: tuple(ast.unparse(node) if node else None for node in (a.annotation, default)) for a, default in pairs}


@pytest.mark.parametrize(("written", "overloads"), list(overloaded()))
def test_overloads_have_the_parameters_of_what_they_describe(written, overloads):
    """A new option is missed by none. They differ in what chooses the type of the result, which takes some of its types."""
    expected = parameters(written)
    for described in map(parameters, overloads):
        assert list(described) == list(expected)
        changed = [name for name in expected if described[name] != expected[name]]
        for name in changed:
            annotation, (whole, _) = described[name][0], expected[name]
            assert annotation in whole.split(" | ") or annotation.startswith("Literal[")
