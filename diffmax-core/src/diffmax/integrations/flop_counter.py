"""What torch's FlopCounterMode counts for diffmax's operators: nominal figures, in which a power is one operation.

Importing this module tells torch. `import diffmax` does so only if `torch.utils.flop_counter` has been imported before: that
imports triton, which an import of diffmax must not.

Forward, per score: the maximum, a subtraction and a product; four evaluations of a difference, two powers and two sums (the
iterations of a row with unit variance, docs/performance.md); the division. Backward: a power, two products, two sums, a
difference and a product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

FORWARD_FLOPS = 3 + 4 * 5 + 1
BACKWARD_FLOPS = 7


def _bisect(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return FORWARD_FLOPS * math.prod(x_shape)


def _bisect_backward(grad_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return BACKWARD_FLOPS * math.prod(grad_shape)


if torch.ops.diffmax.bisect not in flop_registry:
    register_flop_formula(torch.ops.diffmax.bisect)(_bisect)
    register_flop_formula(torch.ops.diffmax.bisect_backward)(_bisect_backward)
