"""Decoding over a cache on AMD GPUs: core's shared kernels."""

from __future__ import annotations

from diffmax.kernels.triton.decoding.launch import Decoder
from diffmax_rocm.rows import own_table, processors

decoder = Decoder(processors, ptx=False, table=own_table)
attention_kvcache = decoder.attention_kvcache
warmup = decoder.warmup
