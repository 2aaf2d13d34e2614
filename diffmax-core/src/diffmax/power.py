"""The parts of power attention, and its states in other layouts; `diffmax.power_attention` is the whole. docs/power.md."""

from diffmax.operators.power.layouts import from_tiled, tiled_dim, to_tiled
from diffmax.operators.power.parts import (
    Decoded,
    attention,
    discumsum,
    expanded_dim,
    indices,
    inference,
    multiplicities,
    query_state,
    symmetric_power,
    update_state,
)
from diffmax.operators.power.state import PowerState

__all__ = [
    "Decoded",
    "PowerState",
    "attention",
    "discumsum",
    "expanded_dim",
    "from_tiled",
    "indices",
    "inference",
    "multiplicities",
    "query_state",
    "symmetric_power",
    "tiled_dim",
    "to_tiled",
    "update_state",
]
