"""CPU kernels, and whether the compiled ones can run here."""

import functools
import sys
from typing import Any

import torch

from diffmax.plugin import CallSpec


def numba_missing() -> str | None:
    """Why Numba cannot be used in this process, or None. It is imported to find out: a NumPy too new for it shows only then.

    Importing a module that needs the global lock turns it on again in a free-threaded Python, so that is asked first.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "this Python runs without the global interpreter lock, where the compiled kernels were never run"
    try:
        import numba

        config: Any = numba.config
    except Exception as error:  # noqa: BLE001  (whatever a broken installation raises, the plain kernels are there)
        return f"numba cannot be imported: {error}"
    return "NUMBA_DISABLE_JIT is set, so Numba compiles nothing" if config.DISABLE_JIT else None


def numba_cannot(spec: CallSpec) -> list[str]:
    """Reasons against a call: float16 without the processor's conversions, which every x86 since 2012 has."""
    if spec.dtype == torch.float16 and not numba_converts_float16():
        return ["the processor that Numba compiles for has no instructions that convert float16 (F16C)"]
    return []


def numba_converts_float16() -> bool:
    """Whether Numba's target, which NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose, converts float16 itself.

    Where it does not, LLVM calls a function that is not there, and ends the process.
    """
    import numba.core.codegen
    from llvmlite import binding

    core: Any = numba.core
    name, features = core.config.CPU_NAME, core.config.CPU_FEATURES
    return _converts_float16(
        binding.get_host_cpu_name() if name is None else name,
        core.codegen.get_host_cpu_features() if features is None else features,
    )


@functools.cache
def _converts_float16(cpu: str, features: str) -> bool:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(cpu=cpu, features=features)
    widen = "define float @widen(half %x) {\n%y = fpext half %x to float\nret float %y\n}"
    return not any(name in machine.emit_assembly(binding.parse_assembly(widen)) for name in ("__extendhfsf2", "__gnu_h2f_ieee"))
