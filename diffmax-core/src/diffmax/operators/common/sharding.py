"""DTensor: how each operator may be sharded without communication, as its spec says.

DTensor takes half a second to import, which `import diffmax` must not cost, and no operator is called before it is too late
to ask for a rule. But DTensor first asks an operator's fake kernel for the shapes and only then looks for its rule, in eager
mode, inference mode and under torch.compile: so the fake kernels call `register_rules`.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import torch

from diffmax.operators.common.spec import SPECS

# Placements of the outputs, and of the arguments (None: not a tensor): one way to run an operator without communication.
Sharding: TypeAlias = "tuple[list[Any], list[Any]]"

_registered = False


def register_rules() -> None:
    """Give DTensor the rules of every operator, once, if it has been imported; torch before 2.5 takes no rules."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    _registered = True
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return
    for spec in SPECS.values():
        for name, rule in spec.sharding.items():
            register_sharding(getattr(torch.ops.diffmax, name).default)(rule)
