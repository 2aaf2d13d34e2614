"""The kit of attention, under the name that backends import."""

from diffmax.testing.attention.conformance import AttentionConformance

__all__ = ["AttentionConformance"]
