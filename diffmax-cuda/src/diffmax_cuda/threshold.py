"""Threshold attention on NVIDIA GPUs: core's shared kernels."""

from __future__ import annotations

from diffmax.kernels.triton.threshold.launch import ThresholdOperator
from diffmax_cuda.attention import architecture

operator = ThresholdOperator(architecture, ptx=True)
threshold_attention = operator.threshold_attention
threshold_attention_backward = operator.threshold_attention_backward
warmup = operator.warmup
