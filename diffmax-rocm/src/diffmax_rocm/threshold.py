"""Threshold attention on AMD GPUs: core's shared kernels."""

from __future__ import annotations

from diffmax.kernels.triton.threshold.launch import ThresholdOperator
from diffmax_rocm.attention import architecture

operator = ThresholdOperator(architecture, ptx=False)
threshold_attention = operator.threshold_attention
threshold_attention_backward = operator.threshold_attention_backward
warmup = operator.warmup
