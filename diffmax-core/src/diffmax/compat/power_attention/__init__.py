"""power-attention compatibility: names of its version 1.0. Use `from diffmax.compat import power_attention` in existing code.

The layout is (b, t, h, d). Limits do not apply: any length and chunk size, any head size, every even degree, fewer queries than
keys, gradients of any order, also for states and gates, any device. Names of variants for one device are the same function.

States are returned in the layout of their Triton code, 16 x 16 blocks, where it exists: for degree 2 and d a multiple of 16;
else, or with `state_layout="exact"`, in diffmax's. A state that is given may have any: which one is told by its number of rows.

What differs: a query whose weights are all 0 gives 0, where an epsilon gave the mean of the values. `scale=0` is an error, not
the default. The final state of `power_full` is a pair with its sums of keys, gates apply to an initial state, and one without
sums of keys is an error. `discumsum` has t + 1 steps without gates too. `attention` finds grouped heads by the shapes; query
head i reads key head i // (hq / h). States have the dtype of the inputs, as there: in float16 one of many tokens overflows;
`diffmax.power_attention` keeps float32.
"""

# The submodules come first: where a function has a submodule's name, the package's attribute is the function.
from diffmax.compat.power_attention import (
    _attention,  # noqa: F401
    _discumsum,  # noqa: F401
    _query_state,  # noqa: F401
    _update_state,  # noqa: F401
    _utils,  # noqa: F401
)
from diffmax.compat.power_attention import create_inputs as _create_inputs  # noqa: F401
from diffmax.compat.power_attention import power_full as _power_full

from diffmax.compat.power_attention._functions import (  # isort: skip
    ChunkState,
    attention,
    compute_expanded_dim,
    default_D,
    discumsum,
    power_full,
    power_full_vidrial,
    query_state,
    query_state_vidrial,
    update_state,
    update_state_vidrial,
)
from diffmax.compat.power_attention.create_inputs import create_inputs, input_properties, output_properties  # isort: skip

power_full_reference = _power_full.power_full_reference
power_full_vidrial_reference = _power_full.power_full_vidrial_reference

__all__ = [
    "ChunkState",
    "attention",
    "compute_expanded_dim",
    "create_inputs",
    "default_D",
    "discumsum",
    "input_properties",
    "output_properties",
    "power_full",
    "power_full_reference",
    "power_full_vidrial",
    "power_full_vidrial_reference",
    "query_state",
    "query_state_vidrial",
    "update_state",
    "update_state_vidrial",
]
