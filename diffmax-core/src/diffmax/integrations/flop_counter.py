"""What torch's FlopCounterMode counts for diffmax's operators: nominal figures, in which a power is one operation.

Importing this module tells torch. `import diffmax` does so only if `torch.utils.flop_counter` has been imported before: that
imports triton, which an import of diffmax must not. The formulas are in each operator's spec.

Attention counts as torch's fused own does, whatever a mask or alpha leaves to skip: its dense matrix products, two forward and
five backward; of packed sequences each one's own, of caches over their whole length. Its row operator is not counted,
as softmax is not.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from diffmax.operators.common.spec import SPECS

if torch.ops.diffmax.bisect not in flop_registry:
    for spec in SPECS.values():
        for name, formula in spec.flops.items():
            register_flop_formula(getattr(torch.ops.diffmax, name), get_raw=True)(formula)
