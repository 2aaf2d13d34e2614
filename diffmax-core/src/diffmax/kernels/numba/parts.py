"""Functions that kernels call, compiled as parts of them.

Numba optimises each function, with all that it calls, and turns it into machine code, and does so again for the function that
calls it, up to the kernel: half of the time of a first call went into code that nothing ever runs. A part of a kernel is
translated alone; what is optimised and turned into machine code is the kernel, once, with its parts in it.
"""

from __future__ import annotations

from typing import Any

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.extending import overload, register_jitable
from numba.core.typed_passes import NopythonTypeInference

# Numba's versions whose libraries of code are known to be made of what `_Library` builds on; others compile as Numba does.
KNOWN = (0, 60), (0, 68)


class _Library(JITCodeLibrary):
    """The code of a part: there to be linked into the code of those who call it."""

    def finalize(self) -> None:
        """Link in what the part calls; neither optimise it nor turn it into machine code."""
        self._raise_if_finalized()  # type: ignore[no-untyped-call]
        for library in dict.fromkeys(self._linking_libraries):
            if hasattr(library, "_reload_init"):  # not in Numba 0.60
                self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()  # type: ignore[no-untyped-call]
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """None: a part has no machine code of its own."""
        return 0

    @property
    def codegen(self) -> Any:
        """What sets the environment of a function's machine code: nothing."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Leave it: the kernel's copy of the part has its own."""


@register_pass(mutates_CFG=False, analysis_only=True)  # type: ignore[no-untyped-call]
class _NoCounts(FunctionPass):
    """Code without counts of references to arrays: no part makes one, they all lie in memory that the caller holds."""

    _name = "diffmax_no_counts"

    def __init__(self) -> None:
        FunctionPass.__init__(self)  # type: ignore[no-untyped-call]

    def run_pass(self, state: Any) -> bool:
        """Set it for what follows, which is the translation; before it, Numba would refuse functions that return arrays."""
        state.targetctx = state.targetctx.subtarget(enable_nrt=False)
        return False


class _Part(Compiler):
    """Numba's compiler, with a library and a pass of the kinds above."""

    def define_pipelines(self) -> Any:
        """Numba's own passes, and the one above."""
        state = self.state
        if state.library is None:
            state.library = _Library(state.targetctx.codegen(), state.func_id.func_qualname)  # type: ignore[no-untyped-call]
        (pipeline,) = super().define_pipelines()  # type: ignore[no-untyped-call]
        pipeline.add_pass_after(_NoCounts, NopythonTypeInference)
        pipeline.finalize()
        return [pipeline]


def _options() -> dict[str, Any]:
    """What Numba is told of a part: no way in from Python or C, and how to compile it."""
    version = tuple(int(number) for number in numba.__version__.split(".")[:2])
    how = {"pipeline_class": _Part} if KNOWN[0] <= version <= KNOWN[1] else {}
    return {"no_cfunc_wrapper": True, "no_cpython_wrapper": True, **how}


def jitable(function: Any) -> Any:
    """Make a function part of the kernels that call it."""
    return register_jitable(**_options())(function)


def part(function: Any) -> Any:
    """Numba's `overload(function)`, of which what is chosen for the arguments' types is part of the kernels that call it."""
    options: Any = _options()
    return overload(function, jit_options=options)
