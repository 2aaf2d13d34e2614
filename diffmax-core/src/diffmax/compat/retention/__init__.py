"""retention compatibility: names of its version 1.0. Use `from diffmax.compat import retention` in existing code.

What `diffmax.compat.power_attention` says of layouts, limits and states holds here too. Further differences: with a tail of
several queries in `power_retention_inference` the state is decayed for each by its own gates, where all had the last one's. A
tiled state holds some products twice. One drawn at random, in which the two differ, is answered as there; a tail is folded into
their mean.
`create_inputs` and the properties have `fused_normalizer=False`, which fits these functions. There is no `experimental`: its
normaliser overwrites the first feature of values.
"""

# The submodules come first: where a function has a submodule's name, the package's attribute is the function.
from diffmax.compat.retention import (
    _attention,  # noqa: F401
    _discumsum,  # noqa: F401
    _query_state,  # noqa: F401
    _update_state,  # noqa: F401
    _utils,  # noqa: F401
    reference,  # noqa: F401
    triton,  # noqa: F401
)
from diffmax.compat.retention import create_inputs as _create_inputs  # noqa: F401

from diffmax.compat.retention._functions import power_retention, power_retention_inference  # isort: skip
from diffmax.compat.retention.create_inputs import (  # isort: skip
    create_inference_inputs,
    create_inputs,
    inference_input_properties,
    inference_output_properties,
    input_properties,
    output_properties,
)

__all__ = [
    "create_inference_inputs",
    "create_inputs",
    "inference_input_properties",
    "inference_output_properties",
    "input_properties",
    "output_properties",
    "power_retention",
    "power_retention_inference",
]
