"""Power attention on NVIDIA GPUs: core's shared kernels."""

from __future__ import annotations

from diffmax.kernels.triton.power.launch import PowerOperator
from diffmax_cuda.attention import architecture

operator = PowerOperator(architecture, ptx=True)
power_attention = operator.power_attention
power_attention_backward = operator.power_attention_backward
warmup = operator.warmup
