"""A warning for environments that hold the older project `diffmax`, which owns the same import name."""

import warnings

from diffmax.machine.metadata import PackageNotFoundError, version


def warn_if_installed() -> None:
    """Warn if the distribution `diffmax` is installed too: the one installed last has overwritten files of the other."""
    try:
        found = version("diffmax")
    except PackageNotFoundError:
        return
    except Exception:  # noqa: BLE001  (its metadata is damaged; the remedy is the same)
        found = "of unknown version"
    warnings.warn(
        f"the older project diffmax {found} is installed beside diffmax-core, and both own the import name diffmax\n"
        "run: pip uninstall diffmax && pip install --force-reinstall --no-deps diffmax-core",
        RuntimeWarning,
        stacklevel=3,
    )
