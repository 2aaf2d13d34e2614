"""DTensor: the sharding rules in the specs of the operators, which need no communication.

Importing DTensor takes half a second, which `import diffmax` must not do, and when an operator is called it is too late for a
rule. But DTensor runs an operator's fake implementation for the shapes before it looks up the rule, in eager mode, inference
mode and under torch.compile: so `wiring.enter` has each of them call `register_rules`.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import torch

from diffmax.operators.common.spec import SPECS

# Placements of outputs and arguments (None: not a tensor) with which an operator runs without communication.
Sharding: TypeAlias = "tuple[list[Any], list[Any]]"

_registered = False


def register_rules() -> None:
    """Register the rules of every operator once, if DTensor has been imported; torch before 2.5 supports no rules."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    _registered = True
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for spec in SPECS.values():
        for name, rule in spec.sharding.items():
            operator = getattr(torch.ops.diffmax, name).default
            register_sharding(operator)(rule)
            # DTensor keeps what a rule says, by the tensors and by what follows the first int; bools before it count here too
            known[operator] = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
