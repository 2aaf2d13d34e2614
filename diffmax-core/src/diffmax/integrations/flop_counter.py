"""FLOP formulas of diffmax's operators for torch's FlopCounterMode: nominal figures, in which a power is one operation.

Importing this module registers them. `import diffmax` does so only if `torch.utils.flop_counter` is already imported, because
that module imports triton, which `import diffmax` must not do. The formulas are in the spec of each operator.

Attention counts like torch's fused attention, without regard to sparsity: dense matrix products, two in forward and five in
backward; per sequence for packed sequences, over the whole length for caches. Its row operator is not counted, nor is softmax
in torch.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from diffmax.operators.common.spec import SPECS

if torch.ops.diffmax.bisect not in flop_registry:
    for spec in SPECS.values():
        for name, formula in spec.flops.items():
            operator = getattr(torch.ops.diffmax, name)
            register_flop_formula(operator, get_raw=True)(formula)
            flop_registry.setdefault(operator, formula)  # torch 2.4 files it where its own counter does not look
