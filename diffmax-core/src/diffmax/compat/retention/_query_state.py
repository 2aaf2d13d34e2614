"""Stands in for retention's module `_query_state`."""

from __future__ import annotations

from functools import partial

from diffmax.compat.power_attention import _query_state as _first
from diffmax.compat.power_attention._functions import query_state, query_state_vidrial
from diffmax.compat.power_attention._query_state import input_properties, output_properties

create_inputs = partial(_first.create_inputs, seed=41)
query_state_reference = query_state_reference_fwd = query_state_triton = query_state
query_state_vidrial_reference = query_state_vidrial

__all__ = [
    "create_inputs",
    "input_properties",
    "output_properties",
    "query_state",
    "query_state_reference",
    "query_state_reference_fwd",
    "query_state_triton",
    "query_state_vidrial",
    "query_state_vidrial_reference",
]
