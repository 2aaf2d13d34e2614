"""Attention on AMD GPUs: core's shared kernels with this vendor's architectures."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax_rocm.rows import own_table, processors


@lru_cache
def architecture(device: torch.device) -> str:
    """As Triton names it, such as "gfx942"."""
    return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]


operator = AttentionOperator(architecture, processors, ptx=False, table=own_table)
attention = operator.attention
attention_backward = operator.attention_backward
warmup = operator.warmup
