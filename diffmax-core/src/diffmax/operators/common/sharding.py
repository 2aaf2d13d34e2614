"""DTensor: the sharding rules in the specs of the operators, which need no communication.

Importing DTensor takes half a second, which `import diffmax` must not do, and when an operator is called it is too late for a
rule. But DTensor runs an operator's fake implementation for the shapes before it looks up the rule, in eager mode, inference
mode and under torch.compile: so the fake implementations call `register_rules`.
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
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return
    for spec in SPECS.values():
        for name, rule in spec.sharding.items():
            register_sharding(getattr(torch.ops.diffmax, name).default)(rule)
