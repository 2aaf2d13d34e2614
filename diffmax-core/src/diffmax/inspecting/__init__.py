"""What the attention of a model reads: `inspect_attention` makes an `AttentionReport`. As `diffmax.inspect_attention`."""

from diffmax.inspecting.capture import inspect_attention
from diffmax.inspecting.report import AttentionReport, Layer, Read, Reads

__all__ = ["AttentionReport", "Layer", "Read", "Reads", "inspect_attention"]
