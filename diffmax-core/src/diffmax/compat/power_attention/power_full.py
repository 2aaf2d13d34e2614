"""Stands in for power-attention's module `power_full`, and for its variants for one device, which are one function here."""

from diffmax.compat.power_attention._functions import power_full, power_full_vidrial
from diffmax.compat.power_attention.create_inputs import create_inputs

power_full_cuda = power_full_reference = power_full_triton = power_full
power_full_vidrial_reference = power_full_vidrial

__all__ = [
    "create_inputs",
    "power_full",
    "power_full_cuda",
    "power_full_reference",
    "power_full_triton",
    "power_full_vidrial",
    "power_full_vidrial_reference",
]
