"""The kit of power attention, under the name that backends import."""

from diffmax.testing.power.conformance import PowerConformance

__all__ = ["PowerConformance"]
