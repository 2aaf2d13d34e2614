"""Power attention from operators that torch_npu runs on the device: core's chunks of matrix products, which need no other."""

from diffmax.kernels.cpu.power import backward as power_attention_backward
from diffmax.kernels.cpu.power import forward as power_attention

__all__ = ["power_attention", "power_attention_backward"]
