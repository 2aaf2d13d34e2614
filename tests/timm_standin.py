"""timm where torchvision is not installed.

timm imports torchvision. Each of its wheels fits one build of torch alone, and beside another it breaks transformers too. So
`make setup` installs timm without it, and while timm is imported here, what it takes from torchvision are empty classes.
"""

import importlib
import sys
import types
import warnings
from importlib.machinery import ModuleSpec


def _attribute(make):
    def __getattr__(self, name):  # noqa: N807
        if name.startswith("__"):
            raise AttributeError(name)
        return make(name)

    return __getattr__


class _Constants(type):
    __getattr__ = _attribute(str)


class _Empty(types.ModuleType):
    __getattr__ = _attribute(lambda name: _Constants(name, (), {}))


class _Finder:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def import_timm():
    """Import timm; raises ImportError if it is not installed."""
    if "timm" in sys.modules or _torchvision_fits():
        return importlib.import_module("timm")
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # timm before 1.0.24 and torch.jit
            return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        _forget()


def _torchvision_fits():
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # none, or one without its operators
        _forget()
        return False
    return True


def _forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
