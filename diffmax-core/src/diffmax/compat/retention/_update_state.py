"""Stands in for retention's module `_update_state`."""

from __future__ import annotations

from functools import partial

from diffmax.compat.power_attention import _update_state as _first
from diffmax.compat.power_attention._functions import default_D, update_state, update_state_vidrial
from diffmax.compat.power_attention._update_state import input_properties, output_properties

create_inputs = partial(_first.create_inputs, seed=41)
update_state_reference = update_state_reference_fwd = update_state_triton = update_state
update_state_vidrial_reference = update_state_vidrial

__all__ = [
    "create_inputs",
    "default_D",
    "input_properties",
    "output_properties",
    "update_state",
    "update_state_reference",
    "update_state_reference_fwd",
    "update_state_triton",
    "update_state_vidrial",
    "update_state_vidrial_reference",
]
