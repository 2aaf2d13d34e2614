"""Threshold attention from operators that torch_npu runs on the device: core's blocks of matrix products."""

from diffmax.kernels.cpu.threshold import backward as threshold_attention_backward
from diffmax.kernels.cpu.threshold import forward as threshold_attention

__all__ = ["threshold_attention", "threshold_attention_backward"]
