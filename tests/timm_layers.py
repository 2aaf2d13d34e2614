"""timm's DiffAttention, also without torchvision, which most of timm imports and this layer does not."""

import importlib
import importlib.util
import sys
import types

import pytest


def theirs():
    """The class, or a skipped test."""
    spec = importlib.util.find_spec("timm") if "timm" not in sys.modules else sys.modules["timm"].__spec__
    if spec is None:
        pytest.skip("needs timm: pip install timm==1.0.31, or with --no-deps if torchvision cannot be installed")
    try:
        return importlib.import_module("timm.layers").DiffAttention
    except (ImportError, RuntimeError):  # no torchvision, or one that does not fit torch
        _forget()
    try:
        for name, folder in (("timm", ""), ("timm.layers", "/layers")):
            package = types.ModuleType(name)
            package.__path__ = [f"{place}{folder}" for place in spec.submodule_search_locations]
            sys.modules[name] = package
        return importlib.import_module("timm.layers.diff_attention").DiffAttention
    finally:
        _forget()


def _forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]
