"""Calls where each rank has a part of the sequence, as inside torch's `context_parallel`, which splits only its own."""

import contextlib
import sys
import threading
import warnings
from collections.abc import Iterator

import torch
from torch.nn import functional

_CONTEXT = "torch.distributed.tensor.experimental._context_parallel._attention"
_state = threading.local()


def warn_of_part(name: str) -> None:
    """Warn inside torch's `context_parallel`: a public function that attends to the keys it is given sees this rank's alone."""
    context = sys.modules.get(_CONTEXT)
    if context is None or torch.compiler.is_compiling() or getattr(_state, "whole", False):
        return
    if functional.scaled_dot_product_attention not in getattr(context, "_replaced_functions", ()):
        return
    warnings.warn(
        f"{name} inside torch's context_parallel attends to the keys of this rank alone, got its part of the sequence\n"
        'call diffmax.distributed.attention_context_parallel(..., layout="zigzag") there; of whole keys this result is right',
        stacklevel=3,
    )


@contextlib.contextmanager
def whole_keys() -> Iterator[None]:
    """Where keys are known to be those of the whole sequence."""
    _state.whole = True
    try:
        yield
    finally:
        _state.whole = False
