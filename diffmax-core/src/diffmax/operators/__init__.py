"""What each operator means: its public functions, checks, gradients and schema; one folder for each operator."""

import importlib
import pkgutil


def register_all() -> None:
    """Register every operator: import the module `spec` of each folder here. See `common.spec`."""
    for folder in pkgutil.iter_modules(__path__, f"{__name__}."):
        if folder.ispkg and folder.name != f"{__name__}.common":
            importlib.import_module(f"{folder.name}.spec")
