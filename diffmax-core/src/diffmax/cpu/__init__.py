"""CPU kernels, and whether the compiled ones can run here."""

import platform

import torch

from diffmax.plugin import CallSpec


def numba_missing() -> str | None:
    """Why Numba cannot be used in this process, or None. It is imported to find out: a NumPy too new for it shows only then."""
    try:
        import numba  # noqa: F401
    except Exception as error:  # noqa: BLE001  (whatever a broken installation raises, the plain kernels are there)
        return f"numba cannot be imported: {error}"
    return None


def numba_cannot(spec: CallSpec) -> list[str]:
    """Reasons against a call: float16 without the processor's conversions, which every x86 since 2012 has."""
    if spec.dtype == torch.float16 and platform.machine().lower() in ("x86_64", "amd64"):
        from llvmlite import binding

        if not binding.get_host_cpu_features().get("f16c", False):
            return ["this processor has no instructions that convert float16 (F16C)"]
    return []
