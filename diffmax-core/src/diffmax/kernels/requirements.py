"""Requirements of the shared kernels, checked without importing a kernel, for the probes of backends."""

from __future__ import annotations

import importlib.util

from packaging.version import Version

from diffmax.machine.metadata import packages_distributions, version

OLDEST_TRITON = "3.6"


def triton_problem(compiler: str) -> str | None:
    """Why Triton cannot compile here for `compiler` ("nvidia", "amd"); None if it can.

    Several distributions provide a package `triton`, each for different devices: the message names the installed one.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with a torch built for the device, else: pip install triton"
    flavours = sorted(set(packages_distributions().get("triton", [])))
    found = f"{flavours[0]} {version(flavours[0])}" if len(flavours) == 1 else " and ".join(flavours) or "triton, on a path"
    import triton  # imported here, because a probe runs once, late

    if Version(triton.__version__).release < Version(OLDEST_TRITON).release:
        return f"Triton is too old: {found} has version {triton.__version__}, needed is {OLDEST_TRITON} or newer"
    from triton.backends import backends

    if compiler not in backends:
        return f"this Triton ({found}) does not compile for {compiler}, only for {', '.join(sorted(backends)) or 'nothing'}"
    return None
