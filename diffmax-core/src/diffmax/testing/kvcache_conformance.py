"""The kit of attention over a cache, under the name that backends import."""

from diffmax.testing.decoding.conformance import KVCacheConformance

__all__ = ["KVCacheConformance"]
