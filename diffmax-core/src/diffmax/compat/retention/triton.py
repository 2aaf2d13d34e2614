"""Stands in for retention's module `triton`: its functions are the package's."""

from diffmax.compat.power_attention._functions import discumsum, query_state, update_state
from diffmax.compat.retention._functions import attention, power_retention, power_retention_inference

__all__ = ["attention", "discumsum", "power_retention", "power_retention_inference", "query_state", "update_state"]
