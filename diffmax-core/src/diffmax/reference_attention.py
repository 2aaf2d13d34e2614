"""The former path of `diffmax.reference.attention`."""

from diffmax.reference.attention import attention, attention_backward

__all__ = ["attention", "attention_backward"]
