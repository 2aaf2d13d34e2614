"""The kit of threshold attention, under the name that backends import."""

from diffmax.testing.threshold.conformance import ThresholdConformance

__all__ = ["ThresholdConformance"]
