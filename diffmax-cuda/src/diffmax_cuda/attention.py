"""Attention on NVIDIA GPUs: core's shared kernels with this vendor's architectures."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax_cuda.rows import own_table, processors


@lru_cache
def architecture(device: torch.device) -> str:
    """As Triton names it, such as "sm90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


operator = AttentionOperator(architecture, processors, ptx=True, table=own_table)
attention = operator.attention
attention_backward = operator.attention_backward
warmup = operator.warmup
