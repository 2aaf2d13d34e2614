"""The former path of `diffmax.reference.decoding`."""

from diffmax.reference.decoding import append, attention_kvcache

__all__ = ["append", "attention_kvcache"]
